"""The intrinsic dimension, by doubling in a single run.

The search trains a prefix of one sketch of size D, and lr means one thing in every d. With E[PhiᵀPhi] = I, Adam with
learning rate lr on d coordinates moves each parameter by about lr a step, whatever d is. Inside a sketch of size D that
reads lr·√D/√d. Coordinates that join late are a parameter group of their own in Adam, because with one common count of
steps their bias correction would be that of veterans. d doubles where the gain over the best evaluation so far is below
min_gain. It is not compared with the last one, which noise can beat for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from gradsketch.dimension.curve import check_dims
from gradsketch.dimension.experiment import Experiment, SketchKind, check_counts, check_positive, check_seeds
from gradsketch.dimension.journal import Journal
from gradsketch.dimension.metrics import Metric
from gradsketch.dimension.results import Check, CurvePoint, IntrinsicDimension, Search, Settings, settled
from gradsketch.dimension.training import Training
from gradsketch.durable import read_tensors, require_same, write_tensors
from gradsketch.errors import InputError
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import TaskLike
from gradsketch.progress import hidden
from gradsketch.sketches.affd import AFFD

__all__ = ["intrinsic_dimension"]

# The gain below which a dimension counts as exhausted, as a share of the way from the first metric to the target.
_MIN_GAIN = 0.02


def intrinsic_dimension(
    model: nn.Module,
    task: TaskLike,
    train: Any,
    evaluate: Metric,
    *,
    target: int | float,
    d_min: int = 16,
    d_max: int | None = None,
    check_every: int = 100,
    min_gain: int | float | None = None,
    lr: int | float | None = None,
    parameters: Selection = None,
    sketch: SketchKind = AFFD,
    batch_size: int = 32,
    seeds: Sequence[int] = (0,),
    confirm: bool = False,
    full: int | float | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> IntrinsicDimension:
    """Find in how many random directions training reaches a target, to a factor of two, in one run a seed.

    Trains with Adam in the first d dimensions of one subspace of d_max, from d = d_min. Every ``check_every`` steps
    the metric is taken: the search ends where it reaches ``target``; d doubles where it gained less than ``min_gain``
    over the best before. What was trained is kept when d grows. A target that is not reached is no error: the result
    says how far the search got. The model is left as found.

    A metric that fell on the way is noisy: it must then exceed the target by twice its noise (the standard deviation
    about a monotone fit), or reach it three times in a row. The result's ``interval`` goes from the first dimension
    that may reach the target, noise allowed for, to the one in which every seed did; more than a factor of four is
    ``inconclusive``.

    Source: A. Schioppa (arXiv 2402.03994), section 4.3 and Table 10; Li et al. (ICLR 2018) for the definition.

    Args:
        model: any module. Modules train in the mode they are in: call ``model.train()`` first to have dropout.
        task: losses of the training, a ``Task`` or a function (model, batch) → losses [b].
        train: training examples (a sequence is shuffled by the seed), a DataLoader that does not shuffle, or one batch.
        evaluate: ``Accuracy``, ``Loss``, ``Rouge``, ``ExactMatch``, or any function from the model to a number.
        target: the metric to reach, often 90 % of what ``fine_tune`` reaches.
        d_min, d_max: first and largest dimension; d_max is by default the largest power of two up to n and 2^20.
        check_every: steps between two evaluations.
        min_gain: by default 2 % of the way from the metric at the start to the target.
        lr: about how far one step moves a parameter, like Adam's learning rate in full training, and of one meaning
            for every d: coordinates get the learning rate lr·√d_max/√d. One learning rate for all d would move theta
            √d times as far, and diverge at large d. By default the largest whose first steps in all d_max
            dimensions lower the training loss as much as any; ``settings["lr"]`` says which.
        parameters: those that may move, a selection or globs of names; by default all that are trainable.
        sketch: the kind of subspace: AFFD, AFJL, FFD, QK, Dense, SJLT, or a function (n, d, seed=...) → sketch, such
            as ``lambda n, d, seed: BlockSum(parameters, d, seed=seed)``.
        batch_size: examples a step.
        seeds: one search each; a seed decides the sketch and the order of batches.
        confirm: afterwards also train from scratch at d/2 and d, with as many steps as the search of that seed.
        full: the metric of full fine-tuning, for the figure.
        resume: a folder that keeps the state after every evaluation; a search found there is gone on with.
        progress: show a progress bar; by default in a terminal only.

    Raises:
        InputError: d_max beyond n, sizes that are no positive integers, no seeds, data that is empty or can be read
            only once, evaluate not callable.
        NonFiniteError: the training diverged or the metric is NaN; ``resume`` keeps the curve up to there.
        FingerprintError: the file in ``resume`` belongs to another search: other weights, data, metric or options.
        StoreError: the file in ``resume`` is damaged, or cannot be written.

    Example:
        >>> task = gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]  # labels to be learned by heart
        >>> accuracy = gs.Accuracy(task, data)
        >>> net = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2))
        >>> result = gs.intrinsic_dimension(net, task, data, accuracy, target=0.9, check_every=20, lr=0.01)
        >>> result.reached
        True
    """
    experiment = Experiment.of(model, task, train, evaluate, parameters, sketch, lr, batch_size)
    plan = _Plan.of(experiment.n, target, d_min, d_max, check_every, min_gain)
    check_seeds(seeds)
    experiment = experiment.with_lr(plan.d_max, seeds[0])
    settings: Settings = experiment.settings(plan.d_max) | asdict(plan)
    facts = {} if resume is None else settings | experiment.facts()
    searches = tuple(_search(experiment, plan, seed, _State(resume, seed, facts), progress) for seed in seeds)
    result = IntrinsicDimension(
        experiment.n, float(target), searches, settings, full=full, lower_is_better=experiment.lower_is_better
    )
    if not confirm:
        return result
    journal = Journal(None if resume is None else Path(resume) / "confirmations.json", facts)
    return replace(result, confirmations=tuple(_confirmed(experiment, result, journal, progress)))


@dataclass(frozen=True)
class _Plan:
    target: int | float
    d_min: int
    d_max: int
    check_every: int
    min_gain: int | float | None

    @classmethod
    def of(
        cls, n: int, target: int | float, d_min: int, d_max: int | None, check_every: int, min_gain: int | float | None
    ) -> _Plan:
        check_counts(d_min=d_min, check_every=check_every)
        check_positive(**({} if min_gain is None else {"min_gain": min_gain}))
        d_max = min(1 << 20, 1 << (n.bit_length() - 1)) if d_max is None else d_max
        check_dims([d_max], n)
        if d_min > d_max:
            raise InputError(f"d_min={d_min} above d_max={d_max}", "d_min ≤ d_max ≤ n", f"Type d_min={min(16, d_max)}")
        if not (isinstance(target, Real | Tensor) and math.isfinite(target)):
            raise InputError(f"target={target!r}", "a finite number", "Type target=0.9 * full, full from fine_tune")
        return cls(float(target), d_min, d_max, check_every, min_gain)


def _search(experiment: Experiment, plan: _Plan, seed: int, state: _State, progress: bool | None) -> Search:
    with (
        experiment.training(plan.d_max, plan.d_min, seed) as training,
        tqdm(desc=f"dimension, seed {seed}", unit="step", disable=hidden(progress)) as bar,
    ):
        checks = state.load(training)
        before = checks[-1].seconds if checks else 0.0
        start = perf_counter()
        while not _is_over(experiment, plan, checks):
            loss = None
            if checks:
                training.grow(_next_d(experiment, plan, checks))
                bar.set_postfix(d=training.d, metric=f"{checks[-1].value:.4g}", target=f"{plan.target:.4g}")
                loss = training.advance(plan.check_every, bar=bar)
            d = training.d if checks else 0
            value = experiment.evaluated(f"after {training.step} steps at d={d}, seed {seed}")
            checks.append(Check(training.step, d, value, loss, before + perf_counter() - start))
            state.save(training, checks)
    last = checks[-1]
    return Search(seed, last.d if experiment.reaches(last.value, plan.target) else None, tuple(checks))


def _is_over(experiment: Experiment, plan: _Plan, checks: list[Check]) -> bool:
    if not checks:
        return False
    if experiment.reaches(checks[-1].value, plan.target):
        return settled([experiment.gain(check.value, 0.0) for check in checks], experiment.gain(plan.target, 0.0))
    return checks[-1].d == plan.d_max and _gained_little(experiment, plan, checks)


def _next_d(experiment: Experiment, plan: _Plan, checks: list[Check]) -> int:
    d = max(checks[-1].d, plan.d_min)
    if len(checks) == 1 or experiment.reaches(checks[-1].value, plan.target):
        return d
    return min(2 * d, plan.d_max) if _gained_little(experiment, plan, checks) else d


def _gained_little(experiment: Experiment, plan: _Plan, checks: list[Check]) -> bool:
    """Whether the last evaluation gained less than it must, over the best before (noise then cannot go on for ever)."""
    values = [check.value for check in checks]
    gain = min(experiment.gain(values[-1], value) for value in values[:-1])
    return gain < (_MIN_GAIN * abs(plan.target - values[0]) if plan.min_gain is None else plan.min_gain)


def _confirmed(
    experiment: Experiment, result: IntrinsicDimension, journal: Journal, progress: bool | None
) -> Iterator[CurvePoint]:
    for search in result.searches:
        for d in dict.fromkeys((max(1, search.d // 2), search.d) if search.d else ()):
            if (d, search.seed) not in journal.points:
                journal.add(experiment.point(d, search.seed, search.steps, progress))
            yield journal.points[d, search.seed]


class _State:
    """A search on disk: one file a seed, replaced as a whole after every evaluation."""

    def __init__(self, folder: str | Path | None, seed: int, facts: Mapping[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / f"search-seed{seed}.pt"
        self.facts = facts

    def load(self, training: Training) -> list[Check]:
        if self.path is None or not self.path.exists():
            return []
        state = read_tensors(self.path, training.w.device)
        require_same(self.facts, state.get("facts") if isinstance(state, dict) else None, self.path)
        training.load_state_dict(state["training"])
        return [Check(**check) for check in state["checks"]]

    def save(self, training: Training, checks: list[Check]) -> None:
        if self.path is not None:
            finished = [asdict(check) for check in checks]
            write_tensors(self.path, {"facts": self.facts, "training": training.state_dict(), "checks": finished})
