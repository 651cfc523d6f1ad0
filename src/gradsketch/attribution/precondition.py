"""(F + λI)⁻¹ in sketch space, with F = XᵀX/N from the stored sketches themselves.

Exact where N or d is at most 16,384 (Cholesky, in the smaller of the two spaces); beyond, a randomised low-rank
approximation with an isotropic tail. Factors are float64.

The left-out eigenvalues are replaced by their mean, because without that tail the order of the rows suffers (a test
holds it to the exact inverse). λ is a fraction of the mean over the min(N, d) eigenvalues that can differ from zero, so
the same fraction means the same for few and for many rows. Only the query is preconditioned: every score is a product
with the stored rows. "ridge" normalises every gradient first; its values are the coefficients of a ridge regression of
the query's gradient on those of the training examples. benchmarks/attribution_quality.py measures both by retraining.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gradsketch.attribution.moments import Moments, RowMatrix, moments_of
from gradsketch.attribution.passes import Each, here
from gradsketch.errors import InputError
from gradsketch.store import Store

__all__ = ["EXACT_SIZE", "LOW_RANK", "Preconditioner", "fit_preconditioner", "held_out_damping"]

EXACT_SIZE = 16_384
LOW_RANK = 1024
_DAMPINGS = tuple(10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
_SAMPLE_ROWS = 2048
_SMALLEST, _LARGEST = 1e-15, 1e15
# In the dual space (I − Xᵀ(…)X) / λ magnifies float32's rounding: scores are off by some 6e-7 / damping of themselves,
# 1 % at this one, and by more than their size at a thousandth of it, where Cholesky may still succeed.
_LEAST = 1e-4


class _Solver(ABC):
    @abstractmethod
    def solve(self, q: Float64[Tensor, "m d"]) -> Float64[Tensor, "m d"]:
        """Return (F + λI)⁻¹ q for each query."""


@dataclass(frozen=True)
class Preconditioner:
    """(F + λI)⁻¹ with λ = damping · (mean eigenvalue of F).

    The mean is over the min(N, d) eigenvalues that can differ from zero. ``method`` is "primal" (d x d), "dual"
    (N x N) or "low rank".
    """

    solver: _Solver
    rows: int
    damping: float
    mean_eigenvalue: float
    method: str

    def solve(self, q: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Return (F + λI)⁻¹ q for each query, in float32."""
        return self.solver.solve(q.double()).float()


def fit_preconditioner(
    store: Store,
    *,
    unit_length: bool,
    damping: float,
    exact_size: int = EXACT_SIZE,
    rank: int = LOW_RANK,
    each: Each = here,
) -> Preconditioner:
    """Build (F + λI)⁻¹ from the rows of a store; with ``unit_length`` each row is scaled to length one first.

    Example:
        >>> preconditioner = fit_preconditioner(store, unit_length=True, damping=0.1)  # doctest: +SKIP
        >>> directions = preconditioner.solve(queries)                                 # doctest: +SKIP

    Raises:
        InputError: damping is not positive or too small to invert F, or there are no rows with a gradient.
    """
    if not (isinstance(damping, int | float) and damping > 0 and math.isfinite(damping)):
        raise InputError(f"damping={damping}", "a positive number", 'Pass damping=1, or damping="auto"')
    rows = RowMatrix(store, unit_length, each)
    size = min(rows.count, store.d)
    mean = rows.squared_norm / rows.count / size if rows.count else 0.0
    if mean == 0:
        raise InputError(f"{store!r} without a gradient", "rows of non-zero gradients", 'Use score="dot"')
    length = math.sqrt(rows.squared_norm / rows.count)
    if not _SMALLEST <= length <= _LARGEST:
        raise InputError(
            f"gradients of length {length:.3g}, as a root mean square",
            f"{_SMALLEST:g} to {_LARGEST:g}: float32 does not hold the squares of others",
            'Pass score="ridge", which compares directions, or leave out rows of an extreme gradient_norm',
        )
    moments = moments_of(rows, exact_size=exact_size, rank=rank, each=each)
    if moments.method == "dual" and damping < _LEAST:
        raise _too_small(f"scores of {rows.count} rows of {store.d} numbers would be rounding")
    return Preconditioner(_solver(rows, moments, damping * mean), rows.count, damping, mean, moments.method)


