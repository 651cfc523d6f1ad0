"""Rows of Parquet and Arrow files, read a record batch at a time: of a file of any size one batch is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.ipc
import pyarrow.parquet

from gradsketch.errors import InputError
from gradsketch.reading.blocks import Block, BlockRows
from gradsketch.reading.rows import Row, bad_row
from gradsketch.reading.sources import Source, whole

__all__ = ["arrow", "parquet", "python_rows"]

_BATCH = 256  # rows of a Parquet file that are decoded together; one may be a document
_BUFFER = 1 << 20
_ARROW_MAGIC = b"ARROW1"


class _Batch(Block):
    """A record batch."""

    def __init__(self, source: Source, batch: pa.RecordBatch, first: int) -> None:
        self.first, self.count, self.nbytes = first, batch.num_rows, batch.nbytes
        self._source, self._batch = source, batch

    def rows(self, start: int, stop: int) -> list[Row | InputError]:
        try:
            return list(python_rows(self._batch.slice(start, stop - start)))
        except (ValueError, pa.ArrowException):  # a row among them is bad: which one shows alone
            return [self._alone(j) for j in range(start, stop)]

    def _alone(self, j: int) -> Row | InputError:
        try:
            (row,) = python_rows(self._batch.slice(j, 1))
        except (ValueError, pa.ArrowException) as error:
            return bad_row(self.place(j), error)
        return row

    def place(self, j: int) -> str:
        return f"{self._source.name}, row {self.first + j + 1}"


class _Parquet(BlockRows):
    """Rows of a Parquet file; reading can begin at any of its row groups, and goes through it page by page."""

    def blocks(self, restart: int) -> Iterator[Block]:
        first = int(self.restarts[restart])
        with self.source.open() as raw:
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)
            for group in range(restart, file.num_row_groups):  # one by one: a batch of two would be lost with either
                for batch in file.iter_batches(_BATCH, row_groups=[group], use_threads=False):
                    yield _Batch(self.source, batch, first)
                    first += batch.num_rows


class _ArrowFile(BlockRows):
    """Rows of an Arrow file with a footer, which says where each batch lies."""

    def blocks(self, restart: int) -> Iterator[Block]:
        with _mapped(self.source) as raw, pyarrow.ipc.open_file(raw) as reader:
            for k in range(restart, reader.num_record_batches):
                yield _Batch(self.source, reader.get_batch(k), int(self.restarts[k]))


class _ArrowStream(BlockRows):
    """Rows of an Arrow stream, as ``datasets`` writes, which can only be read from its beginning."""

    def blocks(self, restart: int) -> Iterator[Block]:
        first = 0
        with _mapped(self.source) as raw, pyarrow.ipc.open_stream(raw) as reader:
            for batch in reader:
                yield _Batch(self.source, batch, first)
                first += batch.num_rows


def parquet(source: Source) -> BlockRows:
    """Open a Parquet file by its footer.

    Raises:
        InputError: it is none, is damaged, or has two columns of one name.
    """

    def footer() -> tuple[list[int], list[str]]:
        with source.open() as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            found = file.metadata
            return [found.row_group(k).num_rows for k in range(found.num_row_groups)], file.schema_arrow.names

    sizes, names = whole(source.name, footer)
    return _Parquet(source, sum(sizes), _starts(source, sizes, names))


def arrow(source: Source) -> BlockRows:
    """Open an Arrow file, also a feather file, or a stream.

    Raises:
        InputError: it is none, is damaged, or has two columns of one name.
    """
    kind = whole(source.name, lambda: _kind(source))
    sizes, names = whole(source.name, lambda: _batches(source, kind))
    starts = _starts(source, sizes, names)
    return kind(source, sum(sizes), starts if kind is _ArrowFile else starts[:1])


def _kind(source: Source) -> type[_ArrowFile | _ArrowStream]:
    with source.open() as raw:
        return _ArrowFile if raw.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC else _ArrowStream


def _batches(source: Source, kind: type[BlockRows]) -> tuple[list[int], list[str]]:
    """Return the rows of every batch, of which no more than one column is unpacked, and the names of the columns."""
    one = pyarrow.ipc.IpcReadOptions(included_fields=[0])
    with _mapped(source) as raw:
        if kind is _ArrowStream:
            sizes = [batch.num_rows for batch in pyarrow.ipc.open_stream(raw, options=one)]
            raw.seek(0)
            return sizes, pyarrow.ipc.open_stream(raw).schema.names
        reader = pyarrow.ipc.open_file(raw, options=one)
        return [reader.get_batch(k).num_rows for k in range(reader.num_record_batches)], reader.schema.names


def _mapped(source: Source) -> Any:
    """Open a file so that what is passed over is not read, where that can be."""
    source.require_unchanged()
    is_local = isinstance(source.filesystem, pyarrow.fs.LocalFileSystem)
    return pa.memory_map(source.path) if is_local else source.open()


def _starts(source: Source, sizes: list[int], names: list[str]) -> np.ndarray:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{source.name} with two columns called {twice!r}", "one of each name", "Rename one of them")
    return np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])[: max(1, len(sizes))]


def python_rows(batch: pa.RecordBatch) -> list[Row]:
    """Return a batch as dicts; values that Python has no type for, such as the year 10,000, become texts."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, NotImplementedError):
        columns = [_values(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, NotImplementedError):
        return list(column.cast(pa.string()).to_pylist())
