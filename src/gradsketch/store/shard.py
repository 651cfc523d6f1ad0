"""One shard: an Arrow IPC file with one record batch. docs/format.md specifies its bytes.

float16 and int8 rows carry a scale, a power of two for float16, because a gradient of norm 1e-7 would underflow
otherwise. Every shard carries a CRC-32 of all its other bytes, so every flipped bit of a file is found, and one for
every 64 rows of sketches, which names the place. A process compares the sum when it first opens a file, not at every
query: 0.4 ms a megabyte once, against 30 µs a shard afterwards.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gradsketch.errors import DamageError, FingerprintError, InputError, StoreError
from gradsketch.store.columns import COLUMN_TYPES, RESERVED, kind_of
from gradsketch.store.encoding import decode, encode, stored_type, stored_width
from gradsketch.store.layout import require_plain
from gradsketch.store.manifest import FORMAT_VERSION, Manifest

__all__ = ["CHECKSUM_ROWS", "UNREADABLE", "Rows", "Shard", "damage", "encode_shard", "open_shard", "require_sound"]

# Rows of sketches under one checksum: a damaged byte is named to within this many rows.
CHECKSUM_ROWS = 64
_HEADER = b"gradsketch"
_CRC_MARK = b"gradsketch-crc32="
_CRC_BLANK = b"00000000"
_NUMBERS = {
    torch.float16: pa.float16(),
    torch.bfloat16: pa.uint16(),
    torch.float32: pa.float32(),
    torch.int8: pa.int8(),
    torch.uint8: pa.uint8(),
}
# What reading a damaged Arrow file can raise.
UNREADABLE = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    SystemError,
    RuntimeError,
    AttributeError,
    MemoryError,
    pa.ArrowException,
)


@dataclass(frozen=True)
class Rows:
    """Rows to be written: ids, float sketches [rows, d], losses, and metadata columns by name (None = missing).

    ``left_out`` says by position why a row has no sketch; its loss is NaN. ``digest``: hash of the data behind them.
    """

    ids: Sequence[str]
    sketches: Float[Tensor, "rows d"]
    losses: Float[Tensor, " rows"]
    columns: Mapping[str, Sequence[Any]]
    left_out: Mapping[int, str] = field(default_factory=dict)
    digest: str = ""
    tokens: Float[Tensor, " rows"] | None = None  # of each row; NaN where nobody counted


@dataclass(frozen=True)
class Shard:
    """A shard opened for reading. ``sketches`` and ``scale`` are views of the mapped file: do not write to them.

    ``columns`` gives the kind of each metadata column, ``left_out`` by position why a row has no sketch, and ``digest``
    a hash of the data that the rows were made of.
    """

    name: str
    start: int
    count: int
    batch: pa.RecordBatch
    columns: Mapping[str, str]
    left_out: Mapping[int, str]
    digest: str
    d: int
    dtype: str
    sketches: Shaped[Tensor, "rows width"]
    scale: Float[Tensor, " rows"]

    def decoded(self, rows: slice | list[int] | Tensor = slice(None)) -> Float[Tensor, "rows d"]:
        """Return sketches in float32; ``rows`` count from the shard's first."""
        return decode(self.sketches[rows], self.scale[rows], self.d, self.dtype)

    def numbers(self, name: str) -> Float[Tensor, " rows"]:
        """Return ``gradient_norm``, ``loss`` or ``tokens``."""
        return _view(self.batch.column(name).buffers()[1], torch.float32, self.count)

    def column(self, name: str) -> list[Any]:
        """Return the ids or a metadata column as Python values; None where a row, or the whole shard, has no value."""
        if name != "id" and name not in self.columns:
            return [None] * self.count
        values: list[Any] = self.batch.column(name).to_pylist()
        return [self._parsed(v) for v in values] if self.columns.get(name) == "json" else values

    def record(self, position: int) -> dict[str, Any]:
        """Return id, loss, gradient_norm and the metadata of one row; ``position`` counts from the shard's first."""
        wanted = ["id", "loss", "gradient_norm", *self.columns]
        values = {name: self.batch.column(name)[position].as_py() for name in wanted}
        for name, kind in self.columns.items():
            if kind == "json":
                values[name] = self._parsed(values[name])
        return values

    def _parsed(self, text: str | None) -> Any:
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _broken(self.name, f"{type(error).__name__}: {error}") from error


