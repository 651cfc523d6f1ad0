"""gradsketch index: sketch the gradient of every training example."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gradsketch.cli import run_file
from gradsketch.cli.command import Command
from gradsketch.cli.data import DataOptions, DataPlace
from gradsketch.cli.loading import load
from gradsketch.cli.model import ModelOptions
from gradsketch.cli.work import WorkOptions
from gradsketch.errors import GradsketchError, InputError, NonFiniteError, StoreError
from gradsketch.table import printable

__all__ = ["COMMAND", "RUN_FILE", "IndexOptions", "built_with", "model_of"]

RUN_FILE = "run.json"
_LEFT_OUT_SHOWN = 5
# What the options of build_index are called here.
_FLAGS = {"skip_bad=True": "--skip-bad", "shard_rows": "--shard-rows", "a smaller d": "a smaller --d"}


@dataclass(frozen=True)
class IndexOptions:
    """Sketch the gradient of every training example, and store it for questions.

    May be interrupted at any moment: the same command goes on where it stopped. The options are saved as run.json in
    the index; --config FILE replays them.

    Example: gradsketch index runs/facts --model ./my-model --data facts.jsonl
    """

    path: tyro.conf.Positional[str]
    """Folder of the index, or a URI such as s3://bucket/facts."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    data: DataPlace
    """JSON lines, JSON, CSV, TSV, Parquet, Arrow or text file; a folder or glob of them; a hub data set; a URI, as
    s3://bucket/data; or - for a pipe."""
    part: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    d: int = 4096
    """Numbers kept of every gradient."""
    include: tuple[str, ...] = ("*",)
    """Globs of the parameters to sketch; by default everything that is trainable."""
    exclude: tuple[str, ...] = ()
    """Globs of the parameters to leave out."""
    seed: int = 0
    """Seed of the sketch."""
    store: Literal["float16", "bfloat16", "float32", "int8", "int4", "sign"] = "float16"
    """Type of the stored numbers; gradsketch check says what each costs in fidelity."""
    checkpoints: tuple[str, ...] = ()
    """Files or folders of weights whose scores are added up (TracIn); by default the model's own."""
    weights: tuple[float, ...] = ()
    """One a checkpoint, such as its learning rate; by default equal."""
    precondition: Literal["none", "kfac", "ekfac", "empirical-kfac"] = "none"
    """Metric in which gradients are sketched; labels are drawn from the model, or are those of the data (empirical)."""
    shard_rows: int | None = None
    """Rows a file; by default 16 MB, or a twentieth of the run."""
    batch_tokens: int = 4096
    """Tokens a batch, padding included; halved where memory runs out."""
    skip_bad: bool = False
    """Leave out rows that cannot be used, instead of stopping."""
    work: Annotated[WorkOptions, tyro.conf.arg(name="")] = field(default_factory=WorkOptions)
    dry_run: bool = False
    """Say what would be done, how large and how long, and stop."""
    json: bool = False
    """Print the outcome as JSON."""


def built_with(index: str) -> IndexOptions | None:
    """Return the options with which an index was built, or None where its folder does not hold them.

    Raises:
        InputError, DamageError: the file cannot be used, or was changed since.
    """
    file = Path(index).expanduser() / RUN_FILE
    if "://" in index or not file.is_file():
        return None
    return run_file.read(IndexOptions, "index", file, untouched=True)


def model_of(index: str, model: str | None, device: str, *, fsdp: bool = False, tp: bool = False) -> ModelOptions:
    """Return the options of an index's model as its run file has them, or of another model, on a device or shared out.

    Raises:
        InputError: there is no run file, and no model was named.
    """
    stored = built_with(index)
    if stored is not None:
        return replace(stored.model, model=model or stored.model.model, device=device, fsdp=fsdp, tp=tp)
    if model is None:
        raise InputError(f"{index} without a {RUN_FILE}", "the name of its model", "Type --model NAME_OR_FOLDER")
    return ModelOptions(model, device=device, fsdp=fsdp, tp=tp)


