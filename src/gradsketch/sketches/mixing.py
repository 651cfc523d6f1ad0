"""Mix the entries of long vectors and add up the blocks: the part of AFFD and AFJL that touches all n numbers.

Everything rests on one identity: the first d rows of H_n are, up to scale, H_d after adding up the n/d contiguous
blocks of length d, R_d H_n = √(d/n) · H_d · fold_d. A sketch that ends in R_d H_n therefore never makes the second
transform of length n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.transforms.diagonal import Diagonal, Signs
from gradsketch.transforms.hadamard import hadamard_factors
from gradsketch.transforms.kronecker import apply_factors, kronecker_
from gradsketch.transforms.pieces import Scratch, piece_length, pieces

__all__ = [
    "BlockMixing",
    "Mixing",
    "WholeMixing",
    "add_blocks",
    "leading_transform",
    "leading_transform_adjoint",
    "power_of_two_at_least",
    "repeat_block",
]


class Mixing(ABC):
    """A square random map M with E[MᵀM] = I, known through fold_d ∘ M and its adjoint; d is a power of two."""

    @abstractmethod
    def fold(self, x: Float[Tensor, "b n"], d: int) -> Float[Tensor, "b d"]:
        """Return fold_d(M x), in float32 or wider."""

    @abstractmethod
    def unfold(self, u: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        """Return the adjoint, Mᵀ of u repeated to length n."""


class BlockMixing(Mixing):
    """M = second · (I ⊗ H_length) · first, applied to one cache-sized piece after the other: one read of x.

    ``length=1`` leaves the transform out.
    """

    def __init__(self, first: Signs, length: int, second: Diagonal | None) -> None:
        self._first, self._length, self._second = first, length, second

    def fold(self, x: Float[Tensor, "b n"], d: int) -> Float[Tensor, "b d"]:
        dtype, multiple = _wide(x.dtype), max(self._length, _within_a_piece(d, x.device))
        out = x.new_zeros(len(x), d, dtype=dtype)
        scratch = Scratch(x.shape, multiple, dtype, x.device)
        for piece in pieces(x.shape, multiple, x.device):
            mixed, spare = scratch.views(piece)
            length = piece.stop - piece.start
            self._first.multiply(piece.of(x), piece.start, mixed[:, :length])
            mixed[:, length:] = 0
            mixed = self._transform(mixed, spare)
            if self._second is not None:
                self._second.multiply(mixed, piece.start, mixed)
            add_blocks(mixed, piece.start, out[piece.rows])
        return out

    def unfold(self, u: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        multiple = max(self._length, _within_a_piece(u.shape[-1], u.device))
        out = u.new_empty(len(u), n)
        scratch = Scratch(out.shape, multiple, u.dtype, u.device)
        for piece in pieces(out.shape, multiple, u.device):
            mixed, spare = scratch.views(piece)
            repeat_block(u[piece.rows], piece.start, mixed)
            if self._second is not None:
                self._second.multiply(mixed, piece.start, mixed)
            mixed = self._transform(mixed, spare)
            self._first.multiply(mixed[:, : piece.stop - piece.start], piece.start, piece.of(out))
        return out

    def _transform(self, x: Tensor, spare: Tensor) -> Tensor:
        if self._length == 1:
            return x
        return apply_factors(x, hadamard_factors(self._length, x.dtype, x.device), (spare, x)).view_as(x)


class WholeMixing(Mixing):
    """M = second · H_length · first over whole vectors zero-padded to ``length``; one vector of working memory."""

    def __init__(self, first: Signs, length: int, second: Diagonal) -> None:
        self._first, self._length, self._second = first, length, second

    def fold(self, x: Float[Tensor, "b n"], d: int) -> Float[Tensor, "b d"]:
        out = x.new_zeros(len(x), d, dtype=_wide(x.dtype))
        work = x.new_empty(1, self._length, dtype=out.dtype)
        for vector, sketch in zip(x.split(1), out.split(1), strict=True):
            for piece in pieces(vector.shape, 1, x.device):
                self._first.multiply(piece.of(vector), piece.start, piece.of(work))
            work[:, x.shape[-1] :] = 0
            kronecker_(work, hadamard_factors(self._length, work.dtype, work.device))
            for piece in pieces(work.shape, 1, x.device):
                self._second.multiply(piece.of(work), piece.start, piece.of(work))
                add_blocks(piece.of(work), piece.start, sketch)
        return out

    def unfold(self, u: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        out = u.new_empty(len(u), n)
        work = u.new_empty(1, self._length) if n < self._length else None
        for vector, sketch in zip(out.split(1), u.split(1), strict=True):
            mixed = vector if work is None else work
            for piece in pieces(mixed.shape, 1, u.device):
                repeat_block(sketch, piece.start, piece.of(mixed))
                self._second.multiply(piece.of(mixed), piece.start, piece.of(mixed))
            kronecker_(mixed, hadamard_factors(self._length, u.dtype, u.device))
            for piece in pieces(vector.shape, 1, u.device):
                self._first.multiply(piece.of(mixed), piece.start, piece.of(vector))
        return out


def leading_transform(u: Float[Tensor, "b m"], d: int) -> Float[Tensor, "b d"]:
    """Return √(m/d) · R_d H_m u, overwriting u; m a power of two."""
    m = u.shape[-1]
    kronecker_(u, hadamard_factors(m, u.dtype, u.device))
    return u if d == m else u[:, :d] * (m / d) ** 0.5


def leading_transform_adjoint(w: Float[Tensor, "b d"], m: int) -> Float[Tensor, "b m"]:
    """Return √(m/d) · H_m of w continued by zeros."""
    d = w.shape[-1]
    u = w.new_zeros(len(w), m, dtype=_wide(w.dtype))
    u[:, :d] = w  # widen before scaling
    u.mul_((m / d) ** 0.5)
    kronecker_(u, hadamard_factors(m, u.dtype, u.device))
    return u


def add_blocks(x: Float[Tensor, "b m"], start: int, out: Float[Tensor, "b d"]) -> None:
    """Add to ``out`` the fold of a vector that is x from ``start`` on and zero elsewhere; x serves as scratch.

    Blocks are added in a tree whose shape depends on m and d only.
    """
    m, d = x.shape[-1], out.shape[-1]
    if m <= d:
        out[:, start % d : start % d + m] += x
        return
    blocks = x.view(len(x), m // d, d)
    count = m // d
    while count > 1:
        half = count // 2
        blocks[:, :half] += blocks[:, count - half : count]
        count -= half
    out += blocks[:, 0]


def repeat_block(u: Float[Tensor, "b d"], start: int, out: Float[Tensor, "b m"]) -> None:
    """Write entries ``start … start+m-1`` of u, repeated without end, into ``out``: the adjoint of ``add_blocks``."""
    m, d = out.shape[-1], u.shape[-1]
    if m <= d:
        out.copy_(u[:, start % d : start % d + m])
    else:
        out.view(len(out), m // d, d).copy_(u[:, None])


def power_of_two_at_least(value: int) -> int:
    """Return the least power of two that is no smaller."""
    return 1 << (value - 1).bit_length()


def _within_a_piece(d: int, device: torch.device) -> int:
    return min(d, piece_length(device))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