def encode_shard(rows: Rows, start: int, manifest: Manifest) -> pa.Buffer:
    """Return the bytes of a shard.

    Raises:
        InputError: the parts disagree in length, or a metadata column has a reserved name or a value that no column
            can hold.
        NonFiniteError: a sketch holds a NaN or an infinity.
    """
    count = len(rows.ids)
    lengths = {len(rows.sketches), len(rows.losses), *(len(column) for column in rows.columns.values())}
    if lengths != {count} or rows.sketches.shape[1] != manifest.d:
        raise InputError(
            f"{count} ids, sketches {list(rows.sketches.shape)}, columns {sorted(rows.columns)}",
            f"as many of each, sketches of length {manifest.d}",
            "Pass one entry a row in every part",
        )
    reserved = sorted(set(rows.columns) & set(RESERVED))
    if reserved:
        raise InputError(
            f"a metadata column {reserved[0]!r}",
            f"a name other than {', '.join(RESERVED)}",
            "Rename the column in your data",
        )
    kinds = {name: kind_of(values) for name, values in rows.columns.items()}
    stored, scale = encode(rows.sketches, manifest.dtype)
    losses = rows.losses.detach().to("cpu", torch.float32)
    tokens = (
        torch.full_like(losses, torch.nan) if rows.tokens is None else rows.tokens.detach().to("cpu", torch.float32)
    )
    norms = torch.linalg.vector_norm(rows.sketches.detach().to("cpu", torch.float64), dim=-1).float()
    norms = torch.where(torch.isfinite(losses), norms, torch.nan)  # a row that was skipped
    arrays: dict[str, pa.Array] = {
        "id": pa.array([str(i) for i in rows.ids], COLUMN_TYPES["string"]),
        "sketch": _vectors(stored),
        "scale": _floats(scale),
        "gradient_norm": _floats(norms),
        "loss": _floats(losses),
        "tokens": _floats(tokens),
        **{name: _metadata(name, kind, rows.columns[name]) for name, kind in kinds.items()},
    }
    header = {
        "format": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "start": start,
        "count": count,
        "dtype": manifest.dtype,
        "columns": kinds,
        "left_out": {str(position): reason for position, reason in sorted(rows.left_out.items())},
        "data": rows.digest,
        "crc32": {name: _column_checksums(name, array) for name, array in arrays.items()},
    }
    metadata = {_HEADER: json.dumps(header).encode(), b"checksum": _CRC_MARK + _CRC_BLANK}
    fields = [
        pa.field(n, a.type, metadata={"dtype": manifest.dtype} if n == "sketch" else None) for n, a in arrays.items()
    ]
    schema = pa.schema(fields, metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(arrays.values()), schema=schema))
    return _sealed(sink.getvalue())


def require_sound(data: pa.Buffer, name: str) -> None:
    """Check that a shard's bytes are those that were written, and that no offset in them leads out of the file.

    A checksum says nothing of a file whose author made it to do harm, so that the structure is checked as well.

    Raises:
        DamageError: they are not.
    """
    if data.size == 0:
        raise _broken(name, "it is empty")
    if _file_checksum(data) != _stored_checksum(data):
        raise _broken(name, "its checksum does not match")
    try:
        require_plain(data)
        pa.ipc.open_file(data).get_batch(0).validate(full=True)
    except UNREADABLE as error:
        raise _broken(name, f"{type(error).__name__}: {error}") from error


def open_shard(data: pa.Buffer, name: str, start: int, count: int, manifest: Manifest) -> Shard:
    """Open a shard's bytes, which ``require_sound`` has checked, without copying them.

    Raises:
        DamageError: the bytes are no such shard.
        FingerprintError: the shard belongs to another store.
    """
    try:
        reader = pa.ipc.open_file(data)
        header = json.loads(reader.schema.metadata[_HEADER])
        batch = reader.get_batch(0)
        vectors = batch.column("sketch")
        sound = header["start"] == start and header["count"] == count == batch.num_rows
        columns, left_out = header["columns"], {int(at): str(why) for at, why in header["left_out"].items()}
        sound = sound and header["dtype"] == manifest.dtype and _types(batch) == _expected_types(manifest, columns)
        sound = sound and isinstance(header["data"], str) and all(0 <= position < count for position in left_out)
        fingerprint = header["fingerprint"]
        width = stored_width(manifest.d, manifest.dtype)
        sketches = _view(vectors.values.buffers()[1], stored_type(manifest.dtype), count * width)
        scale = _view(batch.column("scale").buffers()[1], torch.float32, count)
    except UNREADABLE as error:
        raise _broken(name, f"{type(error).__name__}: {error}") from error
    if fingerprint != manifest.fingerprint:
        raise FingerprintError(
            f"{name} has fingerprint {fingerprint}",
            f"{manifest.fingerprint}, that of the index it lies in",
            "Remove the file and run the same build command again",
        )
    if not sound:
        raise _broken(name, "its header and its rows do not agree")
    sketches, digest = sketches.view(count, width), header["data"]
    return Shard(name, start, count, batch, columns, left_out, digest, manifest.d, manifest.dtype, sketches, scale)


def damage(data: pa.Buffer, name: str, start: int, count: int, manifest: Manifest) -> list[str]:
    """Return what is wrong with a shard's bytes, each to within 64 rows where it is a sketch; empty where sound."""
    if data.size == 0 or _file_checksum(data) == _stored_checksum(data):
        try:
            require_sound(data, name)
            open_shard(data, name, start, count, manifest)
        except (StoreError, FingerprintError) as error:
            return [error.came]
        return []
    try:
        require_plain(data)
        reader = pa.ipc.open_file(data)
        expected = json.loads(reader.schema.metadata[_HEADER])["crc32"]
        batch = reader.get_batch(0)
        found = [
            _place(column, block, start, count)
            for column in batch.schema.names
            for block, crc in enumerate(_column_checksums(column, batch.column(column)))
            if expected[column][block] != crc
        ]
    except UNREADABLE as error:
        return [f"the file's structure, rows {start}–{start + count - 1} ({type(error).__name__})"]
    return found or [f"the file's header, padding or footer, rows {start}–{start + count - 1}"]


