"""Independent trainings, one a dimension: what the single-run search is checked against, and full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from gradsketch.dimension.experiment import Experiment, SketchKind, check_counts, check_seeds
from gradsketch.dimension.journal import Journal
from gradsketch.dimension.metrics import Metric
from gradsketch.dimension.results import CurvePoint, DimensionCurve, Settings
from gradsketch.errors import InputError
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import TaskLike
from gradsketch.progress import hidden
from gradsketch.sketches.affd import AFFD
from gradsketch.sketches.base import Sketch

__all__ = ["check_dims", "dimension_curve", "fine_tune"]


def dimension_curve(
    model: nn.Module,
    task: TaskLike,
    train: Any,
    evaluate: Metric,
    dims: Sequence[int],
    *,
    steps: int,
    parameters: Selection = None,
    sketch: SketchKind = AFFD,
    lr: int | float | None = None,
    batch_size: int = 32,
    seeds: Sequence[int] = (0,),
    full: int | float | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> DimensionCurve:
    """Train from theta0 in every one of some dimensions, for a fixed number of steps, and evaluate each once.

    Adam with a learning rate that falls linearly to zero; ``lr`` has the same meaning in every dimension and in
    ``intrinsic_dimension``. The model is left as found.

    Args:
        model, task, train, evaluate, parameters, sketch, lr, batch_size, progress: as in ``intrinsic_dimension``.
        dims: sizes of the subspaces, none larger than n.
        steps: steps of each training.
        seeds: each decides a sketch and an order of batches; all dims are trained with each.
        full: the metric of full fine-tuning, for the figure.
        resume: a file that collects finished points (JSON); one that exists is gone on with.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> accuracy = gs.Accuracy(task, data)
        >>> curve = gs.dimension_curve(model, task, data, accuracy, [2, 8, 32], steps=20, progress=False)
        >>> [point.d for point in curve.points]
        [2, 8, 32]

    Raises:
        InputError: a dimension beyond n, or what ``intrinsic_dimension`` refuses.
        NonFiniteError: training diverged, or the metric is NaN.
        FingerprintError: the file in ``resume`` belongs to another curve: other weights, data, metric or options.
        StoreError: the file in ``resume`` is damaged, or cannot be written.
    """
    lr = Journal.kept(resume, "lr") if lr is None else lr  # what was measured before, also where dims were added
    experiment = Experiment.of(model, task, train, evaluate, parameters, sketch, lr, batch_size)
    check_counts(steps=steps)
    check_seeds(seeds)
    if not dims or len(set(dims)) < len(dims):
        raise InputError(f"dims={list(dims)}", "different dimensions", "Type dims=[64, 256, 1024]")
    check_dims(dims, experiment.n)
    experiment = experiment.with_lr(max(dims), seeds[0])
    settings: Settings = experiment.settings(max(dims)) | {"steps": steps}
    journal = Journal(resume, {} if resume is None else settings | experiment.facts())
    start = experiment.evaluated("before training")
    wanted = [(d, seed) for seed in seeds for d in dims]
    with tqdm(wanted, desc="dimension curve", unit="run", disable=hidden(progress)) as bar:
        for d, seed in bar:
            bar.set_postfix(d=d, seed=seed, last=f"{journal.last:.4g}")
            if (d, seed) not in journal.points:
                journal.add(experiment.point(d, seed, steps, progress))
    points = tuple(journal.points[key] for key in wanted)
    return DimensionCurve(experiment.n, start, points, settings, full, experiment.lower_is_better)


def fine_tune(
    model: nn.Module,
    task: TaskLike,
    train: Any,
    evaluate: Metric,
    *,
    steps: int,
    parameters: Selection = None,
    lr: int | float = 2e-4,
    batch_size: int = 32,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> CurvePoint:
    """Train all n parameters for a fixed number of steps and return the metric: what a target is a share of.

    Adam with a learning rate that falls linearly to zero. The model is left as found: this measures, it does not
    keep. Needs five numbers a parameter besides the model. ``resume`` is a file that remembers the result;
    ``progress`` is as in ``intrinsic_dimension``.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> full = gs.fine_tune(model, task, data, gs.Accuracy(task, data), steps=20)
        >>> full.d
        42

    Raises:
        InputError, NonFiniteError, FingerprintError: as ``dimension_curve``.
    """
    check_counts(steps=steps)
    experiment = Experiment.of(model, task, train, evaluate, parameters, _Everything, lr, batch_size)
    facts = {} if resume is None else experiment.settings(experiment.n) | {"steps": steps} | experiment.facts()
    journal = Journal(resume, facts)
    if (experiment.n, seed) not in journal.points:
        journal.add(experiment.point(experiment.n, seed, steps, progress))
    return journal.points[experiment.n, seed]


def check_dims(dims: Sequence[int], n: int) -> None:
    """Refuse dimensions that are not between 1 and n."""
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, Integral) or not 1 <= d <= n:
            raise InputError(f"d={d!r} for n={n} parameters", f"a dimension from 1 to {n}", f"Type {min(n, 1024)}")


class _Everything(Sketch):
    """The identity: a "subspace" that holds every direction."""

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return x

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return w
