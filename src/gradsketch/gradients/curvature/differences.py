"""Central differences: at weights of which precision, how long the steps are, and what they are wrong by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Scheme", "at_least_float32", "schemes", "steps_for"]

# Weights of up to 512 M numbers are copied to float64; beyond that a copy could take the machine's memory.
_WIDE_NUMBERS = 1 << 29


class Scheme(NamedTuple):
    """Gradients are taken at θ ± step·v/|v|, at weights in ``dtype`` (None: their own, float32 at least).

    Steps are lengths in R^n. In float64 a step of 1e-6 leaves rounding and truncation far below 1e-8, and is too short
    to cross many kinks of a ReLU. Longer ones are for models that compute in less than their weights have (a norm in
    float32, autocast). They truncate, so those of h and 2h are extrapolated (Richardson): twice the gradients.
    """

    step: float
    dtype: torch.dtype | None = None

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """Steps whose differences are added, and their weights."""
        return ((self.step, 4 / 3), (2 * self.step, -1 / 3)) if self.step > 1e-5 else ((self.step, 1.0),)

    @property
    def doubled(self) -> Scheme:
        """The same with steps twice as long, whose truncation is larger."""
        return self._replace(step=2 * self.step)

    @property
    def halved(self) -> Scheme:
        """The same with steps half as long, whose rounding error is larger."""
        return self._replace(step=self.step / 2)

    def __str__(self) -> str:
        return f"steps of {self.step:.0e} in {'float64' if self.dtype == torch.float64 else 'their own precision'}"


_WIDE = tuple(Scheme(step, torch.float64) for step in (1e-6, 1e-8, 1e-4, 2.5e-3, 5e-2))
_NATIVE = tuple(Scheme(step) for step in (2.5e-3, 2.5e-4, 2.5e-2, 2e-1))
# Shares of the gradient by which steps change it.
_SHARES = (0.03, 0.01, 0.1, 0.003)


def schemes(held: Sequence[Tensor], own: torch.dtype) -> tuple[Scheme, ...]:
    """Return the schemes to try for a model that holds these tensors, its weights in ``own``; the most exact first."""
    if own == torch.float64:
        return _WIDE
    numbers = sum(tensor.numel() for tensor in held if tensor.is_floating_point())
    return (*_WIDE, *_NATIVE) if numbers <= _WIDE_NUMBERS else _NATIVE


def steps_for(length: float) -> tuple[Scheme, ...]:
    """Return the schemes to try in float32 along a direction in which a step of ``length`` doubles the gradient.

    One length does not serve all: along the leading direction the curvature is thousands of times that along a random
    one of many parameters. Shares of the gradient balance rounding and truncation along both.
    """
    return tuple(Scheme(share * length) for share in _SHARES)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor, in float32 where it is narrower."""
    return tensor.float() if tensor.itemsize < 4 else tensor
