"""Second moments of gradients in the eigenbases of a first estimate: the correction of EK-FAC.

EK-FAC replaces the eigenvalues a_i b_j / T̄ of K-FAC by Λ_ij, the mean square of the gradient's entry (i, j) in the
eigenbases. Λ itself acts on whole gradients only (``inverse.py``). Its product with the same sums over rows and
columns, r_i c_j / ΣΛ, acts on a layer's factors: by retraining, exact scores with it came within .01 of those with all
of Λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsketch.gradients.factors.eigenbases import MatrixSpectrum, ParameterSpectrum, SideSpectrum
from gradsketch.linear_map import widened

__all__ = ["EigenMoments", "Entries", "Margins", "corrected"]

# Entries of gradients that are formed at once.
_AT_ONCE = 1 << 24


@runtime_checkable
class Sums(Protocol):
    """What is kept of the squares of a matrix's entries."""

    def add(self, squares: Float[Tensor, "b rows columns"]) -> None:
        """Take those of b gradients into account."""

    def add_rows(self, rows: Int[Tensor, " m"], squares: Float[Tensor, "m columns"]) -> None:
        """Take those of one gradient into account, which is zero outside these rows."""

    def merge(self, other: Any, /) -> None:
        """Add what another has seen."""

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Every sum."""


class Margins:
    """The sums over rows and over columns."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self.rows, self.columns = like.new_zeros(rows), like.new_zeros(columns)

    def add(self, squares: Float[Tensor, "b rows columns"]) -> None:
        """Take the squares of b gradients into account."""
        self.rows += squares.sum((0, 2))
        self.columns += squares.sum((0, 1))

    def add_rows(self, rows: Int[Tensor, " m"], squares: Float[Tensor, "m columns"]) -> None:
        """Take the squares of one gradient into account, which is zero outside these rows."""
        self.rows.index_add_(0, rows, squares.sum(1))
        self.columns += squares.sum(0)

    def merge(self, other: Margins) -> None:
        """Add what another has seen."""
        self.rows += other.rows
        self.columns += other.columns

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Both sums."""
        return self.rows, self.columns


class Entries:
    """Λ: the sum of each entry's squares."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self.matrix = like.new_zeros(rows, columns)

    def add(self, squares: Float[Tensor, "b rows columns"]) -> None:
        """Take the squares of b gradients into account."""
        self.matrix += squares.sum(0)

    def add_rows(self, rows: Int[Tensor, " m"], squares: Float[Tensor, "m columns"]) -> None:
        """Take the squares of one gradient into account, which is zero outside these rows."""
        self.matrix.index_add_(0, rows, squares)

    def merge(self, other: Entries) -> None:
        """Add what another has seen."""
        self.matrix += other.matrix

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Λ itself."""
        return (self.matrix,)


_Kept = TypeVar("_Kept", bound=Sums)


class EigenMoments(Generic[_Kept]):
    """Sums of the squares of one parameter's gradients, in the eigenbases of a spectrum; ``keep`` makes what adds up.

    Each use of a parameter counts alone, as in K-FAC; the positions of one use add up first.
    """

    def __init__(self, spectrum: ParameterSpectrum, keep: Callable[[int, int, Tensor], _Kept]) -> None:
        self.spectrum, self.keep = spectrum, keep
        matrix = spectrum.matrices[0]
        self.rows, self.columns = len(matrix.rows.values), len(matrix.columns.values)
        if spectrum.height is not None:
            self.rows, self.columns = len(spectrum.matrices), self.rows * self.columns
        self.parts: dict[int, EigenMoments[_Kept]] = {}
        self.sums: _Kept | None = None

    def add_outer(self, left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]) -> None:
        """Take gradients Σ_t left_t right_tᵀ into account."""
        left, right = self._turned(left, 0), self._turned(right, 1)
        for part in self._pieces(len(left)):
            self._kept(left).add((left[part].mT @ right[part]).square())

    def add_rows(self, index: Int[Tensor, "b t"], right: Float[Tensor, "b t columns"]) -> None:
        """Take gradients whose row ``index_t`` gets ``right_t`` into account."""
        right = self._turned(right, 1)
        for places, given in zip(index.long(), right, strict=True):
            rows, where = places.unique(return_inverse=True)
            gradient = given.new_zeros(len(rows), self.columns).index_add_(0, where, given)
            if self.spectrum.matrices[0].rows.vectors is None:
                self._kept(gradient).add_rows(rows, gradient.square())
            else:
                whole = given.new_zeros(self.rows, self.columns).index_copy_(0, rows, gradient)
                self._kept(whole).add(self._turned(whole.mT, 0).mT[None].square())

    def add_gradient(self, gradient: Float[Tensor, "b ..."]) -> None:
        """Take gradients that were formed into account."""
        if self.spectrum.height is not None:  # of a whole stack, which K-FAC has by its parts
            for index, own in enumerate(gradient.reshape(len(gradient), self.rows, -1).unbind(1)):
                self.part(index, self.spectrum.height).add_gradient(own)
            return
        x = gradient.reshape(-1, self.rows, self.columns)
        for part in self._pieces(len(x)):
            turned = self._turned(self._turned(x[part], 1).mT, 0).mT
            self._kept(turned).add(turned.square())

    def part(self, index: int, height: int) -> EigenMoments[_Kept]:
        """Return the moments of one matrix of a stack."""
        own = ParameterSpectrum((self.spectrum.matrices[index],))
        return self.parts.setdefault(index, EigenMoments(own, self.keep))

    def merge(self, other: EigenMoments[_Kept]) -> None:
        """Add what another has seen."""
        if other.sums is not None:
            self._kept(other.sums.values[0]).merge(other.sums)
        for index, part in other.parts.items():
            self.part(index, part.rows).merge(part)

    @property
    def is_finite(self) -> bool:
        """Whether all that was seen is."""
        sums = () if self.sums is None else self.sums.values
        return all(bool(torch.isfinite(s).all()) for s in sums) and all(p.is_finite for p in self.parts.values())

    def matrices(self) -> list[EigenMoments[_Kept]]:
        """Return the moments of each matrix: itself, or its parts."""
        if self.spectrum.height is None:
            return [self]
        return [self.part(index, self.spectrum.height) for index in range(self.rows)]

    def _turned(self, x: Float[Tensor, "*batch n"], side: int) -> Float[Tensor, "*batch n"]:
        """Return x in the eigenbasis of a side, in float32 or wider."""
        x = x.to(widened(x.dtype))
        vectors = (self.spectrum.matrices[0].rows, self.spectrum.matrices[0].columns)[side].vectors
        return x if vectors is None else x @ vectors.to(x)

    def _pieces(self, count: int) -> Iterator[slice]:
        step = max(1, _AT_ONCE // (self.rows * self.columns))
        return (slice(start, start + step) for start in range(0, count, step))

    def _kept(self, like: Tensor) -> _Kept:
        if self.sums is None:
            self.sums = self.keep(self.rows, self.columns, like)
        return self.sums


def corrected(moments: EigenMoments[Margins], examples: int) -> ParameterSpectrum:
    """Return the spectrum with means over so many examples for its eigenvalues."""
    found = tuple(_corrected(matrix, examples) for matrix in moments.matrices())
    return replace(moments.spectrum, matrices=found)


def _corrected(moments: EigenMoments[Margins], examples: int) -> MatrixSpectrum:
    matrix = moments.spectrum.matrices[0]
    if moments.sums is None:
        return replace(matrix, trace=0.0)
    rows, columns = (sums.double() / examples for sums in moments.sums.values)
    return MatrixSpectrum(
        SideSpectrum(rows, matrix.rows.vectors), SideSpectrum(columns, matrix.columns.vectors), float(rows.sum())
    )
