"""FFD: the transpose of Fastfood."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.forms import power_of_two_at_least
from gradsketch.sketches.recipe import register
from gradsketch.transforms.diagonal import Normals, Signs
from gradsketch.transforms.hadamard import Hadamard
from gradsketch.transforms.pieces import Piece, pieces

__all__ = ["FFD"]


@register
class FFD(Sketch):
    """The transpose of n/d stacked Fastfood blocks H · G · Π · H · B of size d, each with its own B, Π and G.

    A baseline, and not a sketch for every input: a vector that is constant on one block of d coordinates gets the
    squared norm g² with g one normal, whatever d is ([P], Theorem 3.1), because nothing mixes it before G acts. The
    permutations are kept once drawn (n 32-bit numbers a device).

    Source: Le, Sarlós and Smola, "Fastfood", ICML 2013; [P] §3.

    Example:
        >>> phi = gs.FFD(1 << 16, 1024)
        >>> phi(torch.ones(1 << 16)).shape
        torch.Size([1024])

    Raises:
        InputError: d is not a power of two; or n or d is not allowed.
    """

    def __init__(self, n: int, d: int, *, seed: int = 0) -> None:
        super().__init__(n, d, seed=seed)
        if d & (d - 1):
            above = power_of_two_at_least(d)
            nearest = f"d={above // 2}" + (f" or d={above}" if above <= n else "")
            raise InputError(f"FFD with d={d}", "a power of two", f"Type {nearest}")
        padded = -(-n // d) * d
        self._signs = Signs(self.stream.child("B"), max(padded, 32))
        self._normals = Normals(self.stream.child("G"))
        self._kept: dict[torch.device, Int32[Tensor, "blocks d"]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}  # copies and pickles redraw

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        out = x.new_zeros(len(x), self.d, dtype=widened(x.dtype))
        transform = Hadamard(self.d)
        for piece in pieces(x.shape, self.d, x.device):
            part = out.new_zeros(piece.count, piece.padded)
            part[:, : piece.stop - piece.start] = piece.of(x)
            transform.apply_(part.view(-1, self.d))
            self._normals.multiply(part, piece.start, part)
            order = self._permutations(piece, x.device).expand(piece.count, -1, -1)
            part = torch.empty_like(part).view(order.shape).scatter_(-1, order, part.view(order.shape))
            part = transform.apply_(part).view(piece.count, piece.padded)
            self._signs.multiply(part, piece.start, part)
            for block in part.view(order.shape).unbind(1):
                out[piece.rows] += block
        return out

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        out = w.new_empty(len(w), self.n, dtype=widened(w.dtype))
        transform = Hadamard(self.d)
        for piece in pieces(out.shape, self.d, w.device):
            order = self._permutations(piece, w.device).expand(piece.count, -1, -1)
            part = out.new_empty(piece.count, piece.padded)
            part.view(order.shape).copy_(w[piece.rows, None])
            self._signs.multiply(part, piece.start, part)
            part = transform.apply_(part.view(order.shape)).gather(-1, order).view(piece.count, piece.padded)
            self._normals.multiply(part, piece.start, part)
            transform.apply_(part.view(order.shape))
            piece.of(out).copy_(part[:, : piece.stop - piece.start])
        return out

    def _permutations(self, piece: Piece, device: torch.device) -> Int64[Tensor, "blocks d"]:
        """Return the permutations of a piece's blocks: place i of a permuted block holds entry order[i]."""
        if device not in self._kept:
            blocks = -(-self.n // self.d)
            self._kept[device] = torch.empty(blocks, self.d, dtype=torch.int32, device=device)
            stream = self.stream.child("Pi")
            for each in pieces((1, blocks * self.d), self.d, device):
                keys = stream.words(2 * each.start, 2 * each.padded, device).view(torch.int64).view(-1, self.d)
                self._kept[device][each.start // self.d : each.stop // self.d] = torch.argsort(keys, stable=True)
        return self._kept[device][piece.start // self.d : -(-piece.stop // self.d)].to(torch.int64)
