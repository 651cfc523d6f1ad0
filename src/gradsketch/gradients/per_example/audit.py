"""Hold captured gradients against autograd's own: Σ c_i X_i must be the gradient of Σ c_i L_i, for random c."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.gradients.per_example.contributions import Contribution
from gradsketch.linear_map import widened

__all__ = ["Audit", "Audits"]


@dataclass(frozen=True)
class Audits:
    """How often captured gradients were held against autograd's, and the largest relative error that was accepted."""

    batches: int = 0
    audited: int = 0
    largest_error: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.audited} of {self.batches} batches held against autograd's own gradients, "
            f"largest error {self.largest_error:.1e}"
        )


class Audit:
    """Subtracts every contribution, weighted, from the exact gradients of the weighted losses.

    With random weights a swapped row, a silent layer, an ignored hook or a missed use leaves a residual with
    probability one. A residual is compared with the sum of the terms' lengths, of which rounding errors are a fraction
    even where the terms cancel. One n-vector is held.
    """

    def __init__(self, weights: Float[Tensor, " b"], gradients: Mapping[str, Tensor], tolerance: float) -> None:
        self.weights, self.tolerance = weights.double(), tolerance
        self._residuals = {name: g.to(widened(g.dtype), copy=True) for name, g in gradients.items()}
        self._magnitudes = {name: float(g.double().norm()) for name, g in self._residuals.items()}

    def add(self, name: str, contribution: Contribution, examples: slice) -> None:
        """Take one contribution into account."""
        if name not in self._residuals:
            return
        residual, weights = self._residuals[name], self.weights[examples].to(self._residuals[name].device)
        weighty = weights.nonzero()[:, 0]
        if not len(weighty):
            return
        if len(weighty) < len(weights):
            contribution, weights = contribution.of(weighty), weights[weighty]
        rows = residual.shape[0] if residual.ndim > 1 else 1
        columns = residual.numel() // max(1, rows)
        residual -= contribution.weighted(weights, rows, columns).view(residual.shape)
        self._magnitudes[name] += contribution.magnitude(weights)

    def errors(self) -> dict[str, float]:
        """Return each parameter's residual, relative to the terms it is made of."""
        # What is zero by symmetry, as the gradients of keys' biases are, is rounding of the largest gradient.
        floor = max(self._magnitudes.values(), default=0.0) * _ROUNDINGS * self.tolerance
        return {
            name: _ratio(float(residual.double().norm()), self._magnitudes[name] + floor)
            for name, residual in self._residuals.items()
        }

    def failed(self, loosely: Collection[str] = ()) -> dict[str, float]:
        """Return the parameters whose captured gradients are wrong, with their errors.

        Those in ``loosely`` were formed one example at a time, by other kernels than in company.
        """
        allowed = dict.fromkeys(loosely, 10 * self.tolerance)
        return {n: error for n, error in self.errors().items() if error > allowed.get(n, self.tolerance)}

    @property
    def conclusive(self) -> bool:
        """Whether all gradients are finite; what is not finite proves nothing and is reported by whoever sums up."""
        return all(bool(torch.isfinite(residual).all()) for residual in self._residuals.values())


# Of the largest gradient, in units of eps = tolerance².
_ROUNDINGS = 16


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding explains: 3e-4 in float32, 1e-8 in float64, 9e-2 in bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.5)


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf
