"""The ways to evaluate a preconditioned sketch: exactly as [P] writes it, or at the cost of one read of the vector.

The fast ways rest on one identity. The first d rows of H_n are, up to scale, H_d after adding up the n/d contiguous
blocks of length d: R_d H_n = √(d/n) · H_d · fold_d. A sketch that ends in R_d H_n therefore never makes that transform
of length n. Where d is not a power of two the fold has the next longer length D, and R_d H_D follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gradsketch.kernels import SignedBlocks
from gradsketch.kernels.plan import BLOCK
from gradsketch.linear_map import widened
from gradsketch.random import Stream
from gradsketch.transforms.base import Transform
from gradsketch.transforms.diagonal import SIGNS_AT_ONCE, Diagonal, Signs
from gradsketch.transforms.fourier import Fourier
from gradsketch.transforms.haar import Haar, PermutedHadamard
from gradsketch.transforms.hadamard import Hadamard, hadamard_factors
from gradsketch.transforms.kronecker import apply_factors
from gradsketch.transforms.pieces import Scratch, piece_length, pieces

__all__ = [
    "AsPrinted",
    "FoldedBlocks",
    "FoldedWhole",
    "Form",
    "Preconditioner",
    "power_of_two_at_least",
    "preconditioner",
]

Preconditioner = Literal["hadamard", "fft", "haar"]


class Form(ABC):
    """A linear map R^n → R^d with prefix-nested sizes, evaluated on a batch, and its adjoint."""

    @abstractmethod
    def sketch(self, x: Float[Tensor, "b n"], d: int, *, overwrite: bool = False) -> Float[Tensor, "b d"]:
        """Map vectors; float32 or wider. ``overwrite`` allows x to be used as working memory."""

    @abstractmethod
    def lift(self, w: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        """Map vectors by the adjoint; float32 or wider."""


class FoldedBlocks(Form):
    """√(n/d) · R_d H_n · second · (I ⊗ H_length) · first, made in cache-sized pieces.

    ``length=1`` leaves the inner transform out, ``second=None`` the second diagonal. On a GPU one kernel makes all but
    the outer transform, where it is written for these factors.
    """

    def __init__(self, first: Diagonal, length: int, second: Diagonal | None) -> None:
        self._first, self._length, self._second = first, length, second
        self._kernel = _kernel(first, length, second)

    def sketch(self, x: Float[Tensor, "b n"], d: int, *, overwrite: bool = False) -> Float[Tensor, "b d"]:
        width = power_of_two_at_least(d)
        if self._kernel is not None and self._kernel.can_fold(x):
            return _transform_and_cut(self._kernel.fold(x, width), d)
        return _transform_and_cut(self._folded(x, width), d)

    def sketch_stretch(self, x: Float[Tensor, "b m"], d: int, start: int) -> Float[Tensor, "b d"]:
        """Map vectors that are x from entry ``start`` on, and zero elsewhere."""
        width = power_of_two_at_least(d)
        lead = self._lead(start, width, x.device)
        return _transform_and_cut(self._folded(functional.pad(x, (lead, 0)), width, start - lead), d)

    def lift_stretch(self, w: Float[Tensor, "b d"], start: int, count: int) -> Float[Tensor, "b m"]:
        """Return ``count`` entries, from ``start`` on, of what the adjoint maps to."""
        u = _continue_and_transform(w)
        lead = self._lead(start, u.shape[-1], w.device)
        return self._repeated(u, lead + count, start - lead)[:, lead:]

    def lift(self, w: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        u = _continue_and_transform(w)
        if self._kernel is not None and self._kernel.can_repeat(u, n):
            return self._kernel.repeat(u, n)
        return self._repeated(u, n)

    def _folded(self, x: Float[Tensor, "b n"], width: int, start: int = 0) -> Float[Tensor, "b width"]:
        folded = x.new_zeros(len(x), width, dtype=widened(x.dtype))
        multiple = self._multiple(width, x.device)
        scratch = Scratch(x.shape, multiple, folded.dtype, x.device)
        for piece in pieces(x.shape, multiple, x.device):
            mixed, spare = scratch.views(piece)
            length = piece.stop - piece.start
            self._first.multiply(piece.of(x), start + piece.start, mixed[:, :length])
            mixed[:, length:] = 0
            mixed = self._transform(mixed, spare)
            if self._second is not None:
                self._second.multiply(mixed, start + piece.start, mixed)
            _add_blocks(mixed, start + piece.start, folded[piece.rows])
        return folded

    def _repeated(self, u: Float[Tensor, "b width"], n: int, start: int = 0) -> Float[Tensor, "b n"]:
        multiple = self._multiple(u.shape[-1], u.device)
        out = u.new_empty(len(u), n)
        scratch = Scratch(out.shape, multiple, u.dtype, u.device)
        for piece in pieces(out.shape, multiple, u.device):
            mixed, spare = scratch.views(piece)
            _repeat_block(u[piece.rows], start + piece.start, mixed)
            if self._second is not None:
                self._second.multiply(mixed, start + piece.start, mixed)
            mixed = self._transform(mixed, spare)
            self._first.multiply(mixed[:, : piece.stop - piece.start], start + piece.start, piece.of(out))
        return out

    def _multiple(self, width: int, device: torch.device) -> int:
        return max(self._length, min(width, piece_length(device)))

    def _lead(self, start: int, width: int, device: torch.device) -> int:
        """Return how far before a stretch its first block begins, where diagonals of signs can begin too."""
        return start % max(self._multiple(width, device), SIGNS_AT_ONCE)

    def _transform(self, x: Tensor, spare: Tensor) -> Tensor:
        if self._length == 1:
            return x
        return apply_factors(x, hadamard_factors(self._length, x.dtype, x.device), (spare, x)).view_as(x)


class FoldedWhole(Form):
    """√(n/d) · R_d H_n · second · transform · first over whole vectors; one vector of working memory."""

    def __init__(self, first: Diagonal, transform: Transform, second: Diagonal) -> None:
        self._first, self._transform, self._second = first, transform, second

    def sketch(self, x: Float[Tensor, "b n"], d: int, *, overwrite: bool = False) -> Float[Tensor, "b d"]:
        folded = x.new_zeros(len(x), power_of_two_at_least(d), dtype=widened(x.dtype))
        room = _working_memory(x, self._transform.n, overwrite)
        for vector, total in zip(x.split(1), folded.split(1), strict=True):
            work = vector if room is None else room
            _load(vector, self._first, work)
            self._transform.apply_(work)
            for piece in pieces(work.shape, 1, x.device):
                self._second.multiply(piece.of(work), piece.start, piece.of(work))
                _add_blocks(piece.of(work), piece.start, total)
        return _transform_and_cut(folded, d)

    def lift(self, w: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        u = _continue_and_transform(w)
        out = u.new_empty(len(u), n)
        work = u.new_empty(1, self._transform.n) if n < self._transform.n else None
        for vector, block in zip(out.split(1), u.split(1), strict=True):
            mixed = vector if work is None else work
            for piece in pieces(mixed.shape, 1, u.device):
                _repeat_block(block, piece.start, piece.of(mixed))
                self._second.multiply(piece.of(mixed), piece.start, piece.of(mixed))
            self._transform.apply_(mixed, adjoint=True)
            _store(mixed, self._first, vector)
        return out


class AsPrinted(Form):
    """√(n/d) · R_d · last · second · transform · first, one factor after the other: the equations of [P] as printed.

    None leaves a factor out. One vector of working memory where the transforms work in place.
    """

    def __init__(
        self,
        first: Diagonal | None,
        transform: Transform,
        second: Diagonal | None = None,
        last: Transform | None = None,
    ) -> None:
        self._first, self._transform, self._second, self._last = first, transform, second, last

    def sketch(self, x: Float[Tensor, "b n"], d: int, *, overwrite: bool = False) -> Float[Tensor, "b d"]:
        out = x.new_empty(len(x), d, dtype=widened(x.dtype))
        room = _working_memory(x, self._transform.n, overwrite)
        for vector, sketch in zip(x.split(1), out.split(1), strict=True):
            work = vector if room is None else room
            _load(vector, self._first, work)
            self._transform.apply_(work)
            if self._second is not None:
                _in_place(work, self._second)
            if self._last is not None:
                self._last.apply_(work)
            torch.mul(work[:, :d], (self._transform.n / d) ** 0.5, out=sketch)
        return out

    def lift(self, w: Float[Tensor, "b d"], n: int) -> Float[Tensor, "b n"]:
        out = w.new_empty(len(w), n, dtype=widened(w.dtype))
        work = out.new_empty(1, self._transform.n) if n < self._transform.n else None
        for vector, sketch in zip(out.split(1), w.split(1), strict=True):
            mixed = vector if work is None else work
            mixed[:, : w.shape[-1]] = sketch
            mixed[:, : w.shape[-1]] *= (self._transform.n / w.shape[-1]) ** 0.5
            mixed[:, w.shape[-1] :] = 0
            if self._last is not None:
                self._last.apply_(mixed, adjoint=True)
            if self._second is not None:
                _in_place(mixed, self._second)
            self._transform.apply_(mixed, adjoint=True)
            _store(mixed, self._first, vector)
        return out


def _kernel(first: Diagonal, length: int, second: Diagonal | None) -> SignedBlocks | None:
    """Return the kernel that is written for these factors."""
    if isinstance(first, Signs) and length == BLOCK and isinstance(second, Signs):
        return SignedBlocks(first.stream, second.stream)
    return SignedBlocks(first.stream, None) if isinstance(first, Signs) and length == 1 and second is None else None


def preconditioner(kind: Preconditioner, n: int, stream: Stream) -> Transform:
    """Return the transform [P] puts before or after the diagonal, for vectors of length n padded to a power of two."""
    n = power_of_two_at_least(n)
    if kind == "fft":
        return Fourier(n)
    return Haar(n, stream) if kind == "haar" else PermutedHadamard(n, stream)


def power_of_two_at_least(value: int) -> int:
    """Return the least power of two that is no smaller."""
    return 1 << (value - 1).bit_length()


def _working_memory(x: Float[Tensor, "b n"], length: int, overwrite: bool) -> Float[Tensor, "1 length"] | None:
    """Return memory for one padded vector, or None where each vector's own memory may and can serve."""
    if overwrite and x.shape[-1] == length and x.dtype == widened(x.dtype):
        return None
    return x.new_empty(1, length, dtype=widened(x.dtype))


