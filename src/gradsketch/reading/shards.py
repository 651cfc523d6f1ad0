"""Many files as one sequence of rows, in the order of their names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsketch.errors import InputError
from gradsketch.reading.rows import FileRows, Row

__all__ = ["Shards"]


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

    def facts(self) -> dict[str, str | int]:
        return {name: fact for shard in self._shards for name, fact in shard.facts().items()}

    def release(self) -> None:
        self._shards[self._last].release()

    def _at(self, i: int) -> tuple[FileRows, int]:
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        if number != self._last:
            self.release()
            self._last = number
        return self._shards[number], i - int(self._starts[number])
