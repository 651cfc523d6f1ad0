"""Per-example gradients by the textbook: one example at a time, or vmap of grad; and the implicit sketch of [P]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import buffers_aside
from gradsketch.fsdp import Gathered, whole
from gradsketch.gradients.data import batch_length, batch_slice, differentiable
from gradsketch.gradients.per_example.directions import Directions
from gradsketch.gradients.per_example.refusals import running_alone
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.preconditioned import Preconditioned
from gradsketch.transforms.precision import outside_autocast

__all__ = ["accumulated", "gradients_by_loop", "gradients_by_vmap", "implicit_sketches", "projections"]

Gradients = dict[str, Tensor]
_CHUNK_BYTES = 1 << 28


def gradients_by_loop(
    model: nn.Module, task: Task, batch: Batch, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[int, Tensor, Gradients]]:
    """Yield (first position, its loss, gradients ``[1, *shape]`` by name), running every example alone.

    Call it where ``.grad`` is set aside.
    """
    for position in range(batch_length(batch)):
        with running_alone(position), buffers_aside(model):
            losses = whole(task.losses(model, differentiable(batch_slice(batch, position, position + 1))))
        parts = accumulated([(losses, torch.ones_like(losses))], tensors)
        yield position, losses.detach(), {name: whole(part)[None] for name, part in parts.items()}


def gradients_by_vmap(
    model: nn.Module, task: Task, batch: Batch, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[int, Tensor, Gradients]]:
    """Yield (first position, losses, gradients ``[chunk, *shape]`` by name), vmap of grad over chunks of the batch."""
    runner = _Runner(model, task)
    detached = {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}

    def gradients(values: Gradients, example: Batch) -> tuple[Gradients, Tensor]:
        def total(values: Gradients) -> Tensor:
            # Made inside, for models may write to their batch, and not to what a transform finds outside.
            alone = torch.utils._pytree.tree_map(lambda x: x[None].clone() if isinstance(x, Tensor) else x, example)
            return torch.func.functional_call(runner, values, (alone,)).sum()  # type: ignore[no-any-return]

        loss, pulled, *_ = torch.func.vjp(total, values)
        with outside_autocast(loss.device):  # so not grad_and_value
            (found,) = pulled(torch.ones_like(loss))
        return found, loss

    each = torch.func.vmap(gradients, in_dims=(None, 0), randomness="different")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    chunk = max(1, _CHUNK_BYTES // size)
    for start in range(0, batch_length(batch), chunk):
        stop = min(start + chunk, batch_length(batch))
        parts, losses = each(detached, differentiable(batch_slice(batch, start, stop)))
        yield start, losses.detach(), {name: parts[f"model.{name}"] for name in tensors}


def implicit_sketches(
    model: nn.Module,
    task: Task,
    batch: Batch,
    tensors: Mapping[str, Tensor],
    sketch: Sketch | Preconditioned | Directions,
) -> Iterator[tuple[int, Float[Tensor, "1 d"]]]:
    """Yield (position, sketch): the gradient at w = 0 of w ↦ L(theta0 + Phiᵀ w), [P] eq. 5."""
    runner = _Runner(model, task)
    like = next(iter(tensors.values()))
    dtype = widened(like.dtype)
    for position in range(batch_length(batch)):
        w = torch.zeros(sketch.d, dtype=dtype, device=like.device, requires_grad=True)
        steps = sketch.lift(w).split([t.numel() for t in tensors.values()])
        moved = {
            f"model.{name}": tensor.detach() + step.view_as(tensor).to(tensor)
            for (name, tensor), step in zip(tensors.items(), steps, strict=True)
        }
        example = differentiable(batch_slice(batch, position, position + 1))
        losses = torch.func.functional_call(runner, moved, (example,))
        yield position, accumulated([(losses, torch.ones_like(losses))], {"w": w})["w"][None]


class _Runner(nn.Module):
    """Makes a task's losses the forward of a module, so that functional_call can put other tensors in its model."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> Any:
        return self.task.losses(self.model, batch)


def accumulated(
    parts: Iterable[tuple[Tensor, Tensor]], tensors: Mapping[str, Tensor], *, keep: bool = False
) -> Gradients:
    """Return the gradients of Σ weight · loss that backward passes leave in ``.grad``, and leave nothing there.

    Reversible layers fill ``.grad`` by backward passes of their own, of which ``torch.autograd.grad`` returns nothing.
    Each of the ``parts``, losses and their weights, is made when the one before is done, and may leave something in
    ``.grad`` as well. Call it where ``.grad`` is set aside; ``keep`` the graph if it is still wanted.
    """
    found: Gradients = {}
    for losses, weights in parts:
        for tensor in tensors.values():
            tensor.grad = None
        if losses.requires_grad:
            with outside_autocast(losses.device):
                losses.backward(weights, retain_graph=keep)
        for name, tensor in tensors.items():
            if tensor.grad is not None:
                # Not by torch in place: gradients of tensors that were stacked can be one piece of memory.
                found[name] = found[name] + _strided(tensor.grad) if name in found else _strided(tensor.grad)
            tensor.grad = None
    return {name: found[name] if name in found else torch.zeros_like(t) for name, t in tensors.items()}


def projections(
    parts: Iterable[tuple[Tensor, Tensor]],
    gathered: Gathered,
    project: Callable[[str, Tensor], Tensor],
    *,
    keep: bool = False,
) -> Gradients:
    """Return linear projections of the gradients of Σ weight · loss, holding one gradient at a time.

    Gradients of several leaves of one name are added up. Nothing reaches ``.grad``, so FSDP2 finds nothing to reduce.
    """
    found = {name: project(name, torch.zeros_like(leaf)) for name, leaf in gathered.leaves}

    def taking(name: str) -> Callable[[Tensor], Tensor]:
        def take(gradient: Tensor) -> Tensor:
            found[name] = found[name] + project(name, _strided(gradient))
            return gradient.new_zeros(()).expand_as(gradient)

        return take

    for losses, weights in parts:
        with ExitStack() as stack, outside_autocast(losses.device):
            for name, leaf in gathered.leaves:
                stack.enter_context(leaf.register_hook(taking(name)))
            leaves = [leaf for _, leaf in gathered.leaves]
            torch.autograd.grad(losses, leaves, weights, allow_unused=True, retain_graph=keep)
    return found


def _strided(gradient: Tensor) -> Tensor:
    """Return a gradient that may be sparse, as embeddings can have them, as an ordinary tensor."""
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient
