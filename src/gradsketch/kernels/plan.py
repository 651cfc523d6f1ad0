"""How a vector is cut into programs: whole numbers only, and the same on every device and for every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["BLOCK", "COLUMNS", "FoldPlan", "Rounds", "row_slices"]

BLOCK = 4096  # numbers of a block
COLUMNS = 32  # sums that one program of ``add_rows`` makes
# Programs of a fold. 1056 are four waves of two on each of the 132 multiprocessors of an H100; a constant, because
# the order of additions must not depend on the device.
_PROGRAMS = 1056
_MOST_ROWS = 65535  # programs along the second axis of a grid
_PARTIAL_BYTES = 1 << 28


@dataclass(frozen=True)
class Rounds:
    """How many blocks a program takes at a time: so many that every thread draws one Philox counter."""

    blocks: int = 4
    signs: int = 8
    terms: int = 64


@dataclass(frozen=True)
class FoldPlan:
    """Blocks j, j + classes, j + 2·classes … end in class j of the folded vector; ``splits`` programs share them.

    ``width`` is the length of the folded vector, a power of two. Where it is shorter than a block there is one class
    of a whole block, which is folded on itself when the partial sums are added up.
    """

    n: int
    width: int
    classes: int
    splits: int

    @classmethod
    def of(cls, n: int, width: int, together: int) -> FoldPlan:
        """Return the plan for vectors of length n, whose programs take ``together`` blocks a round."""
        classes = max(1, width // BLOCK)
        rounds = -(-n // (BLOCK * classes * together))
        return cls(n, width, classes, max(1, min(rounds, _PROGRAMS // classes)))

    @property
    def partial(self) -> int:
        """Numbers of all partial sums of one vector."""
        return self.splits * self.classes * BLOCK

    @property
    def terms(self) -> int:
        """Partial sums that each number of the folded vector is made of."""
        return self.partial // self.width

    @property
    def programs(self) -> int:
        """Programs a vector."""
        return self.classes * self.splits


def row_slices(count: int, bytes_a_row: int) -> Iterator[slice]:
    """Yield runs of rows, so that a grid and the memory for partial sums stay within bounds.

    Runs begin at multiples of 16, so that memory that is aligned for the first is so for all.
    """
    step = max(16, min(_MOST_ROWS, _PARTIAL_BYTES // bytes_a_row) // 16 * 16)
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))
