"""Where the rows of a text file begin: found in one pass over its bytes, and kept once in many rows.

A mark is three numbers in 128 rows or a megabyte, so that 10^8 lines take 20 MB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["Marker", "Marks", "mark_lines", "newlines", "not_blank"]

_ROWS = 128
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(b" \t\n\r\x0b\x0c")] = True


@dataclass(frozen=True)
class Marks:
    """Some rows of a text file, with the byte and the line at which each begins; and how many rows and bytes it has."""

    rows: np.ndarray
    starts: np.ndarray
    lines: np.ndarray
    count: int
    size: int

    def span(self, mark: int) -> tuple[int, int]:
        """Return the first byte of a mark, and the first byte of the next."""
        stop = self.starts[mark + 1] if mark + 1 < len(self.starts) else self.size
        return int(self.starts[mark]), int(stop)

    def rows_of(self, mark: int) -> int:
        """Return how many rows begin between a mark and the next."""
        return int((self.rows[mark + 1] if mark + 1 < len(self.rows) else self.count) - self.rows[mark])


class Marker:
    """Collects marks: one in so many rows, and one for each call of ``add``."""

    def __init__(self) -> None:
        self._count, self._kept = 0, [np.zeros((3, 0), dtype=np.int64)]

    def add(self, starts: np.ndarray, lines: np.ndarray) -> None:
        """Add rows by the byte and the line at which each begins."""
        rows = np.arange(self._count, self._count + len(starts))
        chosen = rows % _ROWS == 0
        chosen[:1] = True
        self._kept.append(np.stack([rows[chosen], starts[chosen], lines[chosen]]))
        self._count += len(rows)

    def marks(self, size: int) -> Marks:
        """Return the marks of a file of so many bytes."""
        rows, starts, lines = np.concatenate(self._kept, axis=1)
        return Marks(rows, starts, lines, self._count, size)


def mark_lines(pieces: Iterable[bytes]) -> Marks:
    """Mark the lines that are not blank; a line may go through many pieces, of which none is kept."""
    marker, size, line = Marker(), 0, 1
    begun, is_blank = 0, True  # the line that the piece before left unfinished
    for piece in pieces:
        ends = newlines(piece)
        first = piece if len(ends) == 0 else piece[: ends[0]]
        is_blank = is_blank and not first.strip()
        if len(ends):
            if not is_blank:  # apart from the others, so that a line of many pieces has a mark of its own
                marker.add(np.array([begun]), np.array([line]))
            starts, stops = ends[:-1] + 1, ends[1:]
            keep = not_blank(piece, starts, stops)
            marker.add(size + starts[keep], np.arange(line + 1, line + len(ends))[keep])
            line += len(ends)
            begun, is_blank = size + int(ends[-1]) + 1, not piece[ends[-1] + 1 :].strip()
        size += len(piece)
    if not is_blank:
        marker.add(np.array([begun]), np.array([line]))
    return marker.marks(size)


def newlines(data: bytes) -> np.ndarray:
    """Return the places of all line feeds."""
    return np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10)


def not_blank(data: bytes, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return which of the spans hold more than white space; only those that begin with some are looked through."""
    sound = starts < stops
    array = np.frombuffer(data, dtype=np.uint8)
    sound[sound] = ~_IS_SPACE[array[starts[sound]]]
    for i in np.flatnonzero(~sound):
        sound[i] = bool(data[starts[i] : stops[i]].strip())
    return sound
