"""TiledSRHT: a sketch of a matrix, computed from its factors where it is a sum of outer products."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.recipe import register
from gradsketch.sketches.tiling import Tiling
from gradsketch.transforms.precision import full_precision

__all__ = ["TiledSRHT"]


@register
class TiledSRHT(Sketch):
    """Sums of a few entries of (H B_r) X (H B_c)ᵀ, taken in tiles; X has rows × columns = n entries, row by row.

    For X = Σ_t g_t a_tᵀ, the gradient of a linear layer, ``outer`` transforms the factors and multiplies only the
    tiles that are kept: X is never formed. For d up to 16,384 a number is the sum of up to four entries, beyond of two;
    sides of up to 4096 or d/2 coordinates are transformed whole, longer ones folded first. Without a fold the noise is
    at most 1.12 of a dense sketch's, or 1.22, whatever X is; ``sketches/layout.py`` states the model. One entry a
    number, in tiles of 1 × 1, would make it a TensorSRHT, one tile a Kronecker SRHT.

    Source: T. Ahle et al., "Oblivious Sketching of High-Degree Polynomial Kernels", SODA 2020 (TensorSRHT).

    Example:
        >>> phi = gs.TiledSRHT(8, 4, 16)
        >>> g, a = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
        >>> torch.allclose(phi.outer(g, a), phi((g.mT @ a).flatten(1)), atol=1e-5)
        True

    Raises:
        InputError: rows, columns or d is not a positive integer, or d > rows·columns.
    """

    version = 3
    nesting = "prefix"
    least_n = 1  # a parameter may be one number
    from_sizes = False

    def __init__(
        self, rows: int, columns: int, d: int, *, seed: int = 0, name: str = "", layout_d: int | None = None
    ) -> None:
        super().__init__(rows * columns, d, seed=seed)
        self.rows, self.columns, self.name = rows, columns, name
        self.tiling = Tiling(rows, columns, d, self.stream.child(name), layout_d)

    def options(self) -> dict[str, str | int | float | bool]:
        return {"rows": self.rows, "columns": self.columns, "name": self.name, "layout_d": self.tiling.layout_d}

    def arguments(self) -> dict[str, Any]:
        return {"d": self.d, "seed": self.seed, **self.options()}

    def outer(self, left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]) -> Float[Tensor, "b d"]:
        """Return the sketches of the b matrices Σ_t left_t right_tᵀ.

        Raises:
            InputError: shapes that do not match the matrix.
        """
        if left.shape[:2] != right.shape[:2] or left.shape[2] != self.rows or right.shape[2] != self.columns:
            raise InputError(
                f"factors of shapes {list(left.shape)} and {list(right.shape)}",
                f"[b, t, {self.rows}] and [b, t, {self.columns}]",
                "Pass output gradients first and inputs second, or the other way round for a transposed weight",
            )
        out = self._empty(left)
        with full_precision(left.device):
            self.tiling.add_outer(out, left, right)
        return out

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        out = self._empty(x)
        with full_precision(x.device):
            # One vector at a time, so that the bits do not depend on how many there are.
            for vector, sketch in zip(x.split(1), out.split(1), strict=True):
                self.tiling.add_matrix(sketch, vector.view(1, self.rows, self.columns))
        return out

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        w = w.to(widened(w.dtype))
        with full_precision(w.device):
            return torch.cat([self.tiling.adjoint(vector).flatten(1) for vector in w.split(1)])

    def _empty(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.d, dtype=widened(x.dtype))
