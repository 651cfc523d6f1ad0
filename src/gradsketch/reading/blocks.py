"""Rows that are read block by block, forward: a few megabytes of blocks are kept, and reading goes on behind the last.

Who draws rows at random, as training does, reads a small file once, and a large one as often as it must be read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

import numpy as np

from gradsketch.errors import InputError
from gradsketch.reading.rows import FileRows, Row, bad_row, sound
from gradsketch.reading.sources import READ_ERRORS, Source

__all__ = ["Block", "BlockRows", "ParsedBlock"]

_KEPT_BYTES = 1 << 26


class Block(ABC):
    """Some rows that follow one another, parsed when asked for."""

    first: int
    count: int
    nbytes: int

    @abstractmethod
    def rows(self, start: int, stop: int) -> list[Row | InputError]:
        """Return rows start … stop - 1 of the block."""

    @abstractmethod
    def place(self, j: int) -> str:
        """Return where row j of the block stands."""


class ParsedBlock(Block):
    """A block whose rows are texts that are parsed one by one."""

    def rows(self, start: int, stop: int) -> list[Row | InputError]:
        return [self._row(j) for j in range(start, stop)]

    @abstractmethod
    def parsed(self, j: int) -> Row:
        """Return row j of the block.

        Raises:
            ValueError: it cannot be parsed.
            RecursionError: it is nested too deep.
        """

    def _row(self, j: int) -> Row | InputError:
        try:
            return self.parsed(j)
        except (ValueError, RecursionError) as error:
            return bad_row(self.place(j), error)


class BlockRows(FileRows):
    """Rows of one file, whose blocks come in order from any of the rows in ``restarts``, the first of which is 0.

    Nothing is held but some blocks that were read before and the open file behind the last of them.
    """

    def __init__(self, source: Source, count: int, restarts: np.ndarray) -> None:
        super().__init__(source.name)
        self.source, self.restarts, self._count = source, restarts, count
        self._kept = _Kept()
        self._last: Block | None = None
        self._ahead: Iterator[Block] | None = None

    @abstractmethod
    def blocks(self, restart: int) -> Iterator[Block]:
        """Yield the blocks from the row ``restarts[restart]`` on."""

    def __len__(self) -> int:
        return self._count

    def read(self, i: int) -> Row:
        (row,) = self.read_range(i, i + 1)
        found: Row = sound(row)
        return found

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

    def release(self) -> None:
        self._kept, self._last, self._ahead = _Kept(), None, None

    def block(self, i: int) -> Block:
        """Return the block that holds row i: one at hand, one further on, or one read from the nearest restart."""
        kept = self._kept.holding(i)
        if kept is not None:
            return kept
        restart, last = int(np.searchsorted(self.restarts, i, "right")) - 1, self._last
        is_behind = last is None or i < last.first + last.count or self.restarts[restart] > last.first + last.count
        if is_behind or self._ahead is None:
            self._ahead = self.blocks(restart)
        for block in self._ahead:
            self._last = block
            self._kept.add(block)
            if i < block.first + block.count:
                return block
        self.release()
        raise ValueError(f"the file ends before row {i + 1}: it has changed since it was opened")

    def _next_restart(self, i: int) -> int:
        after = int(np.searchsorted(self.restarts, i, "right"))
        return int(self.restarts[after]) if after < len(self.restarts) else self._count


class _Kept:
    """Blocks up to a bound of bytes, and always the one that came last; those that came first go first."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._firsts: list[int] = []
        self._bytes = 0

    def holding(self, i: int) -> Block | None:
        """Return the block that holds row i, if it is there."""
        place = bisect_right(self._firsts, i) - 1
        block = self._blocks[self._firsts[place]] if place >= 0 else None
        return block if block is not None and i < block.first + block.count else None

    def add(self, block: Block) -> None:
        """Keep a block."""
        if block.count == 0 or block.first in self._blocks:
            return
        self._blocks[block.first] = block
        insort(self._firsts, block.first)
        self._bytes += block.nbytes
        while self._bytes > _KEPT_BYTES and len(self._blocks) > 1:
            oldest = self._blocks.pop(next(iter(self._blocks)))
            self._firsts.pop(bisect_left(self._firsts, oldest.first))
            self._bytes -= oldest.nbytes
