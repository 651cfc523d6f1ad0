"""What one use of a parameter adds to its per-example gradients, in the cheapest form that is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.linear_map import widened
from gradsketch.sketches.block_sum import BlockSum

__all__ = ["Consumer", "Contribution", "Direct", "Outer", "Rows"]


class Contribution(ABC):
    """A summand of the b per-example gradients of one parameter."""

    @abstractmethod
    def sketch(self, phi: BlockSum, name: str, out: Float[Tensor, "b d"]) -> None:
        """Add its sketches to ``out``."""

    @abstractmethod
    def factors(self) -> tuple[Float[Tensor, "b ..."], ...]:
        """Return the floating-point tensors it is a product of."""

    @abstractmethod
    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        """Return it as matrices, in float32 or wider."""

    def touches(self, example: int) -> bool:
        """Whether it may give this example anything but zero."""
        return all(bool(factor[example].count_nonzero()) for factor in self.factors())

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.factors()[0].device


# Called with the parameter's name for each of its contributions, in the order in which backward makes them.
Consumer = Callable[[str, Contribution], None]


@dataclass(frozen=True)
class Outer(Contribution):
    """Σ_t left_t right_tᵀ."""

    left: Float[Tensor, "b t rows"]
    right: Float[Tensor, "b t columns"]

    def sketch(self, phi: BlockSum, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_outer(out, name, self.left, self.right)

    def factors(self) -> tuple[Tensor, ...]:
        return self.left, self.right

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        return wide(self.left).mT @ wide(self.right)


@dataclass(frozen=True)
class Rows(Contribution):
    """Row ``index_t`` gets ``right_t``, added up over t."""

    index: Int64[Tensor, "b t"]
    right: Float[Tensor, "b t columns"]

    def sketch(self, phi: BlockSum, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_rows(out, name, self.index, self.right)

    def factors(self) -> tuple[Tensor, ...]:
        return (self.right,)

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        right = wide(self.right)
        index = self.index[..., None].expand_as(right)
        return right.new_zeros(len(right), rows, columns).scatter_add_(1, index, right)


@dataclass(frozen=True)
class Direct(Contribution):
    """The gradients themselves."""

    gradient: Float[Tensor, b * shape]

    def sketch(self, phi: BlockSum, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_gradient(out, name, self.gradient)

    def factors(self) -> tuple[Tensor, ...]:
        return (self.gradient,)

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        return wide(self.gradient).reshape(-1, rows, columns)


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is."""
    return x.to(widened(x.dtype))
