"""Training in a subspace, the same again at every run: batches, dropout and steps are functions of the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from gradsketch.as_found import seeded
from gradsketch.dimension.subspace import Subspace
from gradsketch.errors import InputError, NonFiniteError
from gradsketch.gradients.data import Batches, batch_length, to_device
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.random import Stream

__all__ = ["Training", "per_example", "shuffled"]


class Training:
    """Mini-batch Adam (Kingma and Ba 2015) in the first ``d`` dimensions of a subspace; d may grow.

    ``lr`` is about how far one step moves a parameter, in every d: a coordinate of w moves theta by √(n/D) times its
    own step (D the size of the sketch), d of them by √(dn/D), so w gets the learning rate lr·√D/√d. Coordinates that
    join late have Adam state of their own, with the bias correction of a beginner: with one common count of steps
    their first ones would be up to six times too long. Modules stay in the mode they are found in.
    """

    def __init__(
        self, subspace: Subspace, task: Task, data: Any, *, lr: float, d: int, batch_size: int, seed: int
    ) -> None:
        self.subspace, self.task, self.seed, self.lr = subspace, task, seed, lr
        self.batches = Batches(task, data, batch_size)
        self.w, self.d, self.step = subspace.w.detach(), d, 0
        self.optimiser = torch.optim.Adam([self.w[:d]], foreach=False)
        self._dropout = Stream(seed, "Training", "dropout")
        self._reader: Iterator[Batch] | None = None

    def grow(self, d: int) -> None:
        """Train in d dimensions from now on; what the first ones learned stays."""
        if d > self.d:
            self.optimiser.add_param_group({"params": [self.w[self.d : d]]})
            self.d = d

    def advance(
        self, steps: int, schedule: Callable[[int], float] = lambda step: 1.0, bar: tqdm[Any] | None = None
    ) -> float:
        """Take steps, each of ``schedule(step)`` times the learning rate, and return their mean loss.

        A progress bar is moved on with each.

        Raises:
            NonFiniteError: the mean loss is NaN or infinite.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.subspace.w.device)
        first = self.step
        for _ in range(steps):
            total += self.take_step(schedule(self.step))
            if bar is not None:
                bar.update()
        mean = float(total / steps)
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the training loss is {mean} between steps {first} and {self.step}, at d={self.d}",
                "training that does not diverge",
                f"Type lr={self.lr / 4:.2g}, a quarter of this run's",
            )
        return mean

    def take_step(self, factor: float = 1.0) -> Tensor:
        """Take one step and return its loss, finite or not."""
        w = self.subspace.w
        if self._reader is None:
            self._reader = shuffled(self.batches, self.seed, self.step)
        batch = to_device(next(self._reader), w.device)
        # So that dropout does not depend on what was drawn before, or on where a run was interrupted.
        with seeded(int(self._dropout.words(self.step, 1)), w.device), torch.enable_grad():
            loss = per_example(self.task, self.subspace, batch).mean()
            if not loss.requires_grad:
                raise InputError(
                    "a loss that depends on none of the chosen parameters",
                    "parameters that the task uses",
                    "Choose others: Parameters(model, include=...)",
                )
            loss.backward()
        gradient, self.subspace.w.grad = self.subspace.w.grad, None
        assert gradient is not None
        self._move(gradient, factor)
        self.step += 1
        return loss.detach().double()

    def _move(self, gradient: Float[Tensor, " D"], factor: float) -> None:
        start = 0
        for group in self.optimiser.param_groups:
            group["lr"] = factor * self.lr * math.sqrt(len(self.w) / self.d)
            (part,) = group["params"]
            part.grad = gradient[start : start + len(part)]
            start += len(part)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on as if it had not stopped."""
        parts = [len(group["params"][0]) for group in self.optimiser.param_groups]
        return {"step": self.step, "w": self.w, "parts": parts, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned; this Training must still be as it was made."""
        self.step, self._reader = state["step"], None
        self.w.copy_(state["w"])
        for end in list(accumulate(state["parts"]))[1:]:
            self.grow(end)
        self.optimiser.load_state_dict(state["optimiser"])


def shuffled(batches: Batches, seed: int, start: int = 0) -> Iterator[Batch]:
    """Yield batches for ever, from the one of step ``start`` on.

    Raw examples are shuffled anew each epoch by the seed; a DataLoader keeps its own order, and a lone batch comes
    every time.
    """
    stream = Stream(seed, "Training", "epoch")
    epoch, skip = divmod(start, len(batches))
    while True:
        if batches.is_raw:
            order = stream.child(str(epoch)).permutation(len(batches.data))[skip * batches.batch_size :]
            yield from Batches(batches.task, Subset(batches.data, order.tolist()), batches.batch_size)
        else:
            yield from islice(batches, skip, None)
        epoch, skip = epoch + 1, 0


def per_example(task: Task, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
    """Return the task's losses of a batch: as many as it has examples, so that every mean counts the same N.

    Raises:
        InputError: another number of losses.
    """
    losses, examples = task.losses(model, batch), batch_length(batch)
    if len(losses) != examples:
        raise InputError(
            f"{len(losses)} losses from {task!r} for a batch of {examples} examples",
            "one loss per example",
            "Average over the tokens of each example, or sum them",
        )
    return losses
