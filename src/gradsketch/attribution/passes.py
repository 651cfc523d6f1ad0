"""One pass over the shards of an index, in parts that any process may do.

The parts do not depend on who does them, and what they give comes back in order. So sums are added in one order, and
the tasks of a cluster give the bits that this process gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

__all__ = ["SHARDS_A_SCAN", "SHARDS_A_SUM", "Each", "Part", "here", "parts_of"]

# A scan gives back a few numbers, so that its parts may be small: 128 MB of sketches, a tenth of a second.
SHARDS_A_SCAN = 8
# A sum over rows gives back a matrix as large as several shards, and one part of it takes a minute.
SHARDS_A_SUM = 64

Part = Sequence[tuple[int, int]]  # first row and rows of some shards, in order
T = TypeVar("T")


@runtime_checkable
class Each(Protocol):
    """Whoever does a pass: yields what ``work`` gives for each part, in order. ``work`` can be pickled."""

    def __call__(self, work: Callable[[Part], T], parts: Sequence[Part], /) -> Iterator[T]: ...


def here(work: Callable[[Part], T], parts: Sequence[Part], /) -> Iterator[T]:
    """Do each part in this process, when its turn comes."""
    return map(work, parts)


def parts_of(ranges: Part, shards: int = SHARDS_A_SCAN) -> list[Part]:
    """Return the shards in parts of so many.

    Example:
        >>> parts_of([(0, 4), (4, 4), (8, 2)], 2)
        [[(0, 4), (4, 4)], [(8, 2)]]
    """
    return [ranges[at : at + shards] for at in range(0, len(ranges), shards)]
