"""Trace, squared Frobenius norm and diagonal of a map, from products with random vectors, with standard errors.

XTrace takes its error from the delete-one jackknife. The spread of its leave-one-out estimates understates the variance
where the spectrum decays, because they share their range; the jackknife errs on the other side, and its 95 % intervals
cover (tests/spectra/test_estimators.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap, widened
from gradsketch.lockstep import in_step
from gradsketch.random import Stream
from gradsketch.report.numbers import ranked_figure
from gradsketch.results import Result
from gradsketch.spectra.moments import moments
from gradsketch.spectra.results import Estimate
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Diagonal", "diagonal", "squared_norm", "trace"]

Method = Literal["auto", "hutchinson", "xtrace"]


@dataclass(frozen=True, eq=False)
class Diagonal(Result):
    """An estimated diagonal as ``values``, the ``standard_errors`` of its entries, and what it cost."""

    values: Float[Tensor, " n"] = field(repr=False)
    standard_errors: Float[Tensor, " n"] = field(repr=False)
    products: int
    seconds: float

    def summary(self) -> str:
        low, high = float(self.values.min()), float(self.values.max())
        return f"{len(self.values):,} entries from {low:.4g} to {high:.4g} ({self.products} products)"

    def __str__(self) -> str:
        """Return the ten entries of largest magnitude as a table for the terminal."""
        places = self.values.abs().topk(min(10, len(self.values))).indices.tolist()
        cells = [[str(i), f"{self.values[i]:.4g}", f"{self.standard_errors[i]:.2g}"] for i in places]
        return "\n".join([*aligned(["entry", "value", "standard error"], cells), self.summary()])

    def _figure(self) -> Figure:
        return ranked_figure(self.values.tolist(), "entry of the diagonal", "entry")


@in_step
def trace(
    operator: LinearMap, products: int = 30, *, method: Method = "auto", seed: int = 0, memory: int = 1 << 28
) -> Estimate:
    """Estimate the trace of a square map from a number of products, without bias.

    "hutchinson" averages zᵀAz over vectors z of random signs and holds two vectors (Hutchinson 1989). "xtrace"
    projects out the range that half of the products find and averages over leaving each out (Epperly, Tropp & Webber,
    "XTrace", SIAM J. Matrix Anal. Appl. 2024): far more exact where few eigenvalues carry the map, at four
    times ``products / 2`` vectors, only for self-adjoint maps, and with a cautious standard error. "auto" takes it
    where those vectors fit in ``memory`` bytes. A map of no more than ``products`` columns is evaluated exactly.

    Example:
        >>> phi = gs.AFFD(256, 64)
        >>> round(gs.trace(phi.T @ phi, 300).value, 2)  # all 256 columns: exact
        256.0

    Raises:
        InputError: the map is not square, fewer than 2 products, XTrace with fewer than 8 or of a map not self-adjoint.
    """
    _check(operator, products, 8 if method == "xtrace" else 2)
    if method not in get_args(Method):
        raise InputError(f"method={method!r}", f"one of {get_args(Method)}", "Leave it out for 'auto'")
    if method == "xtrace" and not operator.is_self_adjoint:
        raise InputError(f"XTrace of {operator!r}", "a self-adjoint map", "Type method='hutchinson'")
    dtype, device = _kind(operator)
    start = time.perf_counter()
    if operator.n <= products:
        exact = float(operator.dense(dtype, device).diagonal().sum(dtype=torch.float64))
        return Estimate(exact, 0.0, operator.n, operator.n, time.perf_counter() - start)
    fits = 4 * (products // 2) * operator.n * dtype.itemsize <= memory
    if method == "xtrace" or (method == "auto" and operator.is_self_adjoint and products >= 8 and fits):
        return _xtrace(operator, products // 2, seed, dtype, device)
    return moments(operator, products, seed, dtype, device)[0]


@in_step
def squared_norm(operator: LinearMap, products: int = 30, *, seed: int = 0) -> Estimate:
    """Estimate ‖A‖_F², the sum of squared eigenvalues of a self-adjoint map, without bias: the mean of ‖Az‖².

    Example:
        >>> phi = gs.AFFD(256, 64)
        >>> estimate = gs.squared_norm(phi.T @ phi, 100)
        >>> exact = (phi.T @ phi).dense().square().sum()
        >>> bool(abs(estimate.value - exact) < 4 * estimate.standard_error)
        True

    Raises:
        InputError: the map is not square, or fewer than 2 products.
    """
    _check(operator, products, 2)
    return moments(operator, products, seed, *_kind(operator))[1]


@in_step
def diagonal(operator: LinearMap, products: int = 100, *, seed: int = 0) -> Diagonal:
    """Estimate the diagonal of a square map, without bias: the mean of z ⊙ Az over vectors z of random signs.

    The variance of entry i is Σ_{j≠i} A_ij² / products (Bekas, Kokiopoulou & Saad 2007). Holds four vectors.

    Example:
        >>> phi = gs.AFFD(256, 64)
        >>> round(float(gs.diagonal(phi.T @ phi).values.mean()), 1)
        1.0

    Raises:
        InputError: the map is not square, or fewer than 2 products.
    """
    _check(operator, products, 2)
    dtype, device = _kind(operator)
    start, stream = time.perf_counter(), Stream(seed, "spectrum", "diagonal")
    mean = torch.zeros(operator.n, dtype=dtype, device=device)
    squares = torch.zeros_like(mean)
    for count in range(1, products + 1):
        z = stream.child(str(count)).signs(0, operator.n, dtype=dtype, device=device)
        sample = operator(z).mul_(z)
        # Welford's recurrence: sums of squares minus squares of sums would cancel.
        torch.sub(sample, mean, out=z)
        mean.add_(z, alpha=1 / count)
        squares.addcmul_(z, sample.sub_(mean))
    errors = squares.div_(products * (products - 1)).sqrt_()
    return Diagonal(mean, errors, products, time.perf_counter() - start)


def _xtrace(operator: LinearMap, k: int, seed: int, dtype: torch.dtype, device: torch.device) -> Estimate:
    """XTrace with k test vectors of uniformly random direction: 2k products."""
    start, n = time.perf_counter(), operator.n
    stream = Stream(seed, "spectrum", "xtrace")
    omega = torch.stack([stream.child(str(i)).normals(0, n, dtype=dtype, device=device) for i in range(k)])
    images = operator(omega)
    forms, lengths = ((omega * x).sum(1, dtype=torch.float64) for x in (images, omega))
    basis, upper = torch.linalg.qr(images.T)
    del images
    inside = (omega @ basis).T.double()
    del omega
    basis = basis.T.contiguous()
    core = (operator(basis) @ basis.T).double()
    inner = _Inner(upper.double(), inside, (core + core.T) / 2, forms, lengths, n, torch.finfo(dtype).eps)
    seconds = time.perf_counter() - start
    return Estimate(inner.estimate(), inner.jackknife_error(), k, 2 * k, seconds)


@dataclass(frozen=True)
class _Inner:
    """What XTrace knows of A from k test vectors ω_i: k×k matrices, in the basis Q of the images' range.

    ``upper`` is R of AΩ = QR, ``inside`` QᵀΩ, ``core`` QᵀAQ, ``forms`` ω_iᵀAω_i and ``lengths`` ‖ω_i‖².
    """

    upper: Float[Tensor, "r k"]
    inside: Float[Tensor, "r k"]
    core: Float[Tensor, "r r"]
    forms: Float[Tensor, " k"]
    lengths: Float[Tensor, " k"]
    n: int
    eps: float

    def estimate(self) -> float:
        """Average k estimates: each from the range found without one test vector, the remainder seen by that one."""
        sizes = self.upper.diagonal().abs()
        k, rank = len(sizes), int((sizes > 100 * self.eps * sizes.max()).sum())
        if rank < k:  # the range is found whole, and nothing remains
            return float(self.core[:rank, :rank].trace())
        identity = torch.eye(k, dtype=self.upper.dtype, device=self.upper.device)
        # Column i is the direction of the range that image i alone contributes.
        alone = torch.linalg.solve_triangular(self.upper.T, identity, upper=False)
        alone = alone / alone.norm(dim=0)
        within = self.inside - alone * (alone * self.inside).sum(0)
        remainder = self.forms - 2 * (within * self.upper).sum(0) + (within * (self.core @ within)).sum(0)
        scale = (self.n - k + 1) / (self.lengths - within.square().sum(0))
        explained = self.core.trace() - (alone * (self.core @ alone)).sum(0)
        return float((explained + scale * remainder).mean())

    def jackknife_error(self) -> float:
        """Return the delete-one jackknife's standard error, which is too large rather than too small (Efron & Stein).

        The k estimates themselves share most of their range: their spread misses up to half of the variance.
        """
        k = len(self.forms)
        without = torch.tensor([self._without(i).estimate() for i in range(k)], dtype=torch.float64, device="cpu")
        return float(((k - 1) / k * (without - without.mean()).square().sum()).sqrt())

    def _without(self, i: int) -> _Inner:
        kept = [j for j in range(len(self.forms)) if j != i]
        basis, upper = torch.linalg.qr(self.upper[:, kept])
        core = basis.T @ self.core @ basis
        return _Inner(
            upper, basis.T @ self.inside[:, kept], core, self.forms[kept], self.lengths[kept], self.n, self.eps
        )


def _check(operator: LinearMap, products: int, least: int) -> None:
    if operator.shape[0] != operator.shape[1]:
        raise InputError(f"{operator!r} of shape {operator.shape}", "a square map", "Give phi @ H @ phi.T, not phi")
    if products < least:
        raise InputError(f"products={products}", f"at least {least}: a standard error needs some", "Type products=30")


def _kind(operator: LinearMap) -> tuple[torch.dtype, torch.device]:
    dtype = widened(operator.dtype)
    return dtype, torch.device("cpu") if operator.device is None else operator.device
