"""Hold captured gradients against autograd's own: Σ c_i X_i must be the gradient of Σ c_i L_i, for random c."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.gradients.per_example.contributions import Contribution
from gradsketch.linear_map import widened

__all__ = ["Audit", "Audits", "Witness", "failed", "tolerance"]


@runtime_checkable
class Witness(Protocol):
    """What rows are to be, a linear map of gradients, by another way than that on which a consumer makes them.

    Maps with one ``key`` are made by the same code on the same shapes.
    """

    @property
    def key(self) -> Hashable:
        """What the code depends on."""

    def blank(self) -> Float[Tensor, " d"]:
        """Return a row of zeros, on the CPU."""

    def add_whole(self, row: Float[Tensor, " d"], name: str, gradient: Tensor) -> None:
        """Add the map of one parameter's gradient, given whole."""


@dataclass(frozen=True)
class Audits:
    """How often captured gradients were held against autograd's: in ``audited`` of ``batches`` batches.

    ``largest_error`` is the largest relative error that was accepted.
    """

    batches: int = 0
    audited: int = 0
    largest_error: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.audited} of {self.batches} batches held against autograd's own gradients, "
            f"largest error {self.largest_error:.1e}"
        )


class Audit:
    """Adds every contribution up, weighted, to be held against autograd's gradients of the weighted losses.

    With random weights a swapped row, a silent layer, an ignored hook or a missed use leaves a residual with
    probability one. A residual is compared with the sum of the terms' lengths, of which rounding errors are a fraction
    even where the terms cancel. Of a matrix's residual only the products with some random directions are formed, which
    are as long as the residual itself, up to chance, and cost a fraction of a weight gradient.

    Args:
        weights: one for each loss.
        tensors: the parameters, by name.
        seed: of the directions.
    """

    def __init__(self, weights: Float[Tensor, " b"], tensors: Mapping[str, Tensor], seed: int) -> None:
        self.weights, self._seed = weights.double(), seed
        self.row: Tensor | None = None  # what a witness makes of autograd's gradient of the weighted losses
        self._like = {name: tensor.detach() for name, tensor in tensors.items()}
        self._sums: dict[str, Tensor] = {}
        self._magnitudes = dict.fromkeys(tensors, 0.0)
        self._directions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @property
    def names(self) -> Collection[str]:
        """The parameters that are audited."""
        return self._like.keys()

    def add(self, name: str, contribution: Contribution, examples: slice) -> None:
        """Take one contribution into account."""
        if name not in self._like:
            return
        weights = self.weights[examples].to(self._like[name].device)
        shape, along = self._like[name].shape, self._along(name)
        rows = shape[0] if len(shape) > 1 else 1
        columns = shape.numel() // rows
        if along is None:
            part = contribution.weighted(weights, rows, columns).reshape(-1)
        else:
            part = contribution.weighted_along(weights, rows, columns, along)
        part = part.to(widened(self._like[name].dtype))
        self._sums[name] = self._sums[name].add_(part) if name in self._sums else part
        self._magnitudes[name] += contribution.magnitude(weights)

    def witnessed(self, name: str, gradient: Tensor, witness: Witness) -> None:
        """Let a witness see a parameter's whole gradient of the weighted losses, or a summand of it."""
        self.row = witness.blank() if self.row is None else self.row
        witness.add_whole(self.row, name, gradient)

    def seen(self, name: str, gradient: Tensor) -> Tensor:
        """Return what is kept of a parameter's gradient of the weighted losses until ``errors`` compares it."""
        along = self._along(name)
        flat = gradient.to(widened(self._like[name].dtype)).reshape(-1)
        return flat if along is None else flat.view(-1, len(along)) @ along

    def errors(self, seen: Mapping[str, Tensor], allowed: float) -> dict[str, float]:
        """Return each parameter's residual, relative to the terms it is made of; what is ``allowed`` is rounding."""
        exact = {name: float(part.double().norm()) for name, part in seen.items()}
        magnitudes = {name: self._magnitudes[name] + exact[name] for name in seen}
        # What is zero by symmetry, as the gradients of keys' biases are, is rounding of the largest gradient.
        floor = max(magnitudes.values(), default=0.0) * _ROUNDINGS * allowed
        residuals = {name: part - self._sums[name] if name in self._sums else part for name, part in seen.items()}
        return {
            name: _ratio(float(residual.double().norm()), magnitudes[name] + floor)
            for name, residual in residuals.items()
        }

    def error_of_rows(self, values: Float[Tensor, "b d"], seen: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """Return how far Σ c_i row_i is from the witness's row, relative to their lengths; 0 where that is rounding.

        The map is linear, so the two are one. It proves what comes after the contributions: how they are sketched, and
        that those of all devices and ranks are added up. Rounding is a fraction of the terms' lengths, which the map
        makes longer as it makes their sum.
        """
        assert self.row is not None
        weights, row = self.weights.to(values), self.row.double()
        gap, length = float(((weights @ values).cpu().double() - row).norm()), float(row.norm())
        scale = float((weights.abs() * values.norm(dim=1)).sum()) + length
        gradient = math.hypot(*(float(part.double().norm()) for part in seen.values()))
        terms = _ratio(sum(self._magnitudes.values()), gradient) * length
        room = tolerance(dtype) * scale + _TERM_ROUNDINGS * torch.finfo(dtype).eps * terms
        return 0.0 if not math.isfinite(gap) or gap <= room else _ratio(gap, scale)

    def conclusive(self, seen: Mapping[str, Tensor]) -> bool:
        """Whether all gradients are finite; what is not finite proves nothing and is reported by whoever sums up."""
        return all(bool(torch.isfinite(part).all()) for part in (*seen.values(), *self._sums.values()))

    def _along(self, name: str) -> Float[Tensor, "columns k"] | None:
        """Return directions for the rows of a matrix or of a stack of such, or None where they are no shorter."""
        tensor = self._like[name]
        sizes = [math.prod(tensor.shape[dim:]) for dim in (tensor.ndim - 1, 1)] if tensor.ndim > 1 else []
        columns = next((c for c in sizes if min(c, tensor.numel() // c) > _DIRECTIONS), 0)
        if not columns:
            return None
        key = columns, widened(tensor.dtype), tensor.device
        if key not in self._directions:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randn(columns, _DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
            self._directions[key] = (drawn / _DIRECTIONS**0.5).to(key[2], key[1])
        return self._directions[key]


def failed(errors: Mapping[str, float], allowed: float, loosely: Collection[str] = ()) -> dict[str, float]:
    """Return the errors that are larger than allowed.

    Those in ``loosely`` were formed one example at a time, by other kernels than in company. A residual that is seen
    along directions may look smaller than it is: by more than this factor once in some thousands of times.
    """
    return {n: error for n, error in errors.items() if error > allowed * _SHRUNK * (10 if n in loosely else 1)}


# Along so many the length of a residual of rank one, the worst, has a standard deviation of an eighth.
_DIRECTIONS = 32
_SHRUNK = 0.6
# What rounding makes of terms that cancel, in units of eps.
_TERM_ROUNDINGS = 4
# Of the largest gradient, in units of eps, which is the square of what is allowed.
_ROUNDINGS = 16


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding explains: 3e-4 in float32, 1e-8 in float64, 9e-2 in bfloat16."""
    return float(torch.finfo(dtype).eps ** 0.5)


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf
