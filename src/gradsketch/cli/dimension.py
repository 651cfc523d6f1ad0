"""gradsketch dimension: how many random directions fine-tuning needs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gradsketch.cli import run_file
from gradsketch.cli.command import Command
from gradsketch.cli.data import DataOptions, DataPlace
from gradsketch.cli.loading import load
from gradsketch.cli.model import ModelOptions
from gradsketch.errors import InputError

if TYPE_CHECKING:
    from gradsketch.dimension.results import IntrinsicDimension
    from gradsketch.gradients.tasks import Task

__all__ = ["COMMAND", "Options"]

Metric = Literal["auto", "accuracy", "loss", "rouge1", "rouge2", "rougeL", "exact-match"]


@dataclass(frozen=True)
class Options:
    """Find in how many random directions fine-tuning reaches a share of what full fine-tuning reaches.

    Fine-tunes all parameters first, for the target, then searches the dimension by doubling in a single run a seed.
    Nothing is kept but the numbers; the model's files are not touched. With --out, an interrupted search goes on
    where it stopped when the command is given again.
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    train: DataPlace
    """Training examples: a file, folder, glob, hub name or URI, as of gradsketch index."""
    test: DataPlace
    """Examples for the metric, likewise."""
    part: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    test_split: str | None = None
    """Part of --test (default: that of --split)."""
    metric: Metric = "auto"
    """auto: accuracy for classification, loss otherwise."""
    target: float | None = None
    """The metric to reach (default: --share of what full fine-tuning reaches)."""
    share: float = 0.9
    """Of the metric after full fine-tuning; where the metric is a loss, of the loss that it takes away."""
    full_steps: int = 300
    """Steps of full fine-tuning."""
    full_lr: float = 2e-4
    """Learning rate of full fine-tuning."""
    include: tuple[str, ...] = ("*",)
    """Parameters that may move, by glob (default: all trainable ones)."""
    sketch: str = "AFFD"
    """Kind of subspace: any sketch of a vector, such as AFFD, SJLT or Dense."""
    d_min: int = 16
    """First dimension."""
    d_max: int | None = None
    """Largest dimension (default: the largest power of two up to n and 2^20)."""
    check_every: int = 100
    """Steps between two evaluations."""
    min_gain: float | None = None
    """d doubles where the metric gained less than this (default: 2 % of the way from the start to the target)."""
    lr: float | None = None
    """About how far one step moves a parameter, in every dimension (default: the best of a few short tries)."""
    batch_size: int = 32
    """Examples a step."""
    seeds: tuple[int, ...] = (0,)
    """One search each."""
    confirm: bool = False
    """Also train from scratch at d/2 and d."""
    out: Path | None = None
    """Folder for result.json, figure.png, run.json (these options) and the state of the search."""
    json: bool = False
    """Print the result as JSON instead of a line."""


def run(options: Options) -> int:
    """Run the command and return its exit code."""
    result = _search(options)
    if options.out is not None:
        run_file.write(options, "dimension", options.out / "run.json")  # not where the work was refused
        result.to_json(options.out / "result.json")
        _draw(result, options.out / "figure.png")
    print(result.to_json() if options.json else result)
    return 0


def _search(options: Options) -> IntrinsicDimension:
    if options.model.fsdp or options.model.tp:
        flag = "--fsdp" if options.model.fsdp else "--tp"
        raise InputError(flag, "a model in one piece", f"Leave {flag} out; in Python, gs.Subspace trains one d")
    options.model.find_early()
    from gradsketch.dimension.curve import check_dims, fine_tune
    from gradsketch.dimension.metrics import evaluated, is_lower_better
    from gradsketch.dimension.search import intrinsic_dimension
    from gradsketch.gradients.parameters import Parameters
    from gradsketch.sketches.recipe import vector_kind

    if not options.seeds:
        raise InputError("--seeds without a number", "one search each", "Type --seeds 0 1 2")
    sketch = vector_kind(options.sketch)
    train, test = options.part.rows(options.train), options.part.rows(options.test, options.test_split)
    model, task = load(options.model)
    metric = _metric(options.metric, task, test)
    parameters = Parameters(model, options.include)
    check_dims([options.d_min, options.d_max or options.d_min], parameters.n)  # before full fine-tuning, not after
    shared: dict[str, Any] = {"parameters": parameters, "batch_size": options.batch_size}
    state = None if options.out is None else options.out / "state"
    target, full = options.target, None
    if target is None:
        start = evaluated(metric, model, "before training")
        once: dict[str, Any] = {"steps": options.full_steps, "lr": options.full_lr, "seed": options.seeds[0]}
        resume = None if state is None else state / "full.json"
        full = fine_tune(model, task, train, metric, resume=resume, **once, **shared).value
        lower = is_lower_better(metric)
        _check_improved(start, full, lower, options.full_lr)
        target = start + options.share * (full - start) if lower else options.share * full
    return intrinsic_dimension(
        model,
        task,
        train,
        metric,
        target=target,
        full=full,
        sketch=sketch,
        resume=state,
        **shared,
        **{
            name: getattr(options, name)
            for name in ("d_min", "d_max", "check_every", "min_gain", "lr", "seeds", "confirm")
        },
    )


def _check_improved(start: float, full: float, lower: bool, lr: float) -> None:
    """Refuse a full fine-tuning that made nothing better, because a share of its gain is then no target."""
    if (start <= full) if lower else (full <= start):
        raise InputError(
            f"full fine-tuning that did not improve the metric: from {start:.4g} to {full:.4g}",
            "a metric that training improves",
            f"Type a lower --full-lr, such as {lr / 10:.1g}, more --full-steps, or a --target of your own",
        )


def _metric(name: Metric, task: Task, test: Any) -> Any:
    from gradsketch.dimension import metrics
    from gradsketch.gradients.tasks import Classification

    if name == "auto":
        name = "accuracy" if isinstance(task, Classification) else "loss"
    if name == "loss":
        return metrics.Loss(task, test)
    if name == "accuracy":
        if not isinstance(task, Classification):
            raise InputError(f"--metric accuracy for {type(task).__name__}", "a classification", "Type --metric loss")
        return metrics.Accuracy(task, test)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        raise InputError(
            f"--metric {name} for {type(task).__name__}", "a task that generates", "Type --metric accuracy"
        )
    return metrics.ExactMatch(tokenizer, test) if name == "exact-match" else metrics.Rouge(tokenizer, test, name)


def _draw(result: IntrinsicDimension, path: Path) -> None:
    try:
        result.plot(path)
    except InputError as error:  # no matplotlib: the numbers are there all the same
        print(f"no {path.name}: {error}", file=sys.stderr)


COMMAND = Command("dimension", "how many random directions fine-tuning needs", Options, run)
