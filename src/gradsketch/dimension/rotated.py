"""A sketch seen in a basis in which its first d numbers are a good sketch of size d.

Kinds nested by folding (SJLT, BlockSum) are followed by H_D, after which a prefix is what folding was. The numbers of
QK are ordered so that a prefix takes rows of every factor in turn; in their own order 2^8 of them span few rows of one
factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.qk import QK
from gradsketch.sketches.recipe import register
from gradsketch.transforms.hadamard import hadamard_factors
from gradsketch.transforms.kronecker import kronecker_

__all__ = ["prefix_nested"]


def prefix_nested(sketch: Sketch) -> Sketch:
    """Return a sketch whose first d numbers can be trained alone: itself, or itself in another basis.

    A sketch nested by folding is followed by H_D. The first d rows of H_D add up the blocks of length d,
    R_d H_D = √(d/D) · H_d · fold_d, so that after H_D a prefix is what folding was before. The numbers of QK are put in
    an order in which every prefix takes about as many rows of each of its factors, as QK itself does.

    Raises:
        InputError: a sketch nested by folding whose size is no power of two.
    """
    if isinstance(sketch, QK):
        return _Balanced(sketch)
    return _Rotated(sketch) if sketch.nesting == "fold" else sketch


@register
class _Rotated(Sketch):
    from_sizes = False
    nesting = "prefix"

    def __init__(self, inner: Sketch) -> None:
        if inner.d & (inner.d - 1):
            raise InputError(f"{inner!r}", "a power of two for d", f"Type d={1 << (inner.d.bit_length() - 1)}")
        super().__init__(inner.n, inner.d, seed=inner.seed)
        self.inner = inner

    def options(self) -> dict[str, str | int | float | bool]:
        return {"inner": self.inner.fingerprint}

    def arguments(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return _rotated(self.inner._apply(x))

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self.inner._apply_adjoint(_rotated(w))


@register
class _Balanced(Sketch):
    """QK with its numbers in the order of factor rows that come in by doubling, one factor after the other."""

    from_sizes = False

    def __init__(self, inner: QK) -> None:
        super().__init__(inner.n, inner.d, seed=inner.seed)
        self.inner, self.order = inner, _doubling_order([rows for rows, _ in inner.sizes])

    def options(self) -> dict[str, str | int | float | bool]:
        return {"inner": self.inner.fingerprint}

    def arguments(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self.inner._apply(x)[:, self.order.to(x.device)]

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        u = torch.empty_like(w)
        u[:, self.order.to(w.device)] = w
        return self.inner._apply_adjoint(u)


def _doubling_order(sizes: list[int]) -> Int64[Tensor, " d"]:
    """Return the positions of a grid (last index fastest) so that every prefix of 2^k is a block with equal sides."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    order, sides = torch.zeros(1, dtype=torch.int64, device="cpu"), [1] * len(sizes)
    while len(order) < math.prod(sizes):
        i = min((i for i, size in enumerate(sizes) if sides[i] < size), key=lambda i: sides[i])
        order = torch.cat([order, order + sides[i] * strides[i]])
        sides[i] *= 2
    return order


def _rotated(u: Tensor) -> Tensor:
    u = u.clone()
    kronecker_(u, hadamard_factors(u.shape[-1], u.dtype, u.device))
    return u
