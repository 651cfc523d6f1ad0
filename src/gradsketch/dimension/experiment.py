"""What a search, a curve and a fine-tuning have in common: model, task, data, metric, and how one trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from time import perf_counter
from typing import Any

from torch import nn
from tqdm import tqdm

from gradsketch.dimension.metrics import Metric, evaluated, is_lower_better, metric_facts
from gradsketch.dimension.results import CurvePoint, Settings
from gradsketch.dimension.rotated import prefix_nested
from gradsketch.dimension.step_length import measured_lr
from gradsketch.dimension.subspace import Subspace
from gradsketch.dimension.training import Training
from gradsketch.errors import InputError
from gradsketch.fsdp import require_whole
from gradsketch.gradients.data import Batches
from gradsketch.gradients.fingerprints import data_facts, model_facts, modes_digest, task_facts
from gradsketch.gradients.parameters import Parameters, Selection, selected
from gradsketch.gradients.tasks import Task, TaskLike, as_task
from gradsketch.progress import hidden
from gradsketch.sketches.base import Sketch

__all__ = ["Experiment", "SketchKind", "check_counts", "check_positive"]

# A sketch class, or any function (n, d, seed=...) → sketch.
SketchKind = Callable[..., Sketch]


@dataclass(frozen=True)
class Experiment:
    """Everything that stays the same while the number of dimensions changes."""

    model: nn.Module
    task: Task
    train: Any
    evaluate: Metric
    parameters: Parameters
    sketch: SketchKind
    lr: float | None
    """None: to be measured."""
    batch_size: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        task: TaskLike,
        train: Any,
        evaluate: Metric,
        parameters: Selection,
        sketch: SketchKind,
        lr: int | float | None,
        batch_size: int,
    ) -> Experiment:
        """Check and complete what a user passed.

        Raises:
            InputError: data that is empty or can be read only once, lr or batch_size not positive, evaluate not
                callable.
        """
        require_whole(
            model, "a search of dimensions", "Load the model in one piece, or train a gs.Subspace of your own d"
        )
        check_counts(batch_size=batch_size)
        check_positive(**({} if lr is None else {"lr": lr}))
        if not callable(evaluate):
            raise InputError(
                f"evaluate of type {type(evaluate).__name__}",
                "a function from the model to a number",
                "Type evaluate=Accuracy(task, test_data), or write your own",
            )
        task = as_task(task)
        Batches(task, train, batch_size)
        parameters = selected(model, parameters)
        return cls(model, task, train, evaluate, parameters, sketch, None if lr is None else float(lr), batch_size)

    @property
    def n(self) -> int:
        """Number of parameters that may move."""
        return self.parameters.n

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values of the metric are better."""
        return is_lower_better(self.evaluate)

    def gain(self, value: float, before: float) -> float:
        """Return by how much a value is better than one before."""
        return before - value if self.lower_is_better else value - before

    def with_lr(self, d_max: int, seed: int) -> Experiment:
        """Return the same with a learning rate: the one given, or else measured in ``d_max`` dimensions."""
        if self.lr is not None:
            return self
        with self._subspace(d_max, seed) as subspace:
            start = subspace.w.detach().clone()

            def begun(lr: float) -> Training:
                subspace.w.detach().copy_(start)
                return replace(self, lr=lr)._training(subspace, d_max, seed)

            return replace(self, lr=measured_lr(begun))

    @contextmanager
    def training(self, d_max: int, d: int, seed: int) -> Iterator[Training]:
        """Open a subspace of d_max dimensions of which the first d train; the model is left as found at the end."""
        with self._subspace(d_max, seed) as subspace:
            yield self._training(subspace, d, seed)

    def _subspace(self, d_max: int, seed: int) -> Subspace:
        return Subspace(self.model, self.parameters, prefix_nested(self.sketch(self.n, d_max, seed=seed)))

    def _training(self, subspace: Subspace, d: int, seed: int) -> Training:
        assert self.lr is not None
        return Training(subspace, self.task, self.train, lr=self.lr, d=d, batch_size=self.batch_size, seed=seed)

    def evaluated(self, where: str) -> float:
        """Return the metric of the model as it stands."""
        return evaluated(self.evaluate, self.model, where)

    def reaches(self, value: float, target: float) -> bool:
        """Return whether a value is as good as the target."""
        return self.gain(value, target) >= 0

    def point(self, d: int, seed: int, steps: int, progress: bool | None) -> CurvePoint:
        """Train in d dimensions from theta0, the learning rate falling linearly to zero, and evaluate."""
        start = perf_counter()
        tail = max(1, steps // 10)

        def fall(step: int) -> float:
            return 1 - step / steps

        with (
            self.training(d, d, seed) as training,
            tqdm(total=steps, desc=f"training, d={d}", unit="step", leave=False, disable=hidden(progress)) as bar,
        ):
            if steps > tail:
                training.advance(steps - tail, fall, bar)
            loss = training.advance(tail, fall, bar)
            value = self.evaluated(f"after {steps} steps at d={d}, seed {seed}")
        return CurvePoint(d, seed, value, loss, steps, perf_counter() - start)

    def settings(self, d: int) -> Settings:
        """Return what a result says about how it was made, the seed apart; d is the largest dimension."""
        sketch = self.sketch(self.n, d, seed=0)
        return {
            "sketch": ", ".join([type(sketch).__name__, *(f"{k}={v}" for k, v in sketch.options().items())]),
            "parameters": self.parameters.fingerprint(),
            "theta0": self.parameters.fingerprint(content=True),
            "n": self.n,
            "task": repr(self.task),
            "metric": getattr(self.evaluate, "__qualname__", type(self.evaluate).__name__),
            "examples": len(self.train),
            "batch_size": self.batch_size,
            "lr": self.lr,
        }

    def facts(self) -> dict[str, Any]:
        """Return what else decides the outcome, for resuming: what was in the model, the data and the metric."""
        return {
            "model": model_facts(self.model),
            "modes": modes_digest(self.model),
            "losses": task_facts(self.task),
            "data": data_facts(Batches(self.task, self.train, self.batch_size)),
            "measured by": metric_facts(self.evaluate),
        }


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are not several different ones, because each counts as a draw of its own."""
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise InputError(f"seeds={seeds!r}", "a list of seeds", "Type seeds=(0,)")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={tuple(seeds)}, one of them twice", "different seeds", "Type seeds=(0, 1, 2)")


def check_positive(**values: int | float) -> None:
    """Refuse numbers that are not positive and finite."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise InputError(f"{name}={value!r}", "a positive number", f"Type {name}=..., larger than 0")


def check_counts(**values: int) -> None:
    """Refuse what is no positive whole number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InputError(f"{name}={value!r}", "a positive whole number", f"Type {name}=..., 1 or more")
