"""Many files as one sequence of rows, in the order of their names, with what their folders say of them."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from gradsketch.errors import InputError
from gradsketch.reading.rows import FileRows, Row

__all__ = ["Shards", "with_folders"]


class Shards(FileRows):
    """The rows of several files, one after another; only the file that was read last is held open."""

    def __init__(self, path: str, shards: Sequence[FileRows]) -> None:
        super().__init__(path)
        self._shards = shards
        self._starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])
        self._last = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> Row:
        shard, place = self._at(i)
        return shard.read(place)

    def read_range(self, start: int, stop: int) -> list[Row | InputError]:
        rows: list[Row | InputError] = []
        while (i := start + len(rows)) < stop:
            shard, place = self._at(i)
            rows += shard.read_range(place, min(len(shard), place + stop - i))
        return rows

    def where(self, i: int) -> str:
        shard, place = self._at(i)
        return shard.where(place)

    def release(self) -> None:
        self._shards[self._last].release()

    def _at(self, i: int) -> tuple[FileRows, int]:
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        if number != self._last:
            self.release()
            self._last = number
        return self._shards[number], i - int(self._starts[number])


class _Partition(FileRows):
    """The rows of a file with the columns that its folders are named after, as Spark and Hive write them."""

    def __init__(self, rows: FileRows, columns: dict[str, str]) -> None:
        super().__init__(rows.path)
        self._rows, self._columns = rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> Row:
        return self._columns | self._rows.read(i)

    def read_range(self, start: int, stop: int) -> list[Row | InputError]:
        rows = self._rows.read_range(start, stop)
        return [row if isinstance(row, InputError) else self._columns | row for row in rows]

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def release(self) -> None:
        self._rows.release()


def with_folders(rows: FileRows, name: str) -> FileRows:
    """Return the rows of a file, with ``year: "2020"`` in each where its name has a folder ``year=2020``."""
    pairs = [part.partition("=") for part in PurePosixPath(name).parts[:-1]]
    columns = {key: urllib.parse.unquote(value) for key, equals, value in pairs if key and equals}
    return _Partition(rows, columns) if columns else rows
