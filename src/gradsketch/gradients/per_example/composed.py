"""Rules for functions that others compose: these are called instead, with interception, so that their rules apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsketch.gradients.per_example.interception import Interception, Rule

__all__ = ["COMPOSED"]


def _of(composition: Callable[..., Tensor]) -> Rule:
    """Return the rule for a function of two tensors, one of which is a parameter."""

    def rule(tap: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("out", None) is not None:
            return NotImplemented
        with tap:
            return composition(*args, **kwargs)

    return rule


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2) -> Tensor:
    """Sums over pairs of dims, as the product of [*of a, k] with [k, *of b]."""
    if isinstance(dims, int):
        dims = [list(range(a.ndim - dims, a.ndim)), list(range(dims))]
    left, right = ([int(d) % t.ndim for d in each] for t, each in zip((a, b), dims, strict=True))
    kept = [d for d in range(a.ndim) if d not in left], [d for d in range(b.ndim) if d not in right]
    width = math.prod(a.shape[d] for d in left)
    shapes = [a.shape[d] for d in kept[0]], [b.shape[d] for d in kept[1]]
    rows = a.permute(*kept[0], *left).reshape(*(shapes[0] or [1]), width)
    columns = b.permute(*right, *kept[1]).reshape(width, -1)
    return (rows @ columns).reshape(*shapes[0], *shapes[1])


def _outer(input: Tensor, vec2: Tensor) -> Tensor:
    return input.unsqueeze(1) * vec2.unsqueeze(0)


def _kron(input: Tensor, other: Tensor) -> Tensor:
    ndim = max(input.ndim, other.ndim)
    one, two = ([1] * (ndim - t.ndim) + list(t.shape) for t in (input, other))
    product = input.reshape(_between(one, 0)) * other.reshape(_between(two, 1))
    return product.reshape([i * j for i, j in zip(one, two, strict=True)])


def _between(sizes: Sequence[int], place: int) -> list[int]:
    """Return sizes with ones between them: after each, or before."""
    return [size for each in sizes for size in ((each, 1) if place == 0 else (1, each))]


def _dot(input: Tensor, tensor: Tensor) -> Tensor:
    return (input.unsqueeze(0) @ tensor).squeeze(0)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    first, second = (x / x.norm(dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    product: Tensor = first * second
    return product.sum(dim)


COMPOSED: dict[Any, Rule] = {
    torch.tensordot: _of(_tensordot),
    torch.nn.functional.cosine_similarity: _of(_cosine_similarity),
    **dict.fromkeys((torch.outer, torch.ger, Tensor.outer, Tensor.ger), _of(_outer)),
    **dict.fromkeys((torch.kron, Tensor.kron), _of(_kron)),
    **dict.fromkeys((torch.dot, torch.vdot, Tensor.dot, Tensor.vdot), _of(_dot)),
}
