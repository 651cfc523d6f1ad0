"""Spectra of one loss at several points: over the steps of a training run, or over saved checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.durable import damaged, read_record, require_same, write_record
from gradsketch.errors import FingerprintError, InputError
from gradsketch.linear_map import LinearMap
from gradsketch.report.spectrum import evolution_figure
from gradsketch.results import Result
from gradsketch.spectra.plan import Plan, make_plan
from gradsketch.spectra.results import OUTLIER, Spectrum
from gradsketch.spectra.scratch import kept_file
from gradsketch.spectra.solve import checked_gradient, require_same_map, spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAPER_EVERY", "PAPER_STEPS", "Evolution", "Point", "plan_for", "saved_spectra", "spectrum_over"]

# [P], §5.3: where spectra are taken during fine-tuning.
PAPER_STEPS = (0, 10, 50, 100, 150, 200, 250, 500)
PAPER_EVERY = 1000

# What is another at every step: the weights; and the parts of a compound operator, in which they may stand.
_OF_ONE_STEP = ("model", "product of", "sum of", "adjoint of")

# An operator, with the gradient of its loss where its share in the eigenvectors is wanted; or what loads them.
Loaded = LinearMap | tuple[LinearMap, Tensor]
Point = Loaded | Callable[[], Loaded]


@dataclass(frozen=True, eq=False)
class Evolution(Result):
    """``spectra`` by step, ascending, whose eigenvector sketches can be compared with one another."""

    derived = ("r_neg", "outliers")

    steps: tuple[int, ...]
    spectra: tuple[Spectrum, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.spectra) or not self.steps:
            raise InputError(
                f"{len(self.steps)} steps and {len(self.spectra)} spectra",
                "as many of each, at least one",
                "Check both",
            )
        kinds = {(s.n, s.d, s.sketch) for s in self.spectra}
        if len(kinds) > 1:
            raise FingerprintError(
                f"spectra made with different sketches or parameters: {sorted(kinds)}",
                "one n and one sketch for all, so that eigenvectors can be compared",
                "Use one seed and one d for every checkpoint, or another directory",
            )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def r_neg(self) -> Float[np.ndarray, " steps"]:
        """R_NEG at each step."""
        return np.array([s.r_neg for s in self.spectra], dtype=np.float64)

    @property
    def outliers(self) -> tuple[int, ...]:
        """The number of outliers at each step."""
        return tuple(s.outliers for s in self.spectra)

    def overlaps(self, k: int = 10) -> Float[np.ndarray, "steps steps"]:
        """Return how much of one step's leading eigenspace lies in another's, for every pair of steps.

        The mean squared cosine of the principal angles between the spans of the (up to) k positive eigenvectors: 1
        where they agree. From sketches, with a noise floor of k/d.
        """
        bases = [_orthonormal(s, k) for s in self.spectra]
        rows = [[float((a.T @ b).square().sum()) / max(a.shape[1], 1) for b in bases] for a in bases]
        return np.array(rows, dtype=np.float64)

    def summary(self) -> str:
        first, last = self.spectra[0], self.spectra[-1]
        return (
            f"{len(self)} spectra from step {self.steps[0]:,} to {self.steps[-1]:,}: "
            f"R_NEG {first.r_neg:.3f} → {last.r_neg:.3f}, outliers {first.outliers} → {last.outliers}"
        )

    def _figure(self) -> Figure:
        return evolution_figure(self, OUTLIER)

    def __str__(self) -> str:
        """Return a table for the terminal."""
        lines = [f"{'step':>8}  {'largest':>11}  {'lowest':>11}  {'R_NEG':>7}  {'outliers':>8}"]
        for step, s in zip(self.steps, self.spectra, strict=True):
            top = s.positive[0].value if s.positive else 0.0
            low = s.negative[0].value if s.negative else 0.0
            lines.append(f"{step:>8}  {top:>11.4g}  {low:>11.4g}  {s.r_neg:>7.3f}  {s.outliers:>8}")
        return "\n".join(lines)


def _orthonormal(result: Spectrum, k: int) -> Float[Tensor, "d r"]:
    """Return an orthonormal basis of the sketched eigenvectors of the k largest positive eigenvalues."""
    rows = result.sketches[: min(k, len(result.positive))].double()
    basis: Tensor = torch.linalg.qr(rows.T).Q
    return basis


def spectrum_over(
    checkpoints: Mapping[int, Point] | Iterable[tuple[int, Point]],
    k: int = 10,
    *,
    directory: str | Path | None = None,
    **options: Any,
) -> Evolution:
    """Return the spectra of several checkpoints, one after another, with d numbers kept of each eigenvector.

    Each checkpoint is a step and its operator, or a function that loads the operator when its turn comes; either may
    come with a gradient, as a pair. Options are those of ``spectrum``. With a directory each spectrum is written
    there when it is done. A run that finds it there loads the checkpoint, checks that it is the same work, and does
    not compute the spectrum again. A run killed within a checkpoint takes that one up where it stopped.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> def load(step):
        ...     torch.manual_seed(step)
        ...     return gs.hessian(torch.nn.Linear(20, 2), task, data)
        >>> evolution = gs.spectrum_over({0: load(0), 100: load(100)}, k=2, progress=False)
        >>> evolution.steps
        (0, 100)

    Raises:
        InputError: no checkpoints; otherwise what ``spectrum`` raises.
        FingerprintError: the directory holds spectra of other weights, data, parameters, k or options.
        StoreError: a file in the directory is damaged, or cannot be written.
    """
    pairs = checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints
    folder = None if directory is None else Path(directory)
    done: dict[int, Spectrum] = {}
    for step, point in pairs:
        done[int(step)] = _one(int(step), point, k, folder, options)
    if not done:
        raise InputError("no checkpoints", "at least one", "Check the path they are read from")
    steps = sorted(done)
    return Evolution(tuple(steps), tuple(done[t] for t in steps))


def _one(step: int, point: Point, k: int, folder: Path | None, options: Mapping[str, Any]) -> Spectrum:
    loaded = point if isinstance(point, LinearMap | tuple) else point()
    operator, gradient = loaded if isinstance(loaded, tuple) else (loaded, None)
    if folder is None:
        return spectrum(operator, k, gradient=gradient, **options)
    path = folder / f"step-{step:08d}.json"
    if operator.ranks.several:
        raise InputError("directory= for a model that ranks share out", "results that are kept", "Leave directory out")
    plan, facts = _planned(operator, k, gradient, options)
    _require_same_series(folder, facts)
    if path.exists():
        return _taken_up(path, plan, gradient, facts)
    running = path.with_suffix(".run")
    result = spectrum(operator, k, gradient=gradient, resume=running, **options)
    write_record(path, {"facts": facts, "spectrum": json.loads(result.to_json())})
    running.unlink(missing_ok=True)
    if options.get("scratch") is not None:
        kept_file(options["scratch"], running).unlink(missing_ok=True)
    return result


def _planned(
    operator: LinearMap, k: int, gradient: Tensor | None, options: Mapping[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """Return how ``spectrum`` goes about these options, and everything that decides the numbers it returns."""
    plan, probes = plan_for(operator, k, options), {**_DEFAULTS, **options}["probes"]
    return plan, {**plan.request(), "probes": probes, "gradient": gradient is not None, **plan.facts()}


_DEFAULTS = {name: p.default for name, p in signature(spectrum).parameters.items() if p.default is not p.empty}
_PLANNED = ("which", "method", "sketch", "steps", "tolerance", "memory", "seed", "scratch")


def plan_for(operator: LinearMap, k: int, options: Mapping[str, Any]) -> Plan:
    """Return how ``spectrum`` goes about these options.

    Raises:
        InputError: it refuses them.
    """
    given = {**_DEFAULTS, **options}
    return make_plan(operator, k, **{name: given[name] for name in _PLANNED})


def _require_same_series(folder: Path, facts: Mapping[str, Any]) -> None:
    """Check that the spectra in a folder are of the same work, whose weights alone change from step to step.

    Raises:
        FingerprintError: they are not, and would lie beside others that cannot be compared with them.
    """
    for path in sorted(folder.glob("step-*.json"))[:1]:
        stored = _read(path)["facts"]
        now, then = ({k: v for k, v in f.items() if k not in _OF_ONE_STEP} for f in (facts, stored))
        require_same(now, then, path.parent)


def _taken_up(path: Path, plan: Plan, gradient: Tensor | None, facts: Mapping[str, Any]) -> Spectrum:
    record = _read(path)
    require_same(facts, record["facts"], path)
    result = _spectrum_of(record, path)
    require_same_map(plan, checked_gradient(gradient, plan), (result.alphas[0], result.betas[0]), str(path))
    return result


def _read(path: Path) -> dict[str, Any]:
    record = read_record(path)
    if not isinstance(record.get("facts"), dict):
        raise damaged(path, "it does not say what it was made of")
    return record


def _spectrum_of(record: Mapping[str, Any], path: Path) -> Spectrum:
    try:
        return Spectrum.from_json(json.dumps(record["spectrum"]))
    except (LookupError, TypeError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def saved_spectra(directory: str | Path) -> Evolution:
    """Return the evolution that ``spectrum_over`` or a callback left in a directory.

    Example:
        >>> phi = gs.AFFD(64, 16)
        >>> _ = gs.spectrum_over({0: phi.T @ phi}, k=2, directory="runs/spectra", progress=False)
        >>> gs.saved_spectra("runs/spectra").steps
        (0,)

    Raises:
        InputError: there is none.
        StoreError: one is damaged.
    """
    paths = sorted(Path(directory).glob("step-*.json"))
    if not paths:
        raise InputError(f"no step-*.json in {directory}", "a directory that spectrum_over wrote", "Check the path")
    spectra = tuple(_spectrum_of(_read(p), p) for p in paths)
    return Evolution(tuple(int(p.stem.removeprefix("step-")) for p in paths), spectra)
