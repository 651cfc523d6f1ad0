"""What the operator itself says about the error of its products."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gradsketch.linear_map import LinearMap

__all__ = ["Differenced", "differenced"]

_DIFFERENCES = "central-difference"


@runtime_checkable
class Differenced(Protocol):
    """An operator that knows how its products are made, and how far one may be off.

    Central differences truncate along some directions a hundred times more than along others. The error is symmetric
    itself, so the recurrence cannot see it.
    """

    mode: str

    def error_along(self, vector: Float[Tensor, " n"]) -> float:
        """Return a bound of the length of Hv's error for a unit vector v."""


def differenced(operator: LinearMap) -> Differenced | None:
    """Return the operator if its products are central differences whose truncation it can measure."""
    return operator if isinstance(operator, Differenced) and operator.mode == _DIFFERENCES else None
