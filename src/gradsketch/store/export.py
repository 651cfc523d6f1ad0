"""A store for other programs: Parquet tables and FAISS indexes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gradsketch.durable import written_whole
from gradsketch.errors import InputError
from gradsketch.store.columns import COLUMN_TYPES, common_kind, kind_of
from gradsketch.store.shard import Shard
from gradsketch.store.store import Store

__all__ = ["to_faiss", "to_parquet"]

_NUMBERS = ("gradient_norm", "loss", "tokens")


def to_parquet(store: Store, path: str | Path) -> Path:
    """Write one Parquet file: row, id, float32 sketch, gradient_norm, loss, tokens and the metadata columns.

    A metadata column called row becomes ``metadata_row``. One row group a shard, so memory stays bounded by a shard. A
    file at ``path`` is replaced, whole or not at all.

    Raises:
        InputError: the store is empty.
        StoreError: a shard is damaged, or the file cannot be written.
    """
    path, store = Path(path), store.snapshot()
    if not store.ranges():
        raise _empty(store)
    kinds = _kinds(store)
    schema = _schema(store.d, kinds)
    with written_whole(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as out:
        for shard in store:
            out.write_table(_table(shard, kinds).cast(schema))
    return path


def to_faiss(store: Store, path: str | Path, *, normalize: bool = True) -> Path:
    """Write an exact inner-product FAISS index whose ids are row numbers.

    Sketches are scaled to unit length where ``normalize`` (cosine scores); otherwise scores are dot products. Needs
    ``faiss-cpu`` (the extra ``faiss``) and memory for all rows in float32.

    Raises:
        InputError: faiss is not installed, or the store is empty.
        StoreError: a shard is damaged, or the file cannot be written.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError("no module named faiss", "FAISS", "Run pip install faiss-cpu") from error
    index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(store.d))
    for shard in store:
        vectors = shard.decoded()
        if normalize:
            # Rows that were skipped when the index was built have no norm, and rows of zeros stay what they are.
            vectors = vectors / torch.nan_to_num(shard.numbers("gradient_norm"), nan=1.0).clamp_min(1e-30)[:, None]
        rows = pa.array(range(shard.start, shard.start + shard.count), pa.int64()).to_numpy()
        index.add_with_ids(vectors.numpy(), rows)
    if index.ntotal == 0:
        raise _empty(store)
    with written_whole(Path(path)) as temporary:
        temporary.write_bytes(b"")  # where this fails the error names the reason; that of FAISS has none
        faiss.write_index(index, str(temporary))
    return Path(path)


def _kinds(store: Store) -> dict[str, str]:
    """Return the kind of each metadata column over all shards: JSON where a float would round an integer."""
    found = store.columns()
    kinds = {name: common_kind(own) for name, own in found.items()}
    mixed = [name for name, kind in kinds.items() if kind == "float" and "int" in found[name]]
    for shard in store if mixed else ():
        for name in mixed:
            if shard.columns.get(name) == "int" and kind_of([*shard.column(name), 0.5]) == "json":
                kinds[name] = "json"
    return kinds


def _free(name: str) -> str:
    return f"metadata_{name}" if name == "row" else name


def _schema(d: int, kinds: Mapping[str, str]) -> pa.Schema:
    numbers = [pa.field(name, pa.float32()) for name in _NUMBERS]
    metadata = [pa.field(_free(name), COLUMN_TYPES[kind]) for name, kind in kinds.items()]
    first = [pa.field("row", pa.int64()), pa.field("id", COLUMN_TYPES["string"])]
    return pa.schema([*first, pa.field("sketch", pa.list_(pa.float32(), d)), *numbers, *metadata])


def _table(shard: Shard, kinds: Mapping[str, str]) -> pa.Table:
    columns = {
        "row": pa.array(range(shard.start, shard.start + shard.count), pa.int64()),
        "id": shard.batch.column("id"),
        "sketch": pa.FixedSizeListArray.from_arrays(pa.array(shard.decoded().numpy().reshape(-1)), shard.d),
        **{name: shard.batch.column(name) for name in _NUMBERS},
    }
    return pa.table({**columns, **{_free(name): _metadata(shard, name, kind) for name, kind in kinds.items()}})


def _metadata(shard: Shard, name: str, kind: str) -> pa.Array:
    """Return a shard's column in the one kind that the columns of all shards have."""
    if name in shard.columns and (kind != "json" or shard.columns[name] == "json"):
        return shard.batch.column(name)
    values = shard.column(name)
    if kind == "json":
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(values, COLUMN_TYPES[kind])


def _empty(store: Store) -> InputError:
    return InputError(f"{store!r} has no rows yet", "at least one row", "Build the index first")
