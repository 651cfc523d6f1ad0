"""A linear map whose rows are given: products of gradients with whole directions in parameter space.

It takes gradients in the forms in which layers give them, as a sketch does. So whatever sketches gradients also
multiplies them with directions, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap, widened
from gradsketch.sketches.block_sum import as_matrix
from gradsketch.transforms.precision import full_precision

__all__ = ["Directions"]

# Entries of gradients that are formed at once.
_AT_ONCE = 1 << 24


class Directions(LinearMap):
    """The map x ↦ (⟨v_1, x⟩, …, ⟨v_d, x⟩) for given vectors over named parameters.

    Example:
        >>> model = torch.nn.Linear(30, 20)
        >>> along = Directions(gs.Parameters(model).shapes, torch.randn(3, 620))
        >>> along(torch.randn(5, 620)).shape
        torch.Size([5, 3])

    Raises:
        InputError: vectors of another length than the parameters have.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], vectors: Float[Tensor, "d n"]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        if vectors.ndim != 2 or vectors.shape[1] != sum(sizes):
            raise InputError(
                f"vectors of shape {list(vectors.shape)}", f"[d, {sum(sizes)}]", "Make them over the same parameters"
            )
        self.vectors, self.shape = vectors, (len(vectors), sum(sizes))
        self.device, self.dtype = vectors.device, vectors.dtype
        self._parts = dict(zip(self.shapes, vectors.split(sizes, dim=1), strict=True))

    @property
    def d(self) -> int:
        """How many vectors there are."""
        return self.shape[0]

    def add_gradient(self, out: Float[Tensor, "b d"], name: str, gradient: Float[Tensor, "b ..."]) -> None:
        """Add the products of one tensor's per-example gradients ``[b, *shape]``."""
        self._add(out, name, gradient.flatten(1))

    def add_vectors(self, out: Float[Tensor, "b d"], gradients: Mapping[str, Float[Tensor, "b _"]]) -> None:
        """Add the products of the per-example gradients of several vectors."""
        for name, gradient in gradients.items():
            self._add(out, name, gradient)

    def add_outer(
        self, out: Float[Tensor, "b d"], name: str, left: Float[Tensor, "b t r"], right: Float[Tensor, "b t c"]
    ) -> None:
        """Add the products of Σ_t left_t right_tᵀ."""
        wide = widened(left.dtype)
        left, right = left.to(wide), right.to(wide)
        for part in _pieces(len(left), left.shape[2] * right.shape[2]):
            self._add(out[part], name, (left[part].mT @ right[part]).flatten(1))

    def add_rows(
        self, out: Float[Tensor, "b d"], name: str, index: Int64[Tensor, "b t"], right: Float[Tensor, "b t c"]
    ) -> None:
        """Add the products of matrices whose row ``index_t`` gets ``right_t``."""
        columns = as_matrix(self.shapes[name])[1]
        tables = self._parts[name].view(self.d, -1, columns).to(out)
        for part in _pieces(len(index), self.d * right[0].numel()):
            out[part] += torch.einsum("dbtc,btc->bd", tables[:, index[part]], right[part].to(out))

    def lift(self, w: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Return Σ w_i v_i."""
        return self.T(w)

    def _add(self, out: Float[Tensor, "b d"], name: str, flat: Float[Tensor, "b m"]) -> None:
        with full_precision(out.device):
            out += flat.to(out) @ self._parts[name].to(out).T

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        dtype = widened(x.dtype)
        with full_precision(x.device):
            return x.to(dtype) @ self.vectors.to(x.device, dtype).T

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        dtype = widened(w.dtype)
        with full_precision(w.device):
            return w.to(dtype) @ self.vectors.to(w.device, dtype)


def _pieces(count: int, size: int) -> Iterator[slice]:
    """Yield ranges of so many examples that what is formed of them stays small."""
    step = max(1, _AT_ONCE // max(1, size))
    return (slice(start, start + step) for start in range(0, count, step))
