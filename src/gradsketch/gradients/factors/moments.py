"""Second moments of both sides of a parameter's gradients, from the factors that layers leave behind.

For X = Σ_t l_t r_tᵀ, K-FAC takes E[vec X vec Xᵀ] for (Σ_t E l lᵀ) ⊗ (Σ_t E r rᵀ) / T̄, with T̄ terms an example: terms
count as independent, and so do the two factors of each. Terms of padding are zero and do not count.

A parameter may be used in several ways: as an embedding, by rows, and as the head, by outer products. Each way has its
own estimate L ⊗ R / T, because a factor's scale means nothing by itself. Their sum F is taken for the Kronecker product
with the same traces over either side, A ⊗ B / tr F. With one way that is K-FAC itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradsketch.linear_map import widened

__all__ = ["WHOLE", "Moments", "SideMoments", "Sides", "whole_rows"]

# Longer sides, such as a vocabulary, keep a diagonal: whole they would take n² numbers and n³ multiplications.
WHOLE = 4096
_SHORT, _VOCABULARY = 512, 8
_ROUNDINGS, _LEAST = 64, 1e-5


def whole_rows(rows: int, columns: int) -> bool:
    """Whether the first side is kept whole: not if it is a vocabulary, whose errors p − e_y are nearly uncorrelated.

    Whole it would cost more than the model's own head, and on a language model of 354 words it scored no better.
    """
    return 1 < rows <= WHOLE and (rows <= _SHORT or rows < _VOCABULARY * columns)


class Sides(NamedTuple):
    """Traces of the second moment F of one example's gradient over its columns and its rows, whole or diagonals."""

    rows: Tensor
    columns: Tensor
    trace: float


@runtime_checkable
class Moments(Protocol):
    """Takes contributions to one parameter's gradients into account, in the forms in which layers give them."""

    rows: int
    columns: int

    def add_outer(self, left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]) -> None:
        """Take gradients Σ_t left_t right_tᵀ into account."""

    def add_rows(self, index: Int[Tensor, "b t"], right: Float[Tensor, "b t columns"]) -> None:
        """Take gradients whose row ``index_t`` gets ``right_t`` into account."""

    def add_gradient(self, gradient: Float[Tensor, "b ..."]) -> None:
        """Take gradients that were formed into account."""

    def part(self, index: int, height: int) -> Moments:
        """Return the moments of one matrix of a stack of matrices of ``height`` rows."""


@dataclass
class _Way:
    """Sums over everything seen: Σ l lᵀ, Σ r rᵀ and the number of terms."""

    rows: Tensor
    columns: Tensor
    terms: int = 0

    def merge(self, other: _Way) -> None:
        self.rows += other.rows
        self.columns += other.columns
        self.terms += other.terms


