"""The density of all eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from tqdm import tqdm

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap
from gradsketch.lockstep import in_step
from gradsketch.progress import hidden
from gradsketch.random import Stream
from gradsketch.report.spectrum import density_figure
from gradsketch.results import Result
from gradsketch.spectra.krylov import Forgetful, FullBasis
from gradsketch.spectra.lanczos import Lanczos
from gradsketch.spectra.plan import check_operator, home
from gradsketch.spectra.results import Estimate
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "Density", "density"]

# Smoothing width as a share of the nodes' range.
_WIDTH = 0.005
# Beyond this many widths a Gaussian holds less than 1e-6.
_REACH = 5.0


@dataclass(frozen=True)
class Curve:
    """A smoothed density on a grid: the mean over probes and the standard error of that mean."""

    grid: Float[np.ndarray, " g"]
    density: Float[np.ndarray, " g"]
    standard_error: Float[np.ndarray, " g"]
    width: float


@dataclass(frozen=True, eq=False)
class Density(Result):
    """The density of all eigenvalues, as quadrature ``nodes`` and ``weights``: one tuple of each per probe.

    The density is their weighted comb, averaged over probes. A probe's weights add up to one and its first 2·steps − 1
    moments are exact for that probe. ``n`` counts eigenvalues, ``hvps`` products with the operator;
    ``reorthogonalized`` says whether the Krylov vectors were kept.
    """

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    n: int
    seed: int
    reorthogonalized: bool
    hvps: int
    seconds: float

    def moment(self, power: int) -> Estimate:
        """Return the mean over all n eigenvalues of λ^power, with its spread over probes."""
        sample = [float(np.dot(w, np.array(x) ** power)) for x, w in zip(self.nodes, self.weights, strict=True)]
        spread = float(np.std(sample, ddof=1)) if len(sample) > 1 else float("inf")
        return Estimate(float(np.mean(sample)), spread / len(sample) ** 0.5)

    @property
    def trace(self) -> Estimate:
        """The sum of the eigenvalues."""
        return self._scaled(1)

    @property
    def squared_norm(self) -> Estimate:
        """The sum of the squared eigenvalues, ‖H‖_F²."""
        return self._scaled(2)

    def _scaled(self, power: int) -> Estimate:
        moment = self.moment(power)
        return Estimate(self.n * moment.value, self.n * moment.standard_error)

    def share_below(self, value: float) -> Estimate:
        """Return which share of all eigenvalues lies below a value: below 0, say."""
        sample = [
            float(sum(w for x, w in zip(nodes, weights, strict=True) if x < value))
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        spread = float(np.std(sample, ddof=1)) if len(sample) > 1 else float("inf")
        return Estimate(float(np.mean(sample)), spread / len(sample) ** 0.5)

    def curve(self, points: int = 1024, width: float | None = None) -> Curve:
        """Return the density smoothed by Gaussians of standard deviation ``width`` (default: 0.5 % of the range)."""
        low = min(min(x) for x in self.nodes)
        high = max(max(x) for x in self.nodes)
        if width is None:
            width = _WIDTH * ((high - low) or abs(high) or 1.0)
        if width <= 0:
            raise InputError(f"width={width}", "a positive number", "Leave it out")
        grid = np.linspace(low - _REACH * width, high + _REACH * width, points)
        curves = np.stack([_smooth(grid, x, w, width) for x, w in zip(self.nodes, self.weights, strict=True)])
        spread = curves.std(0, ddof=1) if len(curves) > 1 else np.full(points, np.inf)
        return Curve(grid, curves.mean(0), spread / len(curves) ** 0.5, width)

    def summary(self) -> str:
        negative, trace = self.share_below(0.0), self.trace
        return (
            f"{negative.value:.1%} of n = {self.n:,} eigenvalues below 0, "
            f"trace {trace.value:.4g} ± {trace.standard_error:.2g} ({self.hvps} products, {self.seconds:.1f} s)"
        )

    def __str__(self) -> str:
        """Return the estimates as a table for the terminal."""
        named = {"trace": self.trace, "squared norm": self.squared_norm, "share below 0": self.share_below(0.0)}
        cells = [[name, f"{e.value:.6g}", f"{e.standard_error:.2g}"] for name, e in named.items()]
        return "\n".join([*aligned(["", "value", "standard error"], cells), self.summary()])

    def _figure(self) -> Figure:
        return density_figure(self)


def _smooth(
    grid: Float[np.ndarray, " g"], nodes: tuple[float, ...], weights: tuple[float, ...], width: float
) -> Float[np.ndarray, " g"]:
    bumps = np.exp(-0.5 * ((grid[:, None] - np.array(nodes)[None, :]) / width) ** 2)
    curve: Float[np.ndarray, " g"] = bumps @ np.array(weights) / (width * np.sqrt(2 * np.pi))
    return curve


@in_step
def density(
    operator: LinearMap,
    *,
    probes: int = 4,
    steps: int = 40,
    seed: int = 0,
    memory: int = 1 << 28,
    progress: bool | None = None,
) -> Density:
    """Return the density of all eigenvalues of a self-adjoint map, negative ones included.

    Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani et al. 2019): each probe, a vector of random
    signs, starts a Lanczos run whose Ritz values and squared first components are nodes and weights. The Krylov
    vectors are re-orthogonalised where they fit in ``memory`` bytes; otherwise copies share the weight of what they
    copy, and the quadrature stays right.

    Example:
        >>> phi = gs.AFFD(256, 64)
        >>> d = gs.density(phi.T @ phi, steps=10)
        >>> share = d.share_below(0.5)  # of 256 eigenvalues all but 64 are zero
        >>> bool(abs(share.value - 0.75) < 4 * share.standard_error)
        True

    Raises:
        InputError: not a self-adjoint map, or a number out of range.
        NonFiniteError: a product holds a NaN or an infinity.
    """
    check_operator(operator)
    if probes < 1 or steps < 1:
        raise InputError(f"probes={probes}, steps={steps}", "at least one of each", "Leave them out")
    (dtype, device), n = home(operator), operator.n
    operator = operator.shared()
    space = operator.space
    steps = min(steps, n)
    keep = steps * space.most * dtype.itemsize <= memory
    stream, clock, products = Stream(seed, "spectrum", "density"), time.monotonic(), 0
    nodes, weights = [], []
    with tqdm(total=probes * steps, unit="HVP", disable=hidden(progress, operator.ranks.rank), leave=False) as bar:
        for probe in range(probes):
            start = space.drawn(partial(stream.child(str(probe)).signs, dtype=dtype, device=device))
            basis = FullBasis(space) if keep else Forgetful()
            lanczos = Lanczos(operator, basis, start.div_(space.norm(start)), seed)
            x, w = _quadrature(lanczos, steps, bar)
            products += len(lanczos)
            nodes.append(x)
            weights.append(w)
    seconds = time.monotonic() - clock
    return Density(tuple(nodes), tuple(weights), n, seed, keep, products, seconds)


def _quadrature(lanczos: Lanczos, steps: int, bar: tqdm) -> tuple[tuple[float, ...], tuple[float, ...]]:
    while len(lanczos) < steps and not lanczos.closed and (not lanczos.betas or lanczos.betas[-1] > 0):
        lanczos.step()
        bar.update()
    values, vectors = eigh_tridiagonal(np.array(lanczos.alphas), np.array(lanczos.betas[:-1]))
    return tuple(values.tolist()), tuple((vectors[0] ** 2).tolist())