def _load(x: Float[Tensor, "1 n"], first: Diagonal | None, work: Float[Tensor, "1 padded"]) -> None:
    """Write first · x, continued by zeros, into the working memory."""
    n = x.shape[-1]
    if first is not None:
        for piece in pieces(x.shape, 1, x.device):
            first.multiply(piece.of(x), piece.start, piece.of(work))
    elif work is not x:
        work[:, :n] = x
    work[:, n:] = 0


def _store(work: Float[Tensor, "1 padded"], first: Diagonal | None, out: Float[Tensor, "1 n"]) -> None:
    """Write the leading part of first · work into ``out``, which may be the working memory itself."""
    if first is not None:
        for piece in pieces(out.shape, 1, out.device):
            first.multiply(piece.of(work), piece.start, piece.of(out))
    elif work is not out:
        out.copy_(work[:, : out.shape[-1]])


def _in_place(x: Float[Tensor, "b n"], diagonal: Diagonal) -> None:
    for piece in pieces(x.shape, 1, x.device):
        diagonal.multiply(piece.of(x), piece.start, piece.of(x))


def _transform_and_cut(u: Float[Tensor, "b m"], d: int) -> Float[Tensor, "b d"]:
    """Return √(m/d) · R_d H_m u, overwriting u; m a power of two."""
    m = u.shape[-1]
    Hadamard(m).apply_(u)
    return u if d == m else u[:, :d] * (m / d) ** 0.5


def _continue_and_transform(w: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
    """Return √(m/d) · H_m of w continued by zeros; m the least power of two that is no smaller than d."""
    d = w.shape[-1]
    u = w.new_zeros(len(w), power_of_two_at_least(d), dtype=widened(w.dtype))
    u[:, :d] = w  # widen before scaling
    u.mul_((u.shape[-1] / d) ** 0.5)
    Hadamard(u.shape[-1]).apply_(u)
    return u


def _add_blocks(x: Float[Tensor, "b m"], start: int, out: Float[Tensor, "b d"]) -> None:
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


def _repeat_block(u: Float[Tensor, "b d"], start: int, out: Float[Tensor, "b m"]) -> None:
    """Write entries ``start … start+m-1`` of u, repeated without end, into ``out``: the adjoint of ``_add_blocks``."""
    m, d = out.shape[-1], u.shape[-1]
    if m <= d:
        out.copy_(u[:, start % d : start % d + m])
    else:
        out.view(len(out), m // d, d).copy_(u[:, None])
