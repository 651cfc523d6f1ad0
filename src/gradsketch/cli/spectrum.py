"""gradsketch spectrum: the outer eigenvalues of a model's loss Hessian, at one point or over checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    from gradsketch.linear_map import LinearMap
    from gradsketch.spectra import Evolution, Spectrum

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class SpectrumOptions:
    """Eigenvalues of the Hessian of a model's loss, from both ends, with residuals, R_NEG and outliers.

    With --checkpoints, of every checkpoint-N folder in it, and how they change. With --out, results and figures are
    written, and a run that was interrupted goes on where it stopped.

    Example: gradsketch spectrum --model ./my-model --data texts.jsonl --k 10 --out runs/spectrum
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    data: DataPlace
    """A file, folder, glob, hub name or URI, as of gradsketch index."""
    part: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    checkpoints: Path | None = None
    """Folder with checkpoint-N folders, as the Hugging Face Trainer writes; --model is step 0, and its task and
    tokenizer are those of all."""
    examples: int = 16
    """How many rows of the data the loss is taken on, spread over the file."""
    batch_size: int = 8
    """Examples a batch; with one batch the graph is kept between products, a third faster."""
    include: tuple[str, ...] = ("*",)
    """Globs of the parameters to differentiate by."""
    exclude: tuple[str, ...] = ()
    """Globs of the parameters to leave out."""
    curvature: Literal["hessian", "gauss-newton", "fisher"] = "hessian"
    """Which matrix."""
    k: int = 10
    """How many eigenvalues."""
    which: Literal["magnitude", "both"] = "magnitude"
    """The k largest by magnitude, or k of each sign."""
    method: Literal["auto", "sketched-basis", "sketched-operator", "full"] = "auto"
    """How; auto says what it chose and why."""
    d: int | None = None
    """Sketch size."""
    steps: int | None = None
    """Most Hessian-vector products."""
    tolerance: float = 1e-3
    """Relative residual of a settled eigenvalue."""
    scratch: Path | None = None
    """Folder for the Krylov vectors, a byte a number, where they are too long for memory: no product goes to copies."""
    density: bool = False
    """Estimate the density of all eigenvalues too, into --out (160 products more)."""
    seed: int = 0
    """Seed of start vector and sketch."""
    out: Path | None = None
    """Folder for results (JSON) and figures (PNG)."""
    json: bool = False
    """Print the result as JSON."""


def run(options: SpectrumOptions) -> int:
    """Compute, print, write, and return 0."""
    if options.density and (options.out is None or options.checkpoints is not None):
        raise InputError(
            "--density without --out, or with --checkpoints",
            "a folder for one model's density",
            "Type --out runs/spectrum",
        )
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}", "at least 1", "Type --batch-size 8")
    if options.model.tp:
        raise InputError("--tp", "layers in one piece, for second derivatives", "Type --fsdp")
    if options.model.fsdp and (options.out is not None or options.checkpoints is not None):
        raise InputError("--fsdp with --out or --checkpoints", "a result that is printed", "Leave them out; add --json")
    options.model.find_early()
    result = _over_checkpoints(options) if options.checkpoints is not None else _at_one_point(options)
    if options.out is not None:  # only now, so that a refused run leaves another run's file as it is
        run_file.write(options, "spectrum", options.out / "run.json")
    if not options.model.fsdp or int(os.environ["RANK"]) == 0:  # rank 0 speaks for all
        print(result.to_json() if options.json else result)
    return 0


def _at_one_point(options: SpectrumOptions) -> Spectrum:
    from gradsketch.spectra import density, spectrum

    operator, gradient = _operator(options, _data(options))
    resume = None if options.out is None else options.out / "spectrum.run"
    result = spectrum(operator, options.k, gradient=gradient, resume=resume, **_solver(options))
    if options.out is not None:
        result.to_json(options.out / "spectrum.json")
        _draw(result, options.out / "spectrum.png")
    if options.density:
        whole = density(operator, seed=options.seed)
        if options.out is not None:
            whole.to_json(options.out / "density.json")
            _draw(whole, options.out / "density.png")
    return result


def _over_checkpoints(options: SpectrumOptions) -> Evolution:
    from gradsketch.spectra import spectrum_over

    folder = None if options.out is None else options.out / "steps"
    data = _data(options)
    points = {step: (lambda at=at: _operator(at, data)) for step, at in _checkpoints(options)}
    result = spectrum_over(points, options.k, directory=folder, **_solver(options))
    if options.out is not None:
        result.to_json(options.out / "evolution.json")
        _draw(result, options.out / "evolution.png")
    return result


def _checkpoints(options: SpectrumOptions) -> Iterator[tuple[int, SpectrumOptions]]:
    """Yield each step with the options that load its model; the starting model is step 0."""
    assert options.checkpoints is not None
    found = {int(p.name.split("-")[1]): p for p in options.checkpoints.glob("checkpoint-*") if p.name[11:].isdigit()}
    if not found:
        raise InputError(
            f"no checkpoint-N folder in {options.checkpoints}", "what the Trainer's save_steps writes", "Check the path"
        )
    yield 0, options
    for step in sorted(found):
        yield step, replace(options, model=options.model.at(found[step]))


def _data(options: SpectrumOptions) -> list[Any]:
    """Return the rows that the loss is taken on, at equal distances."""
    rows = options.part.rows(options.data)
    count = min(options.examples, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _operator(options: SpectrumOptions, data: list[Any]) -> tuple[LinearMap, Any]:
    from gradsketch.fsdp import Ranks
    from gradsketch.gradients.curvature import fisher, gauss_newton, hessian, loss_gradient
    from gradsketch.gradients.parameters import Parameters

    model, task = load(options.model)
    rank, ranks = Ranks(model).place
    data = data[rank::ranks]
    parameters = Parameters(model, options.include, options.exclude)
    make = {"hessian": hessian, "gauss-newton": gauss_newton, "fisher": fisher}[options.curvature]
    operator = make(model, task, data, parameters, batch_size=options.batch_size)
    return operator, loss_gradient(model, task, data, parameters, batch_size=options.batch_size)


def _solver(options: SpectrumOptions) -> dict[str, Any]:
    names = ("which", "method", "steps", "tolerance", "seed", "scratch")
    return {name: getattr(options, name) for name in names} | {"sketch": options.d}


def _draw(result: Any, path: Path) -> None:
    """Draw where matplotlib is there; the numbers are written in any case."""
    try:
        result.plot(path)
    except InputError as error:
        print(f"no figure: {error}", file=sys.stderr)


COMMAND = Command(
    "spectrum", "outer eigenvalues of a loss Hessian, at one point or over checkpoints", SpectrumOptions, run
)
