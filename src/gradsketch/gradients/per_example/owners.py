"""Which example each row of a call belongs to: known where its dim of examples was followed, measured elsewhere.

Measuring: let L = Σ cᵢ Lᵢ with known cᵢ. The gradient that reaches row r is c_owner(r) times what reaches it from Σ Lᵢ.
So the ratio of two backward passes names the owner of every row, and a row whose ratio is no cᵢ is mixed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.linear_map import widened

__all__ = [
    "Grouping",
    "InOrder",
    "Measured",
    "MixedError",
    "UnmeasurableError",
    "owners_of",
    "projected",
    "spread_weights",
]

_DIRECTIONS = 4
# Of the largest row, what counts as noise in the coarsest dtypes.
_NOISE = 0.01


class MixedError(Exception):
    """Rows of a call that several examples share."""


class UnmeasurableError(Exception):
    """Rows that are not finite, which tell nothing of their owner and must not be lost."""


class Grouping(ABC):
    """Brings the rows of a call together by example."""

    examples: int

    @abstractmethod
    def part(self, start: int, stop: int) -> Grouping:
        """Return the grouping of these of the flattened rows, which are one leading dim then."""

    @abstractmethod
    def __call__(self, rows: Float[Tensor, "*r"]) -> Float[Tensor, "b t ..."]:
        """Return rows ``[*leading, *inner]`` as ``[b, t, *inner]``, with zeros where an example has fewer than t."""


@dataclass(frozen=True)
class InOrder(Grouping):
    """Dim ``axis`` of the leading dims counts the examples."""

    examples: int
    axis: int
    leading: int

    def part(self, start: int, stop: int) -> Grouping:
        return InOrder(self.examples, 0, 1)

    def __call__(self, rows: Tensor) -> Tensor:
        inner = rows.shape[self.leading :]
        return rows.movedim(self.axis, 0).reshape(self.examples, -1, *inner)


class Measured(Grouping):
    """An owner for each row of the flattened leading dims; −1 for rows that nothing reaches."""

    def __init__(self, owners: Int64[Tensor, " r"], examples: int, leading: int) -> None:
        self.examples, self.leading, self._owners = examples, leading, owners
        reached = (owners >= 0).nonzero()[:, 0]
        order = reached[owners[reached].argsort(stable=True)]
        counts = torch.bincount(owners[order], minlength=examples)
        within = torch.arange(len(order), device=order.device)
        within = within - (counts.cumsum(0) - counts).repeat_interleave(counts)
        width = max(1, int(counts.max()))
        self._index = order.new_full((examples, width), len(owners))
        self._index[owners[order], within] = order

    def part(self, start: int, stop: int) -> Grouping:
        return Measured(self._owners[start:stop], self.examples, 1)

    def __call__(self, rows: Tensor) -> Tensor:
        flat = rows.flatten(0, self.leading - 1) if self.leading > 1 else rows
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self._index]


def spread_weights(losses: Float[Tensor, " b"], dtype: torch.dtype) -> Float[Tensor, " b"]:
    """Return weights for the losses whose ratios stay apart under the rounding of ``dtype``, within its range."""
    generator = torch.Generator().manual_seed(0)
    reach = math.log2(torch.finfo(dtype).max) / 2  # gradients are to survive the weights at both ends
    powers = torch.arange(len(losses), dtype=torch.float64, device="cpu")
    if len(losses) - 1 <= reach:
        # A power of two scales every number of a row's backward pass and rounds none, so what a row's own example
        # brings is a multiple to the last bit, however much has cancelled. The mean of several is no power of two.
        weights = 2.0 ** (powers - len(losses) // 2)
    else:
        step = min(1 + 4 * _tolerance(dtype), 2 ** (reach / len(losses)))
        # Unevenly, so that the mean of two or of all is nobody's.
        uneven = torch.rand(len(losses), generator=generator, dtype=torch.float64, device="cpu") / 2
        weights = torch.tensor(step, dtype=torch.float64, device="cpu") ** (powers + uneven)
    order = torch.randperm(len(losses), generator=generator, device="cpu")
    return weights[order].to(losses)


def projected(gradient: Float[Tensor, "*r"], leading: int) -> Float[Tensor, "r 4"]:
    """Return what is kept of the gradient of each row: its products with a few fixed random directions."""
    rows = gradient.flatten(0, leading - 1).flatten(1) if gradient.ndim > leading else gradient.flatten()[:, None]
    rows = rows.to(widened(rows.dtype))
    generator = torch.Generator().manual_seed(rows.shape[1])
    directions = torch.randn(rows.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
    return (rows @ directions.to(rows)).double()


def owners_of(
    weighted: Float[Tensor, "r k"], plain: Float[Tensor, "r k"], weights: Float[Tensor, " b"], dtype: torch.dtype
) -> Int64[Tensor, " r"]:
    """Return each row's owner, −1 where nothing reaches it.

    Raises:
        MixedError: a row belongs to several examples.
        UnmeasurableError: a row is not finite.
    """
    if not bool(torch.isfinite(plain).all()):
        raise UnmeasurableError
    if not bool(torch.isfinite(weighted).all()):
        raise MixedError
    size = plain.norm(dim=1)
    ratio = (weighted * plain).sum(1) / plain.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    weights = weights.double()
    order = weights.argsort()
    place = torch.searchsorted(weights[order], ratio.clamp_min(0)).clamp(1, max(1, len(weights) - 1))
    above, below = order[place.clamp_max(len(weights) - 1)], order[place - 1]
    owner = torch.where((ratio - weights[below]).abs() < (ratio - weights[above]).abs(), below, above)
    error = (weighted - weights[owner, None] * plain).norm(dim=1)
    # Far less than what sets weights apart, or a small part of another example's gradient would go unseen.
    tolerance = min(_tolerance(dtype), max(_tolerance(dtype) / 16, 8 * torch.finfo(dtype).eps))
    gap = float((weights[order].diff() / weights[order[:-1]]).min()) if len(weights) > 1 else 1.0
    fits = error <= min(tolerance, gap / 4) * weights[owner] * size
    # What fits nobody and is next to nothing is noise of other rows. What fits is kept however small it is, because
    # the example that it belongs to may have nothing larger.
    noise = size <= min(64 * torch.finfo(dtype).eps, _NOISE) * (size.max() if len(size) else 0)
    if not bool((fits | noise).all()):
        raise MixedError
    return torch.where(fits & (size > 0), owner, -1)


def _tolerance(dtype: torch.dtype) -> float:
    return float(min(0.05, 4 * torch.finfo(dtype).eps ** 0.5))
