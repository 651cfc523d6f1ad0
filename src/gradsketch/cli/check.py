"""gradsketch check: is the sketch right for this model, how good is it, what does it cost, which d is enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gradsketch.cli.command import Command
from gradsketch.cli.data import DataOptions, DataPlace
from gradsketch.cli.loading import load
from gradsketch.cli.model import ModelOptions
from gradsketch.errors import InputError

if TYPE_CHECKING:
    from gradsketch.evaluation.distortion import Distortion

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Check:
    """Check gradient sketches on your own model and data.

    Compares a few per-example gradients with autograd, measures how well inner products survive (noise·√d, Pearson r
    with 95 % intervals) at several sizes d, time and memory against a plain forward + backward, and recommends a d.

    Example: gradsketch check --model ./my-model --data facts.jsonl --d 8192
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    data: DataPlace
    """A file, folder, glob, hub name or URI, as of gradsketch index; what a row holds depends on the task: text, prompt
    and answer, source and target, or text and label."""
    part: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    d: int = 4096
    """Largest sketch size; its halves down to 256 are measured too."""
    examples: int = 64
    """How many rows are used, spread over the file."""
    include: tuple[str, ...] = ("*",)
    """Globs of the parameters to sketch."""
    exclude: tuple[str, ...] = ()
    """Globs of the parameters to leave out."""
    seed: int = 0
    """Seed of the sketch."""
    wanted: float = 0.95
    """Pearson r to recommend a d for."""
    json: bool = False
    """Print the numbers as JSON."""


def run(options: Check) -> int:
    """Check, print, and return 0 where the gradients agree with autograd, 1 where they do not."""
    result = _measure(options)
    print(result.to_json() if options.json else result)
    return 0 if result.right else 1


def _measure(options: Check) -> Distortion:
    options.model.find_early()
    from gradsketch.evaluation.distortion import distortion
    from gradsketch.gradients.parameters import Parameters
    from gradsketch.sketches.block_sum import BlockSum

    rows = options.part.rows(options.data)
    model, task = load(options.model)
    parameters = Parameters(model, options.include, options.exclude)
    sketch = BlockSum(parameters, min(options.d, parameters.n), seed=options.seed)
    return distortion(model, task, _spread(rows, options.examples), sketch, wanted=options.wanted)


def _spread(rows: Any, count: int) -> list[Any]:
    """Return ``count`` rows at equal distances, or all where there are fewer."""
    if count < 1:
        raise InputError(f"--examples {count}", "at least 1", "Type --examples 64")
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


COMMAND = Command("check", "is the sketch right for your model, how good, at what cost, which d is enough", Check, run)