def run(options: IndexOptions) -> int:
    """Build the index, or say what that would take."""
    try:
        return _run(options)
    except (InputError, NonFiniteError) as error:
        raise _in_flags(error) from error


def _run(options: IndexOptions) -> int:
    options.model.find_early()
    from gradsketch.attribution.build import Build
    from gradsketch.gradients.parameters import Parameters
    from gradsketch.plain import as_json

    began = time.perf_counter()
    if "://" not in options.path:
        run_file.require_own(Path(options.path).expanduser() / RUN_FILE)
    data = options.part.rows(options.data)  # before the model, which may take minutes
    model, task = load(options.model)
    build = Build(
        options.path,
        model,
        task,
        data,
        d=options.d,
        parameters=Parameters(model, options.include, options.exclude),
        seed=options.seed,
        dtype=options.store,
        checkpoints=options.checkpoints or None,
        weights=options.weights or None,
        precondition=None if options.precondition == "none" else options.precondition,
        shard_rows=options.shard_rows,
        batch_tokens=options.batch_tokens,
        skip_bad=options.skip_bad,
        worker=_share(options),
        engine=options.work.chosen(),
    )
    if options.dry_run:
        plan = build.plan()
        print(as_json(plan) if options.json else plan)
        return 0
    try:
        index = build.run(accepted=lambda: _save(options))  # also beside a run that is interrupted
    except KeyboardInterrupt:
        print("\nFinished rows are kept: type the same command to go on.", file=sys.stderr)
        raise
    if options.work.share()[0] > 0 and options.work.worker is None:
        return 0  # under torchrun rank 0 speaks for all
    left_out, there = index.left_out, index.rows_there
    outcome: dict[str, Any] = {"index": options.path, "rows": there - len(left_out), "d": index.d}
    outcome |= {"rows_missing": index.rows - there} if there < index.rows else {}
    outcome |= {"bad_rows": len(left_out), "seconds": round(time.perf_counter() - began, 2)}
    print(as_json(outcome, indent=None) if options.json else _sentence(outcome, list(left_out.values())))
    return 0


def _share(options: IndexOptions) -> tuple[int, int]:
    """Return (i, n): this is process i of n. Ranks that split layers all go through the same rows."""
    return options.work.worker or (0, 1) if options.model.tp else options.work.share()


def _save(options: IndexOptions) -> None:
    if "://" not in options.path:
        with suppress(StoreError):  # a finished index may be read-only; where rows are to be written, that is told then
            run_file.write(options, "index", Path(options.path).expanduser() / RUN_FILE)


def _in_flags(error: GradsketchError) -> GradsketchError:
    """Return the error with the names that options have on the command line."""
    fix = error.fix
    for name, flag in _FLAGS.items():
        fix = fix.replace(name, flag)
    return type(error)(error.came, error.wanted, fix)


def _sentence(outcome: dict[str, Any], left_out: list[str]) -> str:
    rows, bad = (f"{count} {name}{'s' * (count != 1)}" for count, name in
                 ((outcome["rows"], "row"), (outcome["bad_rows"], "bad row")))  # fmt: skip
    told = f", {bad} left out" if left_out else ""
    told += f", {outcome['rows_missing']} still to come from other processes" if "rows_missing" in outcome else ""
    done = printable(f"{outcome['index']}: {rows}, d = {outcome['d']}{told}, {outcome['seconds']} s")
    for reason in left_out[:_LEFT_OUT_SHOWN]:
        done += f"\nleft out: {printable(reason)}"
    done += f"\n… and {len(left_out) - _LEFT_OUT_SHOWN} more" * (len(left_out) > _LEFT_OUT_SHOWN)
    return f"{done}\nNow ask: {printable(shlex.join(['gradsketch', 'query', outcome['index'], '--text', '...']))}"


COMMAND = Command("index", "sketch the gradient of every training example; resumable", IndexOptions, run)
