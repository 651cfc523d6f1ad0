"""A store for other programs: Parquet tables and FAISS indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gradsketch.errors import InputError
from gradsketch.store.store import Store

__all__ = ["to_faiss", "to_parquet"]


def to_parquet(store: Store, path: str | Path) -> Path:
    """Write one Parquet file: row, id, float32 sketch, gradient_norm, loss and the metadata columns.

    One row group a shard, so memory stays bounded by a shard.

    Raises:
        StoreError: a shard is damaged.
    """
    path = Path(path)
    writer = None
    try:
        for shard in store:
            table = _table(shard.batch, shard.start, shard.decoded().numpy())
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise _empty(store)
    return path


def to_faiss(store: Store, path: str | Path, *, normalize: bool = True) -> Path:
    """Write an exact inner-product FAISS index whose ids are row numbers.

    Sketches are scaled to unit length where ``normalize`` (cosine scores); otherwise scores are dot products. Needs
    ``faiss-cpu`` (the extra ``faiss``) and memory for all rows in float32.

    Raises:
        InputError: faiss is not installed, or the store is empty.
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
    faiss.write_index(index, str(path))
    return Path(path)


def _table(batch: pa.RecordBatch, start: int, sketches: Any) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(sketches.reshape(-1)), sketches.shape[1])
    columns = {"row": pa.array(range(start, start + batch.num_rows), pa.int64())}
    for name in batch.schema.names:
        if name != "scale":
            columns[name] = vectors if name == "sketch" else batch.column(name)
    return pa.table(columns)


def _empty(store: Store) -> InputError:
    return InputError(f"{store!r} has no rows yet", "at least one row", "Build the index first")
