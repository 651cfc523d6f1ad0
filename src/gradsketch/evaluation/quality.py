"""How well sketches keep inner products: noise, Pearson r with intervals, and the size a wanted r needs.

Intervals for r come from a bootstrap over examples, because pairs share examples. The recommended d follows from the
measured noise and the spread of the exact inner products: r² = V / (V + noise²·mean(‖x‖²‖y‖²)/d). It is tested to reach
the wanted r within 0.05. The prediction takes the errors of pairs for independent, and gradients with much in common
need less; so a measured size whose interval lies above the wanted r is recommended where it is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.random import Stream
from gradsketch.report.numbers import numbers_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Quality", "check_wanted", "needed_size", "sketch_quality"]

_RESAMPLES = 1000
_LEVEL = 0.95
# The variance of exact values, over the mean square of the largest they could be, that float32's rounding explains.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Quality(Result):
    """How well sketches of one size keep the inner products of all pairs of different examples.

    ``noise`` is √d times the root-mean-square of (estimate − exact)/(‖x‖‖y‖): 1 for a dense Gaussian sketch and nearly
    orthogonal gradients, whatever d is. ``pearson`` is the correlation of estimates with exact values.
    ``noise_interval`` and ``pearson_interval`` cover 95 %: percentiles of a bootstrap over examples (1000 draws), since
    pairs share examples; they do not include other draws of the sketch. Where all exact values are equal, r is not a
    number.
    """

    d: int
    noise: float
    noise_interval: tuple[float, float]
    pearson: float
    pearson_interval: tuple[float, float]

    @property
    def _named(self) -> dict[str, tuple[float, float, float]]:
        return {"noise·√d": (self.noise, *self.noise_interval), "Pearson r": (self.pearson, *self.pearson_interval)}

    def summary(self) -> str:
        return f"d = {self.d:,}: noise·√d {self.noise:.3f}, Pearson r {self.pearson:.4f}"

    def __str__(self) -> str:
        """Return both numbers with their intervals as a table for the terminal."""
        cells = [[name, *(f"{number:.4f}" for number in numbers)] for name, numbers in self._named.items()]
        return "\n".join(aligned([f"d = {self.d:,}", "value", "2.5 %", "97.5 %"], cells))

    def _figure(self) -> Figure:
        return numbers_figure(self._named, f"d = {self.d:,}, 95 % intervals", at=1.0)


def sketch_quality(
    exact: Float[Tensor, "b b"], sketches: Float[Tensor, "b d"], stored: Float[Tensor, "b d"] | None = None
) -> Quality:
    """Compare the sketches' inner products with the exact ones, in float64, over pairs i < j.

    With ``stored``, the sketches as an index holds them, products are of the i-th sketch and the j-th stored one.

    Raises:
        InputError: fewer than three examples with a gradient.
    """
    pairs = _Pairs(exact, sketches, sketches if stored is None else stored)
    noise, pearson = pairs.statistics(torch.ones(1, len(exact), dtype=torch.float64, device="cpu"))
    intervals = [_interval(values) for values in pairs.statistics(_resamples(len(exact)))]
    return Quality(sketches.shape[1], float(noise), intervals[0], float(pearson), intervals[1])


def needed_size(exact: Float[Tensor, "b b"], noise: float, pearson: float) -> float:
    """Return the d at which sketches of this noise reach a Pearson r.

    Estimates are exact values plus noise of variance noise²·‖x‖²‖y‖²/d, independent of them, so that
    r² = V / (V + noise²·mean(‖x‖²‖y‖²)/d) with V the variance of the exact values over pairs.

    Raises:
        InputError: r is not between 0 and 1.
    """
    check_wanted(pearson)
    first, second = torch.triu_indices(len(exact), len(exact), 1, device="cpu")
    exact = exact.double().cpu()
    spread = exact[first, second].var().item()
    scale = (exact.diagonal()[first] * exact.diagonal()[second]).mean().item()
    return math.inf if spread <= _ROUNDING * scale else pearson**2 / (1 - pearson**2) * noise**2 * scale / spread


def check_wanted(pearson: float) -> None:
    """Refuse a Pearson r that no sketch can be asked for.

    Raises:
        InputError: r is not between 0 and 1.
    """
    if not 0 < pearson < 1:
        raise InputError(f"a wanted Pearson r of {pearson}", "a number between 0 and 1", "Type 0.95")


class _Pairs:
    """Exact and estimated inner products of all pairs i < j of examples that have a gradient."""

    def __init__(self, exact: Tensor, sketches: Tensor, stored: Tensor) -> None:
        exact = exact.double().cpu()
        wide, other = sketches.double().cpu(), stored.double().cpu()
        self.first, self.second = torch.triu_indices(len(exact), len(exact), 1, device="cpu")
        norms = exact.diagonal().clamp(min=0).sqrt()
        kept = (norms[self.first] > 0) & (norms[self.second] > 0)
        if int((norms > 0).sum()) < 3:
            raise InputError(
                f"{len(exact)} examples, {int((norms > 0).sum())} with a gradient",
                "at least three examples whose gradient is not zero",
                "Give more examples",
            )
        self.first, self.second = self.first[kept], self.second[kept]
        self.exact = exact[self.first, self.second]
        self.estimate = (wide @ other.T)[self.first, self.second]
        relative = (self.estimate - self.exact) / (norms[self.first] * norms[self.second])
        self.least = _ROUNDING * float((norms[self.first] * norms[self.second]).square().mean())
        self.squared_noise = relative.square() * sketches.shape[1]

    def statistics(self, counts: Float[Tensor, "draws b"]) -> tuple[Tensor, Tensor]:
        """Return noise and Pearson r ``[draws]`` where example i counts ``counts[:, i]`` times."""
        weights = counts[:, self.first] * counts[:, self.second]
        weights = weights / weights.sum(1, keepdim=True)
        noise = (weights @ self.squared_noise).sqrt()
        # Centred first, so that differences of moments lose no digits.
        x, y = self.exact - self.exact.mean(), self.estimate - self.estimate.mean()
        covariance = weights @ (x * y) - (weights @ x) * (weights @ y)
        variances = [(weights @ z.square() - (weights @ z).square()).clamp(min=0) for z in (x, y)]
        spread = variances[0].where(variances[0] > self.least, torch.nan)  # what differs by rounding is equal
        return noise, covariance / (spread * variances[1]).sqrt()


def _resamples(examples: int) -> Float[Tensor, "draws b"]:
    """Return how often each bootstrap draw holds each example."""
    drawn = Stream(0, "bootstrap").integers(0, _RESAMPLES * examples, examples).view(_RESAMPLES, examples)
    counts = torch.zeros(_RESAMPLES, examples, dtype=torch.float64, device="cpu")
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def _interval(values: Float[Tensor, " draws"]) -> tuple[float, float]:
    # A draw of one or two examples only has no pair, or no spread.
    finite = values[torch.isfinite(values)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = torch.quantile(
        finite, torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64, device="cpu")
    )
    return float(low), float(high)
