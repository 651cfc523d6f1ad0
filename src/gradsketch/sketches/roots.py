"""Symmetric matrices that act on the gradient of a parameter from both sides: X ↦ L X R.

They are the roots of a metric's inverse. A parameter's gradient X is seen as BlockSum sees it, as a matrix of its first
dim against the rest, a vector as one row. Each side is a scalar, a diagonal or a whole matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.linear_map import widened

__all__ = ["Pair", "Root", "Roots", "Stack", "digest_of", "roots_of", "state_of"]


@dataclass(frozen=True, eq=False)
class Root:
    """One symmetric matrix: ``values`` is a scalar [], a diagonal [n] or all of it [n, n]."""

    values: Tensor
    _cache: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def is_whole(self) -> bool:
        """Whether it mixes entries, and does not only scale them."""
        return self.values.ndim == 2

    def times(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return x M, in float32 or wider."""
        x = x.to(widened(x.dtype))
        return x @ self.like(x) if self.is_whole else x * self.like(x)

    def like(self, x: Tensor) -> Tensor:
        """Return the values in the dtype and on the device of a tensor."""
        key = x.dtype, x.device
        if key not in self._cache:
            self._cache[key] = self.values.to(x)
        return self._cache[key]


@dataclass(frozen=True)
class Pair:
    """X ↦ L X R: ``rows`` is L and ``columns`` is R."""

    rows: Root
    columns: Root

    def matrix(self, x: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b rows columns"]:
        """Return L X R of every matrix."""
        return self.rows.times(self.columns.times(x).mT).mT

    def state(self) -> dict[str, Any]:
        """Return the tensors of both sides."""
        return {"rows": self.rows.values, "columns": self.columns.values}


@dataclass(frozen=True)
class Stack:
    """A pair for each matrix of a stack, such as the experts of a layer; as one matrix the stack has a row for each."""

    pairs: tuple[Pair, ...]
    height: int

    def matrix(self, x: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b rows columns"]:
        """Return each row's L X R."""
        return torch.stack([self.row(x[:, i], i) for i in range(len(self.pairs))], dim=1)

    def row(self, x: Float[Tensor, "b columns"], index: int) -> Float[Tensor, "b columns"]:
        """Return L X R of the matrices that are this row of the stack."""
        return self.pairs[index].matrix(x.unflatten(1, (self.height, -1))).flatten(1)

    def state(self) -> dict[str, Any]:
        """Return the tensors of all pairs."""
        return {"pairs": [pair.state() for pair in self.pairs], "height": self.height}


# The roots of a model's metric, by parameter name; a parameter without an entry stays as it is.
Roots = Mapping[str, Pair | Stack]


def state_of(roots: Roots) -> dict[str, Any]:
    """Return the tensors of all roots, in dicts and lists that ``torch.load`` reads as weights."""
    return {name: root.state() for name, root in roots.items()}


def roots_of(state: Mapping[str, Any]) -> dict[str, Pair | Stack]:
    """Return what ``state_of`` was given."""
    return {
        name: Stack(tuple(map(_pair, part["pairs"])), part["height"]) if "pairs" in part else _pair(part)
        for name, part in state.items()
    }


def _pair(state: Mapping[str, Any]) -> Pair:
    return Pair(Root(state["rows"]), Root(state["columns"]))


def digest_of(roots: Roots) -> str:
    """Hash names and every number of the roots."""
    hashed = hashlib.sha256()
    for name, root in sorted(roots.items()):
        for pair in root.pairs if isinstance(root, Stack) else (root,):
            for values in (pair.rows.values, pair.columns.values):
                hashed.update(f"{name}{values.dtype}{list(values.shape)}".encode())
                hashed.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