def _solver(rows: RowMatrix, moments: Moments, shift: float) -> _Solver:
    first = moments.matrices[0].double()
    if moments.method == "low rank":
        size, trace = min(moments.rows, rows.store.d), moments.squared_norm / moments.rows
        return _LowRank(first, moments.matrices[1].double(), trace, size, shift)
    return _Dual(rows, first, shift) if moments.method == "dual" else _Primal(first, shift)


class _Primal(_Solver):
    """Cholesky of F + λI."""

    def __init__(self, second_moment: Float64[Tensor, "d d"], shift: float) -> None:
        second_moment.diagonal().add_(shift)
        self.factor = _cholesky(second_moment)

    def solve(self, q: Float64[Tensor, "m d"]) -> Float64[Tensor, "m d"]:
        return torch.cholesky_solve(q.T, self.factor).T


class _Dual(_Solver):
    """Woodbury: (XᵀX/N + λI)⁻¹ = (I − Xᵀ(XXᵀ + NλI)⁻¹X) / λ, with a Cholesky factor of the N x N matrix."""

    def __init__(self, rows: RowMatrix, gram: Float64[Tensor, "n n"], shift: float) -> None:
        gram.diagonal().add_(rows.count * shift)
        self.rows, self.shift, self.factor = rows, shift, _cholesky(gram)

    def solve(self, q: Float64[Tensor, "m d"]) -> Float64[Tensor, "m d"]:
        inner = torch.cholesky_solve(self.rows.times(q).T, self.factor).T
        return (q - self.rows.transposed_times(inner)) / self.shift


def _cholesky(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise _too_small("F + λI is not positive definite")
    return factor


def _too_small(why: str) -> InputError:
    return InputError(
        f"a damping too small for moments in float32: {why}",
        "λ above F's rounding errors",
        f"Pass damping={_LEAST:g} or more",
    )


class _LowRank(_Solver):
    """F ≈ U diag(l) Uᵀ + t(I − UUᵀ), with t the mean of the eigenvalues that the low rank leaves out."""

    def __init__(
        self,
        vectors: Float64[Tensor, "d r"],
        values: Float64[Tensor, " r"],
        trace: float,
        eigenvalues: int,
        shift: float,
    ) -> None:
        left_out = max(0.0, trace - float(values.sum()))
        tail = left_out / max(1, eigenvalues - len(values))
        self.vectors, self.inverse, self.tail = vectors, 1 / (values + shift), 1 / (tail + shift)

    def solve(self, q: Float64[Tensor, "m d"]) -> Float64[Tensor, "m d"]:
        inside = q @ self.vectors
        return (inside * (self.inverse - self.tail)) @ self.vectors.T + self.tail * q


def held_out_damping(store: Store, *, unit_length: bool, each: Each = here) -> float:
    """Choose the damping under which held-out gradients are most likely as draws from N(0, F + λI).

    F is fitted to a sample of up to 2048 rows without every fifth, which is held out; the likelihood is evaluated
    in the space those rows span. Candidates run from 1e-4 to 10 times the mean eigenvalue.

    Raises:
        InputError: fewer than ten rows.
    """
    sample = RowMatrix(store, unit_length, each).sample(_SAMPLE_ROWS, each)
    if len(sample) < 10:
        raise InputError(f"{len(sample)} rows", "at least ten to hold some out", "Pass damping=1")
    held = torch.arange(len(sample), device="cpu") % 5 == 0
    fit, test = sample[~held].double(), sample[held].double()
    gram = fit @ fit.T
    values, vectors = torch.linalg.eigh(gram)
    n, d = fit.shape
    size = min(n, d)
    values, vectors = values[-size:].clamp_min(0), vectors[:, -size:]
    # Coordinates of the held-out rows along F's eigenvectors, and what is left of them outside.
    along = ((test @ fit.T) @ vectors).square() / values.clamp_min(float(values[-1]) * 1e-12)
    outside = (test.square().sum(-1) - along.sum(-1)).clamp_min(0)
    eigenvalues, mean = values / n, float(values.sum()) / n / size

    def log_likelihood(damping: float) -> float:
        shift = damping * mean
        quadratic = (along / (eigenvalues + shift)).sum(-1) + outside / shift
        determinant = (eigenvalues + shift).log().sum() + (d - size) * math.log(shift)
        return -float(quadratic.mean() + determinant)

    return max(_DAMPINGS, key=log_likelihood)