def _place(column: str, block: int, start: int, count: int) -> str:
    if column != "sketch":
        return f"column {column!r}, rows {start}–{start + count - 1}"
    first = start + block * CHECKSUM_ROWS
    return f"column 'sketch', rows {first}–{min(first + CHECKSUM_ROWS, start + count) - 1}"


def _types(batch: pa.RecordBatch) -> list[tuple[str, pa.DataType]]:
    return sorted(((field.name, field.type) for field in batch.schema), key=itemgetter(0))


def _expected_types(manifest: Manifest, columns: Mapping[str, str]) -> list[tuple[str, pa.DataType]]:
    numbers = dict.fromkeys(("scale", "gradient_norm", "loss", "tokens"), pa.float32())
    metadata = {name: COLUMN_TYPES[kind] for name, kind in columns.items()}
    sketch = pa.list_(_NUMBERS[stored_type(manifest.dtype)], stored_width(manifest.d, manifest.dtype))
    types = {"id": COLUMN_TYPES["string"], "sketch": sketch, **numbers, **metadata}
    return sorted(types.items(), key=itemgetter(0))


def _vectors(stored: Shaped[Tensor, "rows width"]) -> pa.Array:
    width = stored.shape[1]
    array = stored.contiguous().view(torch.uint16 if stored.dtype == torch.bfloat16 else stored.dtype).numpy()
    kind = pa.from_numpy_dtype(array.dtype)
    values = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(array)])
    return pa.FixedSizeListArray.from_arrays(values, width)


def _floats(values: Float[Tensor, " rows"]) -> pa.Array:
    array = values.contiguous().numpy()
    return pa.Array.from_buffers(pa.float32(), array.size, [None, pa.py_buffer(array)])


def _metadata(name: str, kind: str, values: Sequence[Any]) -> pa.Array:
    if kind == "json":
        values = [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values]
    try:
        return pa.array(values, COLUMN_TYPES[kind])
    except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError) as error:
        raise InputError(
            f"a value of metadata column {name!r} that cannot be stored ({error})",
            "text in UTF-8, numbers, or JSON made of them",
            "Correct the data, or leave the column out",
        ) from error


def _column_checksums(name: str, array: pa.Array) -> list[int]:
    if name == "sketch":
        data = memoryview(array.values.buffers()[1])
        step = CHECKSUM_ROWS * array.type.list_size * array.type.value_type.bit_width // 8
        return [zlib.crc32(data[i : i + step]) for i in range(0, len(data), step)]
    checksum = 0
    for buffer in array.buffers():
        checksum = zlib.crc32(buffer, checksum) if buffer is not None else checksum
    return [checksum]


def _checksum_places(data: pa.Buffer) -> list[int]:
    """Offsets of the file checksum's digits, which the schema carries at both ends of the file."""
    view = np.frombuffer(data, np.uint8)
    head, tail = view[: 1 << 20].tobytes(), view[-(1 << 20) :].tobytes()
    places = {head.find(_CRC_MARK), len(view) - len(tail) + tail.rfind(_CRC_MARK)}
    return sorted(place + len(_CRC_MARK) for place in places)


def _pieces(data: pa.Buffer) -> Iterator[memoryview]:
    """The file without the digits of its checksum."""
    view, last = memoryview(data), 0
    for place in _checksum_places(data):
        yield view[last:place]
        last = place + len(_CRC_BLANK)
    yield view[last:]


def _file_checksum(data: pa.Buffer) -> bytes:
    checksum = 0
    for piece in _pieces(data):
        checksum = zlib.crc32(piece, checksum)
    return b"%08x" % checksum


def _stored_checksum(data: pa.Buffer) -> bytes:
    """The digits, or nothing where the two copies differ."""
    view = memoryview(data)
    copies = {bytes(view[place : place + len(_CRC_BLANK)]) for place in _checksum_places(data)}
    return copies.pop() if len(copies) == 1 else b""


def _sealed(data: pa.Buffer) -> pa.Buffer:
    """Return the bytes with the file checksum filled in."""
    digits = _file_checksum(data)
    array = np.frombuffer(data, np.uint8).copy()
    for place in _checksum_places(data):
        array[place : place + len(digits)] = np.frombuffer(digits, np.uint8)
    return pa.py_buffer(array)


def _view(buffer: pa.Buffer, dtype: torch.dtype, count: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    with warnings.catch_warnings():
        # The mapping is read-only; Shard says so to its readers, and nothing here writes.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memoryview(buffer), dtype=dtype, count=count)


def _broken(name: str, why: str) -> DamageError:
    return DamageError(
        f"{name} is damaged ({why})",
        "a whole shard of this index",
        "Run the command that built the index again: it makes damaged rows anew (or type gradsketch verify --repair)",
    )
