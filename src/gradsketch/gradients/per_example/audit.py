"""Hold captured gradients against autograd's own: Σ c_i X_i must be the gradient of Σ c_i L_i, for random c."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.gradients.per_example.contributions import Contribution
from gradsketch.linear_map import widened
from gradsketch.sketches.affd import AFFD

__all__ = ["Audit", "Audits", "projected", "tolerance"]

# Numbers that are kept of a gradient where no whole one is held. A wrong gradient has another projection with
# probability one; of its length these tell a fifth.
_KEPT = 64


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
    even where the terms cancel. One n-vector is held; where a projection is given, that of each gradient only, and
    ``gradients`` are such.
    """

    def __init__(
        self,
        weights: Float[Tensor, " b"],
        gradients: Mapping[str, Tensor],
        tolerance: float,
        shapes: Mapping[str, torch.Size],
        projection: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.weights, self.tolerance, self._shapes, self._projection = weights.double(), tolerance, shapes, projection
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
        shape = self._shapes[name]
        rows = shape[0] if len(shape) > 1 else 1
        columns = shape.numel() // max(1, rows)
        term = contribution.weighted(weights, rows, columns).view(shape)
        residual -= term if self._projection is None else self._projection(name, term)
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


def projected(name: str, gradient: Tensor) -> Tensor:
    """Return a random projection of one parameter's gradient, the same map for every gradient of it."""
    flat = gradient.reshape(-1).to(widened(gradient.dtype))
    sketch = AFFD(max(len(flat), _KEPT), _KEPT, seed=zlib.crc32(name.encode()))
    # Not by a call, which would refuse numbers that are not finite: whoever sums up says where they came from.
    return flat if len(flat) <= _KEPT else sketch._apply(flat[None])[0]


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding explains: 3e-4 in float32, 1e-8 in float64, 9e-2 in bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.5)


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf
