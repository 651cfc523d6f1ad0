"""Diagonal matrices of random signs or normals, applied piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from gradsketch.random import Stream

__all__ = ["SIGNS_AT_ONCE", "Diagonal", "Normals", "Signs"]

# The bits of a word; a stretch of signs begins at a multiple of it.
SIGNS_AT_ONCE = 32

_SIGN_BIT = {torch.float32: (torch.int32, -(1 << 31)), torch.float64: (torch.int64, -(1 << 63))}


class Diagonal(ABC):
    """A random diagonal matrix with E[D²] = I that can multiply any stretch of a vector."""

    @abstractmethod
    def multiply(self, x: Float[Tensor, "b m"], start: int, out: Float[Tensor, "b m"]) -> None:
        """Write entries ``start … start+m-1`` of D·x, given those of x, into ``out`` (which may be x itself)."""


class Signs(Diagonal):
    """±1 on the diagonal, held as packed bits once used (n/8 bytes a device): redrawing costs more than reading.

    Stretches are drawn one by one, so that of ranks that share out a vector each holds its own alone.
    """

    def __init__(self, stream: Stream, n: int) -> None:
        self.stream, self._words_needed = stream, -(-n // SIGNS_AT_ONCE)
        self._words: dict[tuple[torch.device, int, int], Int32[Tensor, " w"]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_words": {}}  # copies and pickles redraw

    def multiply(self, x: Float[Tensor, "b m"], start: int, out: Float[Tensor, "b m"]) -> None:
        """Flip the sign bit of the entries whose random bit is set; ``start`` is a multiple of 32."""
        integer, sign_bit = _SIGN_BIT[out.dtype]
        words = self._packed(x.device, start // SIGNS_AT_ONCE, -(-(start + x.shape[-1]) // SIGNS_AT_ONCE)).to(integer)
        top = 31 if integer is torch.int32 else 63
        shifts = top - torch.arange(SIGNS_AT_ONCE, dtype=integer, device=x.device)
        flips = (words[:, None] << shifts).bitwise_and_(sign_bit).view(-1)[: x.shape[-1]]
        torch.bitwise_xor(x.to(out.dtype).view(integer), flips, out=out.view(integer))

    def _packed(self, device: torch.device, first: int, end: int) -> Int32[Tensor, " w"]:
        key = device, first, min(end, self._words_needed)
        if key not in self._words:
            self._words[key] = self.stream.words(first, key[2] - first, device)
        return self._words[key]


class Normals(Diagonal):
    """Standard normals on the diagonal, redrawn whenever they are used: keeping them would cost n numbers."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def multiply(self, x: Float[Tensor, "b m"], start: int, out: Float[Tensor, "b m"]) -> None:
        """Multiply by normals ``start … start+m-1`` of the stream."""
        torch.mul(x, self._stream.normals(start, x.shape[-1], dtype=out.dtype, device=x.device), out=out)
