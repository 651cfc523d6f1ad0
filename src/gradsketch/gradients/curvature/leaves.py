"""Leaves to differentiate with respect to, in the place of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.transforms.precision import outside_autocast

__all__ = ["Leaves", "derivatives", "split_as"]


class Leaves:
    """Autograd leaves that share the memory of given tensors; their gradients are added to a flat vector.

    A leaf's gradient is added to its place in the target and freed as soon as it is complete. A product so holds its
    result and one parameter's gradient more, and accumulates in the target's dtype, whatever the weights' is.
    """

    def __init__(self, values: Iterable[Tensor]) -> None:
        self.tensors: list[Tensor] = [value.detach().requires_grad_() for value in values]
        self._sink = _Sink()
        for index, leaf in enumerate(self.tensors):
            leaf.register_post_accumulate_grad_hook(partial(self._sink.collect, index))

    @contextmanager
    def adding_to(self, target: Float[Tensor, " n"], scale: float = 1.0) -> Iterator[None]:
        """Let every backward pass inside add ``scale`` times its gradient to ``target``."""
        self._sink.pieces, self._sink.scale = split_as(target, self.tensors), scale
        try:
            yield
        finally:
            self._sink.pieces = []
            for leaf in self.tensors:
                leaf.grad = None

    def add(self, index: int, tensor: Tensor) -> None:
        """Add a tensor to the place of leaf ``index`` in the target."""
        self._sink.add(index, tensor)

    def backward(
        self,
        roots: Sequence[Tensor | torch.autograd.graph.GradientEdge],
        vectors: Sequence[Tensor] | None = None,
        *,
        retain: bool = False,
    ) -> None:
        """Add Σ rootᵀ·vector's gradient to the target; nothing where there is no root."""
        if roots:
            with outside_autocast(self.tensors[0].device):
                torch.autograd.backward(roots, vectors, inputs=self.tensors, retain_graph=retain)  # type: ignore[arg-type]


def derivatives(outputs: Any, inputs: Sequence[Tensor], *vectors: Any, **options: Any) -> tuple[Any, ...]:
    """Return what ``torch.autograd.grad`` returns, outside the caller's autocast, which would round it."""
    with outside_autocast(inputs[0].device):
        return torch.autograd.grad(outputs, inputs, *vectors, **options)


class _Sink:
    """Where the gradients of a set of leaves go. Knows no leaf, so that leaf and hook form no reference cycle."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.scale = 1.0

    def add(self, index: int, tensor: Tensor) -> None:
        piece = self.pieces[index]
        piece.add_(tensor.detach().to(piece.device), alpha=self.scale)

    def collect(self, index: int, leaf: Tensor) -> None:
        """Add a leaf's complete gradient to its place and free it."""
        assert leaf.grad is not None
        self.add(index, leaf.grad)
        leaf.grad = None


def split_as(vector: Float[Tensor, " n"], like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into views shaped as the given tensors."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
