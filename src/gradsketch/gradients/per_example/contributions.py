"""What one use of a parameter adds to its per-example gradients, in the cheapest form that is known.

What is done with a contribution is the consumer's: sketches, flat gradients, or the lists from which ``gradient_gram``
takes exact inner products, by pairs of positions or by blocks of columns, whichever is fewer multiplications. No
gradient is held whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsketch.gradients.factors.moments import Moments
from gradsketch.gradients.per_example.directions import Directions
from gradsketch.linear_map import widened
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.sketches.preconditioned import Preconditioned

__all__ = [
    "ByParameter",
    "Consumer",
    "Contribution",
    "Direct",
    "GradientSketch",
    "IndexedRows",
    "Inside",
    "Outer",
    "Placed",
    "Sum",
    "wide",
]


# Sketches that take gradients parameter by parameter.
GradientSketch = BlockSum | Preconditioned
# All maps that do: these, and products with given directions.
ByParameter = GradientSketch | Directions


class Contribution(ABC):
    """A summand of the b per-example gradients of one parameter, seen as matrices ``[b, rows, columns]``."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many examples it is for."""

    @abstractmethod
    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        """Add its sketches to ``out``."""

    def formed(self) -> Float[Tensor, "b ..."] | None:
        """Return the gradients themselves, if they are at hand."""
        return None

    @abstractmethod
    def measure(self, moments: Moments) -> None:
        """Add it to the second moments of both sides."""

    @abstractmethod
    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        """Return it as matrices, in float32 or wider."""

    @abstractmethod
    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """Return Σ c_i X_i over the examples, without forming the X_i where that is possible."""

    def weighted_along(
        self, c: Float[Tensor, " b"], rows: int, columns: int, along: Float[Tensor, "i k"]
    ) -> Float[Tensor, "r k"]:
        """Return Σ c_i X_i times a matrix, for all its rows or, where those are longer, for pieces of them."""
        whole = self.weighted(c, rows, columns)
        return whole.reshape(-1, len(along)) @ along.to(whole)

    @abstractmethod
    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        """Return Σ |c_i| ‖terms of X_i‖, of which rounding errors are a fraction however much the terms cancel."""

    def transposed(self) -> Contribution:
        """Return the contribution to the transposed matrix."""
        return _Transposed(self)

    def turned(self, shape: Sequence[int], height: int) -> Contribution:
        """Return the contribution to the stack whose transposed matrices make up this one of ``shape``."""
        stack = self.dense(shape[0], shape[1] * shape[2]).view(self.examples, *shape)
        return Direct(stack.mT)

    def inside(self, index: int, height: int) -> Contribution:
        """Return the contribution to a stack of matrices of ``height`` rows, of which this one is entry ``index``."""
        return Inside(self, index, height)


# Called with a parameter's name, a contribution, and the examples it is for, in the order in which backward makes them.
Consumer = Callable[[str, Contribution, slice], None]


@dataclass(frozen=True)
class Outer(Contribution):
    """Σ_t left_t right_tᵀ."""

    left: Float[Tensor, "b t rows"]
    right: Float[Tensor, "b t columns"]

    @property
    def examples(self) -> int:
        return len(self.left)

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_outer(out, name, self.left, self.right)

    def measure(self, moments: Moments) -> None:
        moments.add_outer(self.left, self.right)

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        return wide(self.left).mT @ wide(self.right)

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        left, right = wide(self.left), wide(self.right)
        return left.flatten(0, 1).mT @ (right * c[:, None, None].to(right)).flatten(0, 1)

    def weighted_along(
        self, c: Float[Tensor, " b"], rows: int, columns: int, along: Float[Tensor, "i k"]
    ) -> Float[Tensor, "r k"]:
        if len(along) != columns:
            return super().weighted_along(c, rows, columns, along)
        return Outer(self.left, _times(self.right, along)).weighted(c, rows, along.shape[1])

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        left, right = wide(self.left), wide(self.right)
        return float(((left.norm(dim=2) * right.norm(dim=2)).sum(1).double() * c.abs()).sum())

    def transposed(self) -> Contribution:
        return Outer(self.right, self.left)


@dataclass(frozen=True)
class IndexedRows(Contribution):
    """Row ``index_t`` gets ``right_t``, added up over t."""

    index: Int[Tensor, "b t"]
    right: Float[Tensor, "b t columns"]

    @property
    def examples(self) -> int:
        return len(self.right)

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_rows(out, name, self.index.long(), self.right)

    def measure(self, moments: Moments) -> None:
        moments.add_rows(self.index, self.right)

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        right = wide(self.right)
        index = self.index.long()[..., None].expand_as(right)
        return right.new_zeros(len(right), rows, columns).scatter_add_(1, index, right)

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        right = wide(self.right)
        right = right * c[:, None, None].to(right)
        return right.new_zeros(rows, columns).index_add_(0, self.index.long().flatten(), right.flatten(0, 1))

    def weighted_along(
        self, c: Float[Tensor, " b"], rows: int, columns: int, along: Float[Tensor, "i k"]
    ) -> Float[Tensor, "r k"]:
        if len(along) != columns:
            return super().weighted_along(c, rows, columns, along)
        return IndexedRows(self.index, _times(self.right, along)).weighted(c, rows, along.shape[1])

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        return float((wide(self.right).norm(dim=2).sum(1).double() * c.abs()).sum())


