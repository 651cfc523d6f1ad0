"""Cut a batch of long vectors into pieces that stay in a processor's cache while several passes are made over them.

This is what makes plain torch operations run at the speed of the cache and not of the memory: see "pieces" in
benchmarks/transform_speed.py. A numba kernel that fused signs, transform and fold was slower, so no compiled extension
earns its place on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["Piece", "Scratch", "piece_length", "pieces"]

_PIECE, _PIECE_GPU = 1 << 18, 1 << 23


def piece_length(device: torch.device) -> int:
    """Return how many numbers a piece holds at most, a power of two."""
    return _PIECE if device.type == "cpu" else _PIECE_GPU


@dataclass(frozen=True)
class Piece:
    """Entries ``start … stop-1`` of some rows of a batch, to be zero-padded to ``padded`` entries."""

    rows: slice
    start: int
    stop: int
    padded: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)

    def of(self, batch: Shaped[Tensor, "b n"]) -> Shaped[Tensor, "count length"]:
        """Return this piece of a batch, a view."""
        return batch[self.rows, self.start : self.stop]


def pieces(shape: Sequence[int], multiple: int, device: torch.device) -> Iterator[Piece]:
    """Yield pieces covering a batch [b, n], each padded to a multiple of ``multiple`` (a power of two).

    Long vectors are cut, short ones are taken several at a time. Where a vector is cut depends on n and the device
    only, never on the batch, so results do not either.
    """
    b, n = shape
    longest = max(piece_length(device), multiple)
    together = max(1, longest // _round_up(n, multiple))
    for first in range(0, b, together):
        rows = slice(first, min(first + together, b))
        for start in range(0, n, longest):
            stop = min(start + longest, n)
            yield Piece(rows, start, stop, _round_up(stop - start, multiple))


class Scratch:
    """Two flat buffers, as long as the longest piece, that the passes over a piece write to in turn."""

    def __init__(self, shape: Sequence[int], multiple: int, dtype: torch.dtype, device: torch.device) -> None:
        b, n = shape
        padded = _round_up(n, multiple)
        length = min(max(piece_length(device), multiple, padded), b * padded)
        self._buffers = [torch.empty(length, dtype=dtype, device=device) for _ in range(2)]

    def views(self, piece: Piece) -> list[Tensor]:
        """Return the buffers shaped ``[rows, padded]`` for a piece."""
        return [buffer[: piece.count * piece.padded].view(piece.count, piece.padded) for buffer in self._buffers]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
