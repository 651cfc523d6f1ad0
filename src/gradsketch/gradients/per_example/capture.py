"""Every contribution to a batch's per-example gradients: captured in one backward pass, or formed where that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.per_example.contributions import Consumer, Contribution, Direct
from gradsketch.gradients.per_example.explicit import gradients_by_loop, gradients_by_vmap
from gradsketch.gradients.per_example.interception import Interception, reached
from gradsketch.gradients.per_example.layout import Layout, Layouts
from gradsketch.gradients.per_example.proof import prove_layouts
from gradsketch.gradients.per_example.rules import RULES
from gradsketch.gradients.tasks import Batch, Task

__all__ = ["Capture"]

# Called with a parameter's name, a contribution, and the examples it belongs to.
Sink = Callable[[str, Contribution, slice], None]


class Capture:
    """Hands every contribution to the per-example gradients of chosen parameters to a sink, batch after batch.

    Remembers what earlier batches taught: the layouts that were proved, and which parameters need the slow path. Call
    it inside ``differentiating``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        tensors: Mapping[str, Tensor],
        method: Literal["auto", "outer", "vmap", "loop"] = "auto",
    ) -> None:
        self.model, self.task, self.tensors, self.method = model, task, tensors, method
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._slow: set[str] = set()
        self._layouts: dict[str, Layout] | None = None
        self._vmap_failed = False
        self._warned_of_chance = False

    def __call__(self, batch: Batch, sink: Sink) -> Float[Tensor, " b"]:
        """Hand over the contributions of one batch and return its losses."""
        if self.method in ("auto", "outer"):
            everybody = slice(None)
            losses = self._intercepted(batch, lambda name, contribution: sink(name, contribution, everybody))
            slow = {name: tensor for name, tensor in self.tensors.items() if name in self._slow}
        else:
            losses, slow = self.losses(batch).detach(), dict(self.tensors)
        for position, gradients in self._explicit(batch, slow):
            for name, gradient in gradients.items():
                sink(name, Direct(gradient), slice(position, position + len(gradient)))
        return losses

    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        """Return the task's losses, one an example."""
        before = self._random_states()
        losses = self.task.losses(self.model, batch)
        if not self._warned_of_chance and not all(map(torch.equal, before, self._random_states())):
            self._warn_of_chance()
        if losses.shape != (batch_length(batch),):
            raise InputError(
                f"{self.task!r} returned losses of shape {list(losses.shape)} for {batch_length(batch)} examples",
                f"one loss an example, shape [{batch_length(batch)}]",
                "Use reduction='none' and sum over everything but the first dim",
            )
        return losses

    def _random_states(self) -> list[Tensor]:
        devices = {tensor.device for tensor in self.tensors.values() if tensor.is_cuda}
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    def _warn_of_chance(self) -> None:
        self._warned_of_chance = True
        warnings.warn(
            "the loss draws random numbers, as dropout does in training mode: each gradient is that of one draw and "
            "changes with the batch and from run to run; call model.eval() for gradients of the model as it is used",
            GradsketchWarning,
            stacklevel=2,
        )

    def _intercepted(self, batch: Batch, add: Consumer) -> Tensor:
        if self._layouts is None and batch_length(batch) > 1:
            self._layouts = prove_layouts(self.losses, batch, self._names)
        tap = Interception(RULES, self._names, Layouts(batch_length(batch), self._layouts or {}), add)
        with tap:
            losses = self.losses(batch)
        if losses.requires_grad:
            self._find_slow(losses)
            tap.slow = self._slow
            tap.backward(losses, torch.ones_like(losses))
        return losses.detach()

    def _find_slow(self, losses: Tensor) -> None:
        new = {self._names[id(t)] for t in reached(losses) if id(t) in self._names} - self._slow
        if not new:
            return
        listed = ", ".join(sorted(new)[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        if self.method == "outer":
            raise InputError(
                f"{listed}, used in a way that method='outer' does not know",
                "parameters of layers it knows",
                "Type method='auto', or exclude them",
            )
        warnings.warn(
            f"{listed}: used in a way that cannot be captured during backward, so their gradients are formed one "
            f"example after another (exact, slower); leave them out with Parameters(model, exclude=...)",
            GradsketchWarning,
            stacklevel=7,
        )
        self._slow |= new

    def _explicit(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (first position, gradients by name) over the batch: by vmap, and from where it fails by a loop."""
        done = 0
        if tensors and self.method != "loop" and not self._vmap_failed:
            try:
                for position, gradients in gradients_by_vmap(self.model, self.task, batch, tensors):
                    done = position + len(next(iter(gradients.values())))
                    yield position, gradients
            except Exception as error:
                if self.method == "vmap":
                    raise InputError(
                        f"a model that vmap cannot run ({type(error).__name__}: {str(error).splitlines()[0]})",
                        "operations that torch.func.vmap knows",
                        "Type method='auto' or method='loop'",
                    ) from error
                self._vmap_failed = True
        if tensors and done < batch_length(batch):
            rest = batch_slice(batch, done, batch_length(batch))
            for position, gradients in gradients_by_loop(self.model, self.task, rest, tensors):
                yield done + position, gradients