@dataclass(frozen=True)
class Direct(Contribution):
    """The gradients themselves."""

    gradient: Float[Tensor, "b ..."]

    @property
    def examples(self) -> int:
        return len(self.gradient)

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_gradient(out, name, self.gradient)

    def formed(self) -> Float[Tensor, "b ..."] | None:
        return self.gradient

    def measure(self, moments: Moments) -> None:
        moments.add_gradient(self.gradient)

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        return wide(self.gradient).reshape(-1, rows, columns)

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        gradient = wide(self.gradient)
        return (c.to(gradient) @ gradient.reshape(len(gradient), -1)).view(rows, columns)

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        return float((wide(self.gradient).reshape(self.examples, -1).norm(dim=1).double() * c.abs()).sum())


@dataclass(frozen=True)
class Sum(Contribution):
    """Gradients that are a sum over positions, each of the parameter's shape."""

    terms: Float[Tensor, "b t ..."]

    @property
    def examples(self) -> int:
        return len(self.terms)

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        self.added().sketch(phi, name, out)

    def formed(self) -> Float[Tensor, "b ..."] | None:
        return self.added().gradient

    def measure(self, moments: Moments) -> None:
        self.added().measure(moments)

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        return self.added().dense(rows, columns)

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        return self.added().weighted(c, rows, columns)

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        sizes = wide(self.terms).reshape(*self.terms.shape[:2], -1).norm(dim=2)
        return float((sizes.sum(1).double() * c.abs()).sum())

    def added(self) -> Direct:
        """Return the sums."""
        return Direct(self.terms.sum(1, dtype=widened(self.terms.dtype)))


@dataclass(frozen=True)
class Placed(Contribution):
    """Gradients of a tensor whose first dim counts the examples: each example's are zero outside its own entries."""

    terms: Float[Tensor, "b m ..."]

    @property
    def examples(self) -> int:
        return len(self.terms)

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        phi.add_gradient(out, name, self.dense(1, self.terms.numel()))

    def measure(self, moments: Moments) -> None:
        moments.add_gradient(self.dense(1, self.terms.numel()))

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        terms = wide(self.terms).flatten(1)
        return torch.diag_embed(terms.mT).permute(1, 2, 0).reshape(len(terms), rows, columns)

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        return (wide(self.terms).flatten(1) * c[:, None].to(wide(self.terms))).view(rows, columns)

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        return float((wide(self.terms).reshape(self.examples, -1).norm(dim=1).double() * c.abs()).sum())


@dataclass(frozen=True)
class Inside(Contribution):
    """A contribution to one entry of a parameter's first dim, as to one expert's matrix of ``height`` rows."""

    inner: Contribution
    index: int
    height: int

    def turned(self, shape: Sequence[int], height: int) -> Contribution:
        return Inside(self.inner.transposed(), self.index, height)

    @property
    def examples(self) -> int:
        return self.inner.examples

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        right = self.inner.dense(self.height, math.prod(phi.shapes[name][1:]) // self.height).flatten(1)
        phi.add_rows(out, name, torch.full((len(right), 1), self.index, device=right.device), right[:, None])

    def measure(self, moments: Moments) -> None:
        self.inner.measure(moments.part(self.index, self.height))

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        inner = self.inner.dense(self.height, columns // self.height)
        out = inner.new_zeros(len(inner), rows, columns)
        out[:, self.index] = inner.flatten(1)
        return out

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        inner = self.inner.weighted(c, self.height, columns // self.height)
        out = inner.new_zeros(rows, columns)
        out[self.index] = inner.flatten()
        return out

    def weighted_along(
        self, c: Float[Tensor, " b"], rows: int, columns: int, along: Float[Tensor, "i k"]
    ) -> Float[Tensor, "r k"]:
        if len(along) > columns // self.height:
            return super().weighted_along(c, rows, columns, along)
        inner = self.inner.weighted_along(c, self.height, columns // self.height, along)
        out = inner.new_zeros(rows, *inner.shape)
        out[self.index] = inner
        return out.flatten(0, 1)

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        return self.inner.magnitude(c)


@dataclass(frozen=True)
class _Transposed(Contribution):
    """A contribution seen from the transposed matrix."""

    inner: Contribution

    @property
    def examples(self) -> int:
        return self.inner.examples

    def sketch(self, phi: ByParameter, name: str, out: Float[Tensor, "b d"]) -> None:
        rows, columns = phi.shapes[name]
        phi.add_gradient(out, name, self.dense(rows, columns))

    def measure(self, moments: Moments) -> None:
        moments.add_gradient(self.dense(moments.rows, moments.columns))

    def dense(self, rows: int, columns: int) -> Float[Tensor, "b rows columns"]:
        return self.inner.dense(columns, rows).mT

    def weighted(self, c: Float[Tensor, " b"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        return self.inner.weighted(c, columns, rows).mT

    def magnitude(self, c: Float[Tensor, " b"]) -> float:
        return self.inner.magnitude(c)


def _times(x: Tensor, along: Tensor) -> Tensor:
    return wide(x) @ along.to(wide(x))


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is."""
    return x.to(widened(x.dtype))
