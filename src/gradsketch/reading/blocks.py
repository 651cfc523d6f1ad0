"""Rows that are read block by block, forward: one block is held, and reading goes on behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from gradsketch.errors import InputError
from gradsketch.reading.rows import FileRows, Row, bad_row
from gradsketch.reading.sources import READ_ERRORS, Source

__all__ = ["Block", "BlockRows"]


class Block(ABC):
    """Some rows that follow one another, parsed when asked for."""

    first: int
    count: int

    @abstractmethod
    def rows(self, start: int, stop: int) -> list[Row | InputError]:
        """Return rows start … stop - 1 of the block."""

    @abstractmethod
    def place(self, j: int) -> str:
        """Return where row j of the block stands."""


class BlockRows(FileRows):
    """Rows of one file, whose blocks come in order from any of the rows in ``restarts``, the first of which is 0.

    Nothing is held but the block that was read last and the open file behind it.
    """

    def __init__(self, source: Source, count: int, restarts: np.ndarray) -> None:
        super().__init__(source.name)
        self.source, self.restarts, self._count = source, restarts, count
        self._held: Block | None = None
        self._ahead: Iterator[Block] | None = None

    @abstractmethod
    def blocks(self, restart: int) -> Iterator[Block]:
        """Yield the blocks from the row ``restarts[restart]`` on."""

    def __len__(self) -> int:
        return self._count

    def read(self, i: int) -> Row:
        (row,) = self.read_range(i, i + 1)
        if isinstance(row, InputError):
            raise row
        return row

    def read_range(self, start: int, stop: int) -> list[Row | InputError]:
        rows: list[Row | InputError] = []
        while (i := start + len(rows)) < stop:
            try:
                block = self.block(i)
            except READ_ERRORS as error:  # nothing is known of the rows up to the next place where reading can begin
                self.release()
                end = min(stop, self._next_restart(i))
                rows += [bad_row(self._place(j), error) for j in range(i, end)]
            else:
                rows += block.rows(i - block.first, min(stop - block.first, block.count))
        return rows

    def where(self, i: int) -> str:
        return self._place(i)

    def _place(self, i: int) -> str:
        return f"{self.source.name}, row {i + 1}"

    def facts(self) -> dict[str, str | int]:
        return {self.source.name: self.source.facts()}

    def release(self) -> None:
        self._held = self._ahead = None

    def block(self, i: int) -> Block:
        """Return the block that holds row i: the one at hand, one further on, or one read from the nearest restart."""
        held = self._held
        if held is not None and held.first <= i < held.first + held.count:
            return held
        restart = int(np.searchsorted(self.restarts, i, "right")) - 1
        behind = held is None or i < held.first or self.restarts[restart] > held.first + held.count
        if behind or self._ahead is None:
            self._ahead = self.blocks(restart)
        for block in self._ahead:
            self._held = block
            if i < block.first + block.count:
                return block
        self.release()
        raise ValueError(f"the file ends before row {i + 1}: it has changed since it was opened")

    def _next_restart(self, i: int) -> int:
        after = int(np.searchsorted(self.restarts, i, "right"))
        return int(self.restarts[after]) if after < len(self.restarts) else self._count
