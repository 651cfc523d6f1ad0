"""QK: a Kronecker product of random partial isometries.

The factors get more rows with d: 34 multiplications and additions a number at d = 2^12 and 224 at 2^20 (n = 2^24), the
shortest factor first. More and smaller factors would cost less. They would also raise the variance, 2K/d^(1/K) on
inputs of rank one, so the fewest are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.forms import power_of_two_at_least
from gradsketch.sketches.recipe import register
from gradsketch.transforms.haar import haar_rows
from gradsketch.transforms.kronecker import FactorList, apply_factors, balanced_sizes, equal_powers
from gradsketch.transforms.pieces import piece_length
from gradsketch.transforms.precision import full_precision

__all__ = ["QK"]

_LARGEST_FACTOR = 1024


@register
class QK(Sketch):
    """√(n/d) · (Q1 ⊗ … ⊗ QK), Qi the first d_i rows of a Haar-random orthogonal matrix of size B_i.

    The vector is seen as a tensor B_1 × … × B_K (B_2 … B_K powers of two, B_1 no longer than needed). K is the least
    number that keeps every B_i ≤ 1024 unless ``factors`` is given; the d_i are as equal as powers of two can be.
    ``phi.sizes`` and the repr say which were chosen. Vectors that are rank one in this shape have
    relative variance ≈ 2K/d^(1/K), others 2/d. Sizes do not nest.

    Source: [P] A. Schioppa, NeurIPS 2024 (arXiv 2402.03994), §3 and Theorem 3.3.

    Example:
        >>> gs.QK(1 << 20, 1 << 12).sizes
        ((64, 1024), (64, 1024))

    Raises:
        InputError: d is not a power of two, or not reachable with that many factors; or n or d is not allowed.
    """

    def __init__(self, n: int, d: int, *, seed: int = 0, factors: int | None = None) -> None:
        super().__init__(n, d, seed=seed)
        whole = power_of_two_at_least(n)
        if d & (d - 1):
            above = power_of_two_at_least(d)
            nearest = f"d={above // 2}" + (f" or d={above}" if above <= n else "")
            raise InputError(f"QK with d={d}", "a power of two", f"Type {nearest}")
        factors = len(balanced_sizes(whole, largest=_LARGEST_FACTOR)) if factors is None else factors
        most = whole.bit_length() - 1
        if isinstance(factors, bool) or not isinstance(factors, int) or not 1 <= factors <= most:
            raise InputError(f"factors={factors!r} with n={n}", f"a number from 1 to {most}", "Leave factors out")
        self.factors = factors
        first, *others = equal_powers(whole, factors)
        # Not longer than needed, but a multiple of 16: other shapes round differently with every number of threads.
        multiple = min(16, first)
        columns = (-(-n * first // whole // multiple) * multiple, *others)
        # (d_i, B_i) of every factor; the last one acts on neighbouring entries.
        self.sizes = tuple(zip(_balanced_rows(d, columns), columns, strict=True))
        # The factors, float64.
        self.matrices = tuple(haar_rows(self.stream.child(str(i)), *size) for i, size in enumerate(self.sizes))
        self._first, self._others = FactorList(self.matrices[:1]), FactorList(self.matrices[1:])
        self._scale = (math.prod(columns) / d) ** 0.5

    def options(self) -> dict[str, str | int | float | bool]:
        return {"factors": self.factors}

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}: {' ⊗ '.join(f'{d}×{b}' for d, b in self.sizes)})"

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        out = x.new_empty(len(x), self.d, dtype=widened(x.dtype))
        (d1, b1), inner, inner_d = self.sizes[0], *self._inner_lengths()
        first, others = self._first.like(out)[0], self._others.like(out)
        middle = out.new_empty(b1, inner_d)
        scratch = self._scratch(out)
        for vector, sketch in zip(x, out, strict=True):
            for rows, length in self._rows_at_a_time(x.device):
                loaded = scratch[1][: (rows.stop - rows.start) * inner]
                loaded[:length] = vector[rows.start * inner : rows.start * inner + length]
                loaded[length:] = 0
                middle[rows] = apply_factors(loaded, others, scratch).view(-1, inner_d)
            with full_precision(x.device):
                torch.mm(first, middle, out=sketch.view(d1, inner_d))
        return out.mul_(self._scale)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        out = w.new_empty(len(w), self.n, dtype=widened(w.dtype))
        inner, inner_d = self._inner_lengths()
        first, others = self._first.like(out, adjoint=True)[0], self._others.like(out, adjoint=True)
        scratch = self._scratch(out)
        for sketch, vector in zip(w, out, strict=True):
            with full_precision(w.device):
                middle = torch.mm(first, sketch.to(out.dtype).view(-1, inner_d) * self._scale)
            for rows, length in self._rows_at_a_time(w.device):
                lifted = apply_factors(middle[rows], others, scratch)
                vector[rows.start * inner : rows.start * inner + length] = lifted.view(-1)[:length]
        return out

    def _inner_lengths(self) -> tuple[int, int]:
        """Return the products B_2 … B_K and d_2 … d_K."""
        return math.prod(b for _, b in self.sizes[1:]), math.prod(d for d, _ in self.sizes[1:])

    def _rows_at_a_time(self, device: torch.device) -> Iterator[tuple[slice, int]]:
        """Yield ranges of the first index that fill a cache-sized piece, and how much of the vector each holds."""
        inner, _ = self._inner_lengths()
        b1, step = self.sizes[0][1], max(1, piece_length(device) // inner)
        for top in range(0, b1, step):
            rows = slice(top, min(top + step, b1))
            yield (
                rows,
                max(0, min(rows.stop * inner, self.n) - top * inner),
            )  # b1 was rounded up: the last may hold none

    def _scratch(self, like: Tensor) -> tuple[Tensor, Tensor]:
        inner, _ = self._inner_lengths()
        length = min(max(piece_length(like.device), inner), self.sizes[0][1] * inner)
        return like.new_empty(length), like.new_empty(length)


def _balanced_rows(d: int, columns: Sequence[int]) -> list[int]:
    """Return powers of two d_i ≤ B_i with product d, as equal as possible, the smaller ones last."""
    rows = [1] * len(columns)
    while math.prod(rows) < d:
        room = [i for i, size in enumerate(columns) if 2 * rows[i] <= size]
        rows[min(room, key=lambda i: (rows[i], i))] *= 2
    return rows
