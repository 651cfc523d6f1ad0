"""The few checkpoints of a training run that tell most: between two of them the loss fell by about the same.

When gradients are taken matters as much as how they are scored: a model that knows its rows by heart has hardly a
gradient left, and one that knows nothing has the same for all. Nobody knows beforehand when the loss will fall. So one
is kept whenever it has changed, and where there are too many, the one goes whose neighbours lie closest.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsketch.as_found import evaluating
from gradsketch.attribution.build import build_index
from gradsketch.attribution.examples import as_examples
from gradsketch.attribution.index import Index
from gradsketch.durable import damaged, is_sealed, read_record, require_same, write_record, write_tensors
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError, StoreError
from gradsketch.gradients.data import Batcher
from gradsketch.gradients.factors.adafactor import adafactor
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.fingerprints import digest, model_facts, task_facts
from gradsketch.gradients.parameters import bare
from gradsketch.gradients.tasks import TaskLike, as_task

__all__ = ["Checkpointer", "Kept"]

_FILE = "checkpoints.json"
_ROWS = 64  # of the training data, on which the loss is measured
_CHANGE = 0.05  # of what the loss has fallen by: less is not kept


@dataclass(frozen=True)
class Kept:
    """A checkpoint: after how many steps, its loss on the measured rows, and the learning rates up to it, added up."""

    step: int
    loss: float
    rates: float


class Checkpointer:
    """Keeps up to ``keep`` checkpoints of a training run in a folder, and makes an index of them.

    The loss on up to 64 rows of the data is measured every ``every`` steps. A checkpoint's weight in the index is the
    sum of the learning rates of the steps since the one before it, as in TracIn. With ``adam=True`` the second moments
    of the optimizer are kept too, and are the metric of the index (see :func:`adafactor`).

    A run that begins again at a later step takes up what is there of the steps before it.

    Source of the weights: G. Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS
    2020, equation 1.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> checkpointer = gs.Checkpointer("runs/kept", task, data, keep=2)
        >>> for _ in range(20):
        ...     task.losses(model, task.collate(data)).mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     checkpointer.step(model, optimizer)
        >>> index = checkpointer.build("runs/traced", model, optimizer, d=32, progress=False)
        >>> len(index.stores)
        2

    Raises:
        InputError: no checkpoint to keep, or steps that are no positive number.
        FingerprintError: the folder holds checkpoints of another task or other data.
    """

    def __init__(
        self,
        directory: str | Path,
        task: TaskLike,
        data: Any,
        *,
        keep: int = 4,
        every: int = 1,
        adam: bool = False,
    ) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}", "a positive integer", f"Type {name}=4")
        self.directory, self.task, self.data = Path(directory), as_task(task), as_examples(data)
        self.keep, self.every, self.adam = keep, every, adam
        self.kept: list[Kept] = []
        self.steps, self.rates = 0, 0.0
        self._begun = self._told = False
        self._first: float | None = None  # the loss before the first step, where it is known
        self._measured: list[tuple[int, float]] = []  # steps, and the learning rates up to them
        self._saved: dict[str, str] = {}  # steps at which somebody saved the weights, and a hash of them
        step = max(1, -(-len(self.data) // _ROWS))
        self._rows = [self.data[row] for row in range(0, len(self.data), step)]
        self._facts: dict[str, Any] = {"task": task_facts(self.task), "rows": digest(self._rows), "adam": adam}

    def begin(self, model: nn.Module, step: int = 0) -> None:
        """Say at which step training begins; a plain loop that begins at the first need not.

        What an earlier run kept up to this step is taken up, and what it kept later is removed.

        Raises:
            FingerprintError: the folder is of another task, other data or a model of other shapes, or of another run:
                its notes by ``saved`` know no such weights at this step.
            StoreError: it is damaged.
        """
        self._begin(model, step)
        if step == 0:
            self._first = self._loss(model)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, rate: float | None = None) -> None:
        """Hear of one step; ``rate`` is its learning rate, by default that of the optimizer now.

        A checkpoint has one weight. Where groups of parameters have rates of their own, that is the mean over all
        parameters that train, and a warning says so.

        Raises:
            InputError: a rate that is no finite number.
            StoreError: the folder cannot be written.
        """
        rate = self.rate(optimizer) if rate is None else rate
        if isinstance(rate, bool) or not isinstance(rate, Real) or not math.isfinite(rate):
            raise InputError(f"rate={rate!r}", "the step's learning rate", "Leave it out")
        if not self._begun:
            self._begin(model, 0)
        self.steps += 1
        self.rates += float(rate)
        if self.steps % self.every == 0:
            self._measured.append((self.steps, self.rates))
            self._consider(model, optimizer)

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Return the learning rate of the optimizer now: the mean over parameters that train; warn of several, once."""
        rates: list[tuple[float, int]] = [
            (float(group["lr"]), tensor.numel())
            for group in optimizer.param_groups
            for tensor in group["params"]
            if tensor.requires_grad
        ]
        several = sorted({rate for rate, _ in rates})
        if len(several) < 2:
            return several[0] if several else 0.0
        mean = sum(rate * count for rate, count in rates) / sum(count for _, count in rates)
        if not self._told:
            self._told = True
            warnings.warn(
                f"parameters with learning rates from {several[0]:g} to {several[-1]:g}: a checkpoint's weight takes "
                f"their mean, {mean:.3g}, so that scores count slow parameters as much as fast ones. Pass rate=, or "
                "index the parameters of one rate with parameters=",
                GradsketchWarning,
                stacklevel=3,
            )
        return mean

    def saved(self, model: nn.Module) -> None:
        """Note that somebody saved the weights now, so that a run that begins again with them is known for the same.

        Raises:
            StoreError: the folder cannot be written.
        """
        self._saved[str(self.steps)] = model_facts(bare(model))["weights"]
        self._note(self.kept)

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the weights that training ended with."""
        if not self.kept or self.kept[-1].step < self.steps:
            self._add(model, optimizer, self._loss(model))

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The files of the checkpoints, by name, as ``build_index`` takes them."""
        return {f"step-{kept.step}": self._weights(kept) for kept in self.kept}

    @property
    def weights(self) -> list[float]:
        """The sum of the learning rates of the steps that each stands for."""
        rates = [0.0, *(kept.rates for kept in self.kept)]
        return [after - before for before, after in pairwise(rates)]

    def build(self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Index:
        """Finish, and sketch the data at every checkpoint; options are those of :func:`build_index`."""
        self.finish(model, optimizer)
        return self.index(path, model, **options)

    def index(self, path: str | Path, model: nn.Module, **options: Any) -> Index:
        """Sketch the data at every checkpoint that was kept so far; ``build`` keeps the last weights first.

        Raises:
            InputError: none was kept.
        """
        if not self.kept:
            raise InputError("a run of which no checkpoint was kept", "one", "Measure more often, with a smaller every")
        if self.adam:
            options["precondition"] = [Factors.load(self._factors(kept)) for kept in self.kept]
        return build_index(
            path, model, self.task, self.data, checkpoints=self.checkpoints, weights=self.weights, **options
        )

    def _consider(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep a checkpoint where the loss has changed."""
        loss = self._loss(model)
        losses = [*self._before(), *(kept.loss for kept in self.kept)]
        least = _CHANGE * (max([*losses, loss]) - min([*losses, loss]))
        if not losses or (loss != losses[-1] and abs(loss - losses[-1]) >= least):
            self._add(model, optimizer, loss)

    def _add(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: float) -> None:
        """Write the weights, then what lies there, and then remove what is too many."""
        new = Kept(self.steps, loss, self.rates)
        _require_own(self._weights(new))
        state = {name: t.detach().cpu() for name, t in bare(model).state_dict().items()}
        write_tensors(self._weights(new), state)
        if self.adam:
            adafactor(model, optimizer).save(self._factors(new))
        self._note(_thinned(self._before(), [*self.kept, new], self.keep))

    def _before(self) -> list[float]:
        return [] if self._first is None else [self._first]

    def _loss(self, model: nn.Module) -> float:
        batcher = Batcher(self.task, device=next(model.parameters()).device)
        with evaluating(model), torch.no_grad():
            parts = batcher.map(lambda batch: self.task.losses(model, batch).sum(), self._rows)
            loss = float(sum(float(part) for _, part in parts)) / len(self._rows)
        if not np.isfinite(loss):
            raise NonFiniteError(f"a loss of {loss} after {self.steps} steps", "a finite one", "Lower the rate")
        return loss

    def _note(self, left: list[Kept]) -> None:
        """Write down what is kept from now on, and remove the files of what is not."""
        gone = [kept for kept in self.kept if kept not in left]
        self.kept = left
        record = {"kept": [asdict(kept) for kept in left], "first": self._first, "measured": self._measured}
        write_record(self.directory / _FILE, {"facts": self._facts, **record, "saved": self._saved})
        for kept in gone:
            self._weights(kept).unlink(missing_ok=True)
            self._factors(kept).unlink(missing_ok=True)

    def _begin(self, model: nn.Module, step: int) -> None:
        self._begun, self.steps, file = True, step, self.directory / _FILE
        shapes = {name: list(tensor.shape) for name, tensor in bare(model).state_dict().items()}
        self._facts |= {"model": {"class": type(bare(model)).__name__, "shapes": digest(shapes)}}
        if not file.exists():
            return
        record = read_record(file)
        require_same(self._facts, record.get("facts"), file)
        try:
            self.kept = [Kept(**kept) for kept in record["kept"]]
            measured = [(int(at), float(rates)) for at, rates in record["measured"]]
            self._first = None if record["first"] is None else float(record["first"])
            saved = {str(at): str(weights) for at, weights in record.get("saved", {}).items()}
        except (LookupError, TypeError, ValueError) as error:
            raise damaged(file, f"{type(error).__name__}: {error}") from error
        if step and saved:
            weights = {"weights": model_facts(bare(model))["weights"]}
            require_same({f"step {step}": weights}, {f"step {step}": {"weights": saved.get(str(step))}}, file)
        self._saved = {at: weights for at, weights in saved.items() if int(at) <= step}
        self._measured = [(at, rates) for at, rates in measured if at <= step]
        # Between two measurements the learning rate hardly changes.
        steps, rates = ([0.0, *(float(pair[i]) for pair in measured)] for i in (0, 1))
        self.rates = float(np.interp(float(step), steps, rates))
        self._note([kept for kept in self.kept if kept.step <= step])

    def _weights(self, kept: Kept) -> Path:
        return self.directory / f"step-{kept.step}.pt"

    def _factors(self, kept: Kept) -> Path:
        return self.directory / f"factors-{kept.step}.pt"


def _require_own(path: Path) -> None:
    """Refuse to write where a file lies that no checkpointer wrote: such a file ends with its checksum."""
    if path.exists() and not is_sealed(path):
        raise StoreError(f"{path}, which gradsketch did not write", "a folder of its own", "Choose another directory")


def _thinned(before: list[float], kept: list[Kept], most: int) -> list[Kept]:
    """Return what stays: the last, and each time not the one between whose neighbours the loss changed least."""
    left = list(kept)
    while len(left) > most:
        losses = [*(before or [left[0].loss]), *(k.loss for k in left)]
        left.pop(int(np.argmin([abs(losses[i + 2] - losses[i]) for i in range(len(left) - 1)])))
    return left
