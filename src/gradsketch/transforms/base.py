"""The contract every orthonormal transform keeps."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap, widened

__all__ = ["Transform"]


class Transform(LinearMap):
    """An orthonormal map R^n → R^n, out of place (``t(x)``, ``t.T(x)``) or in place (``t.apply_(x)``).

    A concrete transform sets ``shape`` and writes ``_transform_``, which overwrites a contiguous batch.
    """

    @abstractmethod
    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        """Replace every vector by its transform, or by its adjoint transform."""

    def apply_(self, x: Float[Tensor, "... n"], *, adjoint: bool = False) -> Float[Tensor, "... n"]:
        """Overwrite vectors by their transform and return them; needs only cache-sized memory where the kind can.

        Raises:
            InputError: wrong last dim, no vector, not contiguous, not float32 or float64, or part of an autograd graph.
        """
        if x.shape[-1:] != (self.n,) or x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
            raise InputError(
                f"{self!r}.apply_ was given a tensor of shape {list(x.shape)}, strides {x.stride()}, dtype {x.dtype}",
                f"a contiguous float32 or float64 tensor [..., {self.n}]",
                "Call the transform itself, which copies",
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                f"{self!r}.apply_ was given a tensor that requires grad",
                "a tensor outside any graph",
                "Call the transform itself, which is differentiable, or wrap the call in torch.no_grad()",
            )
        if not x.numel():
            raise InputError(
                f"{self!r}.apply_ was given an empty batch", "at least one vector", "Leave empty batches out"
            )
        self._transform_(x.view(-1, self.n), adjoint=adjoint)
        return x

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return self._out_of_place(x, adjoint=False)

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return self._out_of_place(w, adjoint=True)

    def _out_of_place(self, x: Tensor, *, adjoint: bool) -> Tensor:
        out = x.to(widened(x.dtype), copy=True)
        self._transform_(out, adjoint=adjoint)
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n})"
