"""The metric of an index: factors that are estimated before the first row is sketched, a file for each checkpoint.

Rows and questions are sketched in the same metric, or their products mean nothing. So the hash of the factors stands
in the facts of every store, where a resumed build and a query compare it. Whoever needs factors reads the file, so that
all workers at one index have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradsketch.durable import require_same
from gradsketch.errors import DamageError, InputError, StoreError
from gradsketch.gradients.factors.estimation import Options, factor_facts
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.factors.kfac import ekfac, kfac
from gradsketch.gradients.factors.moments import WHOLE, whole_rows
from gradsketch.gradients.parameters import Parameters
from gradsketch.gradients.tasks import Task
from gradsketch.sketches.block_sum import BlockSum, as_matrix
from gradsketch.sketches.preconditioned import Preconditioned
from gradsketch.sketches.roots import Pair, Root
from gradsketch.store.folder import Folder

__all__ = [
    "COORDINATES",
    "FACTORS",
    "METRICS",
    "Metric",
    "MetricLike",
    "as_metric",
    "coordinates_for",
    "factors_name",
    "made_factors",
    "metric_facts",
    "read_factors",
    "require_of",
    "timed_like",
]

FACTORS = "factors-"  # the beginning of the files' names
# Of a side, with a metric before the sketch. Roots are folded into a table of so many columns, at 1.2 times the cost of
# plain sketches, where all coordinates took 1.5 to 2.4 times as much (benchmarks/factors_cost.py). Fewer coordinates
# add noise along the few directions of plain gradients. In the metric these are many, so that even 128 change the LDS
# by no more than another seed does (benchmarks/lm_attribution.py).
COORDINATES = 512
# How each is estimated.
METRICS: dict[str, tuple[Callable[..., Factors], dict[str, Any]]] = {
    "kfac": (kfac, {"labels": "sampled"}),
    "ekfac": (ekfac, {"labels": "sampled"}),
    "empirical-kfac": (kfac, {"labels": "empirical"}),
}


# What ``precondition`` takes: the name of an estimate, or factors that were made before, one for each checkpoint.
MetricLike = str | Factors | Sequence[Factors] | None


@dataclass(frozen=True)
class Metric:
    """The metric of a build: its name, None for none, and the factors of each checkpoint where they were given."""

    name: str | None
    given: tuple[Factors, ...] = ()


def as_metric(precondition: MetricLike, checkpoints: int) -> Metric:
    """Return what ``precondition`` names.

    Raises:
        InputError: there is no such metric, or not one set of factors for each checkpoint, all of one method.
    """
    if precondition is None or isinstance(precondition, str):
        if precondition is not None and precondition not in METRICS:
            wanted = f"None, {', '.join(METRICS)}, or factors"
            raise InputError(f"precondition={precondition!r}", wanted, "Type precondition='kfac'")
        return Metric(precondition)
    given = (precondition,) if isinstance(precondition, Factors) else tuple(precondition)
    methods = {factors.method for factors in given}
    if len(given) != checkpoints or len(methods) != 1:
        raise InputError(
            f"{len(given)} sets of factors ({', '.join(sorted(methods))}) for {checkpoints} checkpoints",
            "one for each, all of one method",
            "Pass precondition=[...] in the order of the checkpoints",
        )
    return Metric(methods.pop(), given)


def coordinates_for(name: str | None) -> int | None:
    """Return the bound on a sketch's coordinates in a metric."""
    return None if name is None else COORDINATES


def factors_name(checkpoint: str) -> str:
    """Return the name of the file with the factors of a checkpoint's folder."""
    return f"{FACTORS}{checkpoint}.pt"


def metric_facts(name: str | None, factors: Factors) -> dict[str, Any]:
    """Return what an index says of the metric that its rows were sketched in."""
    options = {key: factors.facts[key] for key in ("labels", "damping") if key in factors.facts}
    return {"name": name, **options, "examples": factors.examples, "hash": factors.fingerprint}


def read_factors(folder: Folder, checkpoint: str) -> Factors:
    """Return the factors of an index's checkpoint.

    Raises:
        StoreError: there are none, or they are damaged.
    """
    name = factors_name(checkpoint)
    if not folder.has(name):
        raise StoreError(
            f"{folder.uri} without {name}",
            "the factors that its rows were sketched with",
            "Run the command that built the index again, on the same machine",
        )
    return Factors.from_bytes(folder.read(name).to_pybytes(), f"{folder.uri}/{name}")


def require_of(model: nn.Module, given: Factors, checkpoint: str) -> None:
    """Refuse factors of other weights than the model has now, which its shapes alone do not tell.

    Raises:
        FingerprintError: they are; the message names the checkpoint.
    """
    fix = "Make the factors with the weights that are indexed, one for each checkpoint and in their order"
    given.require_of(model, f"precondition= for {checkpoint!r}", fix)


def made_factors(
    folder: Folder,
    checkpoint: str,
    metric: str,
    model: nn.Module,
    task: Task,
    sketch: BlockSum,
    rows: Callable[[], list[Any]],
    *,
    given: Factors | None,
    batch_tokens: int,
    advance: Callable[[int], Any],
) -> Factors:
    """Return the factors in an index's folder, once they are there: those that are given, or estimated from ``rows``.

    Raises:
        FingerprintError: those that are there were made of something else.
        InputError, NonFiniteError: see ``kfac``.
    """
    if given is not None:
        return _kept(folder, checkpoint, lambda: given)
    parameters = Parameters(model, include=sketch.names, frozen=True)
    estimate, options = METRICS[metric]

    def estimated() -> Factors:
        return estimate(
            model, task, rows(), parameters=parameters, batch_tokens=batch_tokens, advance=advance, **options
        )

    found = _kept(folder, checkpoint, estimated)
    stored = {key: value for key, value in found.facts.items() if key != "data"}
    source = f"{folder.uri}/{factors_name(checkpoint)}"
    require_same(factor_facts(estimate.__name__, model, task, parameters, Options(**options)), stored, source)
    return found


def _kept(folder: Folder, checkpoint: str, make: Callable[[], Factors]) -> Factors:
    """Return the factors that lie in the folder; make them where there are none, or damaged ones."""
    name, damaged = factors_name(checkpoint), False
    if folder.has(name):
        try:
            return read_factors(folder, checkpoint)
        except DamageError:
            damaged = True
    folder.write(name, make().to_bytes(), replace=damaged)
    return read_factors(folder, checkpoint)


def timed_like(sketch: BlockSum) -> Preconditioned:
    """Return a sketch that takes as long as one with factors, for estimates of time."""

    def root(size: int, whole: bool) -> Root:
        make = torch.eye if whole else torch.ones
        return Root(make(size, dtype=torch.float32, device="cpu"))

    sides = {name: as_matrix(shape) for name, shape in sketch.shapes.items() if name in sketch.blocks}
    return Preconditioned(
        sketch,
        {n: Pair(root(r, whole_rows(r, c)), root(c, c <= WHOLE)) for n, (r, c) in sides.items() if min(r, c) > 1},
    )