class SideMoments:
    """What contributions to one parameter of ``rows`` × ``columns`` add up to; to a stack, for each part."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.parts: dict[int, SideMoments] = {}
        self._ways: dict[str, _Way] = {}
        self._largest: Tensor | None = None

    def add_outer(self, left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]) -> None:
        """Take gradients Σ_t left_t right_tᵀ into account."""
        self._note(left, right)
        counted = _is_there(left) & _is_there(right)
        left, right = _wide(left[counted]), _wide(right[counted])
        self._add("outer", _products(left, self._rows_are_whole), _products(right, self.columns <= WHOLE), len(left))

    def add_rows(self, index: Int[Tensor, "b t"], right: Float[Tensor, "b t columns"]) -> None:
        """Take gradients whose row ``index_t`` gets ``right_t`` into account: one-hot vectors are the other factor."""
        self._note(right)
        counted = _is_there(right)
        index, right = index[counted].long(), _wide(right[counted])
        rows = torch.bincount(index, minlength=self.rows).to(right)
        self._add("rows", rows, _products(right, self.columns <= WHOLE), len(right))

    def add_gradient(self, gradient: Float[Tensor, "b ..."]) -> None:
        """Take gradients that were formed into account; each counts as one term, with exact traces.

        Those of a single row, as of a bias, keep their squares alone.
        """
        x = _wide(gradient).reshape(-1, self.rows, self.columns)
        self._note(x)
        squares = x.square()
        rows = torch.einsum("bij,bkj->ik", x, x) if self._rows_are_whole else squares.sum((0, 2))
        columns = torch.einsum("bji,bjk->ik", x, x) if self.rows > 1 and self.columns <= WHOLE else squares.sum((0, 1))
        self._add("formed", rows, columns, len(x))

    @property
    def _rows_are_whole(self) -> bool:
        return whole_rows(self.rows, self.columns)

    def part(self, index: int, height: int) -> SideMoments:
        """Return the moments of one matrix of a stack of matrices of ``height`` rows."""
        return self.parts.setdefault(index, SideMoments(height, self.columns // height))

    def merge(self, other: SideMoments) -> None:
        """Add what another has seen."""
        for name, way in other._ways.items():
            if name in self._ways:
                self._ways[name].merge(way)
            else:
                self._ways[name] = way
        self._keep(other._largest)
        for index, part in other.parts.items():
            self.part(index, part.rows).merge(part)

    @property
    def share_of_least(self) -> float | None:
        """The largest entry of a gradient's factors over the least whose square has digits; None without a gradient."""
        shares = [part.share_of_least for part in self.parts.values()]
        if self._largest is not None and float(self._largest) > 0:
            shares.append(float(self._largest) / torch.finfo(self._largest.dtype).tiny ** 0.5)
        return max((share for share in shares if share is not None), default=None)

    @property
    def is_finite(self) -> bool:
        """Whether all that was seen is."""
        sums = [side for way in self._ways.values() for side in (way.rows, way.columns)]
        return all(bool(torch.isfinite(side).all()) for side in sums) and all(
            part.is_finite for part in self.parts.values()
        )

    def sides(self, examples: int) -> Sides | None:
        """Return the means over so many examples; None where there was no gradient."""
        found = [_sides(name, way, examples) for name, way in self._ways.items() if way.terms]
        found = [sides for sides in found if sides.trace > 0]
        if not found:
            return None
        rows, columns, traces = zip(*found, strict=True)
        return Sides(_sum(rows), _sum(columns), sum(traces))

    def _note(self, *factors: Tensor) -> None:
        """Keep how large the smaller of two factors was at most, as a tensor, so that no GPU is waited for."""
        if all(factor.numel() for factor in factors):
            self._keep(torch.stack([_wide(factor.detach().abs().amax()) for factor in factors]).amin())

    def _keep(self, largest: Tensor | None) -> None:
        if largest is not None:
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def _add(self, name: str, rows: Tensor, columns: Tensor, terms: int) -> None:
        way = _Way(rows, columns, terms)
        if name in self._ways:
            self._ways[name].merge(way)
        else:
            self._ways[name] = way


def _products(x: Float[Tensor, "m n"], whole: bool) -> Tensor:
    """Return Σ x xᵀ, or its diagonal."""
    return x.T @ x if whole else x.square().sum(0)


def _is_there(x: Float[Tensor, "b t n"]) -> Bool[Tensor, "b t"]:
    """Whether each term is more than rounding, as a query's is not that can attend to one token only.

    It is compared with the largest of its own example: of the largest in a batch the count would depend on company.
    """
    sizes = torch.linalg.vector_norm(_wide(x), dim=2)
    # In half precision rounding cannot be told from a small gradient, which must count.
    least = min(_ROUNDINGS * torch.finfo(x.dtype).eps, _LEAST)
    there: Tensor = sizes > least * sizes.amax(1, keepdim=True) if sizes.numel() else sizes.bool()
    return there | ~torch.isfinite(sizes)  # which must not be lost


def _sides(name: str, way: _Way, examples: int) -> Sides:
    rows, columns = (_trace(side) for side in (way.rows, way.columns))
    if name == "formed":  # both are traces over the other side already
        return Sides(way.rows / examples, way.columns / examples, rows / examples)
    scale = 1 / (examples * way.terms)
    return Sides(way.rows * (columns * scale), way.columns * (rows * scale), rows * columns * scale)


def _trace(side: Tensor) -> float:
    return float((side.diagonal() if side.ndim == 2 else side).double().sum())


def _sum(sides: tuple[Tensor, ...]) -> Tensor:
    """Add matrices and diagonals up."""
    one_is_whole = any(side.ndim == 2 for side in sides)
    wholes = [side.diag() if one_is_whole and side.ndim < 2 else side for side in sides]
    return torch.stack(wholes).sum(0) if len(wholes) > 1 else wholes[0]


def _wide(x: Tensor) -> Tensor:
    return x.to(widened(x.dtype))
