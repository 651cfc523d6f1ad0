"""From questions to sketches: the first step of a query."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.attribution.checkpoints import Checkpoint, weights_of
from gradsketch.attribution.description import Description, comparable_facts, sketch_facts, sketch_for
from gradsketch.attribution.examples import as_examples, rebuild
from gradsketch.attribution.gradients import GradientSource, Sketched
from gradsketch.attribution.stored_losses import first_apart, losses_of
from gradsketch.durable import require_same
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError
from gradsketch.fsdp import Ranks
from gradsketch.gradients.data import read_all
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.fingerprints import settings_of
from gradsketch.gradients.tasks import Task
from gradsketch.places import as_places
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Store

_LOOKED_AT = 8  # rows in which a text is looked for
# Entries a millionth of the largest are then still normal numbers of float32.
_SMALLEST = 1e-30

__all__ = [
    "Queries",
    "as_queries",
    "as_sketched",
    "checked_groups",
    "ready_queries",
    "sketch_queries",
    "stored_queries",
]


@dataclass(frozen=True)
class Queries:
    """Questions with their gradients: one ``Sketched`` per checkpoint, in the order of the examples.

    Each group of positions asks as one: what counts is the mean over its members.
    """

    examples: Sequence[Any]
    groups: Sequence[Sequence[int]]
    sketched: Sequence[Sketched]
    seconds: float

    def asked(self) -> list[list[Any]]:
        """Return the examples of each group."""
        return [[self.examples[i] for i in group] for group in self.groups]

    def grouped(self, groups: Sequence[Sequence[int]]) -> Queries:
        """Return the same questions in other groups.

        Raises:
            InputError: no group, an empty one, or a position out of range.
        """
        return replace(self, groups=checked_groups(groups, len(self.examples)))

    def means(self, values: Float[Tensor, "m ..."]) -> Float[Tensor, "groups ..."]:
        """Return the mean over each group's members."""
        return torch.stack([values[list(group)].mean(dim=0) for group in self.groups])

    def unit_length(self, checkpoint: int) -> Float[Tensor, "m d"]:
        """Return the sketches at a checkpoint, each divided by its norm.

        Raises:
            InputError: one is zero, or so small that float32 has rounded its direction away.
        """
        sketches = self.sketched[checkpoint].sketches
        norms = torch.linalg.vector_norm(sketches.double(), dim=-1, keepdim=True)  # squares of 1e-22 are 0 in float32
        for i in (norms[:, 0] < _SMALLEST).nonzero()[:, 0].tolist():
            raise InputError(
                f"query {i}, whose gradient has the norm {float(norms[i]):.3g}: it has no direction to compare",
                f"gradients of {_SMALLEST:g} or more",
                'Ask about something the model is less sure of, or pass score="dot"',
            )
        unit: Tensor = sketches.double() / norms
        return unit.float()


def as_queries(examples: Any) -> list[Any]:
    """Return a list of questions; one text or dict counts as a list of one.

    Raises:
        InputError: there is none.
    """
    if isinstance(examples, str) or (
        isinstance(examples, Mapping) and not any(isinstance(v, Tensor) for v in examples.values())
    ):
        return [examples]
    listed = as_examples(examples)
    if len(listed) == 0:
        raise InputError("no query", "at least one example", "Pass a list of texts")
    return [listed[i] for i in range(len(listed))]


def checked_groups(groups: Sequence[Sequence[int]] | None, count: int) -> Sequence[Sequence[int]]:
    """Return the groups, by default one per question.

    Raises:
        InputError: no group, an empty one, or a position out of range.
    """
    if groups is None:
        return [[i] for i in range(count)]
    wanted = f"lists of positions from 0 to {count - 1}"
    if not isinstance(groups, Iterable):
        raise InputError(f"groups={groups!r}", wanted, "Type groups=[[0, 1], [2]]")
    checked = [as_places(group, count, "groups: position") for group in groups]
    if not checked or not all(checked):
        raise InputError(f"groups={checked}", wanted, "Leave out empty groups")
    return checked


def ready_queries(
    sketches: Any, losses: Any, examples: Sequence[Any], sketch: BlockSum, *, index: str, stores: Sequence[Store]
) -> Queries:
    """Return questions whose gradients were sketched elsewhere.

    Raises:
        FingerprintError: the index was made with another sketch.
        InputError: an index with a metric or several checkpoints, or numbers that are not one sketch a question.
        NonFiniteError: a sketch or a loss is not finite.
    """
    facts = stores[0].manifest.facts
    if len(stores) > 1 or "metric" in facts:
        raise InputError(
            f"ready sketches for {index}, which has several checkpoints or a metric",
            "an index of one checkpoint, without precondition=",
            "Ask it with the model itself: index.query(model, examples)",
        )
    mine = {"sketch": sketch_facts(sketch)["sketch"]}  # its hash is of names and shapes, whatever their order
    fix = "Sketch with block_sum or BlockSum of the same d, seed, names and shapes"
    require_same(mine, {name: facts.get(name) for name in mine}, index, fix=fix)
    ready = as_sketched(sketches, losses, len(examples), sketch.d)
    return Queries(examples, [[i] for i in range(len(examples))], [ready], 0.0)


def as_sketched(sketches: Any, losses: Any, count: int, d: int) -> Sketched:
    """Return arrays of any library as sketches and losses.

    Raises:
        InputError: they are not [count, d] and [count].
        NonFiniteError: one is not finite.
    """
    rows, values = (_float32(x) for x in (sketches, losses))
    if count < 1 or rows.shape != (count, d) or values.shape != (count,):
        raise InputError(
            f"sketches {list(rows.shape)} and losses {list(values.shape)} of {count} examples",
            f"[{count}, {d}] and [{count}], one of each an example, and at least one",
            "Pass what per_example(...).with_losses returned, and its examples",
        )
    if not (torch.isfinite(rows).all() and torch.isfinite(values).all()):
        raise NonFiniteError("a sketch or a loss that is not finite", "finite numbers", "Leave such examples out")
    return Sketched(rows, values, {})


def _float32(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().to("cpu", torch.float32)
    return torch.tensor(np.asarray(array), dtype=torch.float32, device="cpu")


_name = "query {}".format


def sketch_queries(
    model: nn.Module,
    task: Task,
    examples: Sequence[Any],
    groups: Sequence[Sequence[int]],
    *,
    index: str,
    description: Description,
    stores: Sequence[Store],
    checkpoints: Sequence[Checkpoint],
    factors: Callable[[int], Factors | None],
    batch_tokens: int,
) -> Queries:
    """Sketch the gradients of questions at every checkpoint; each is read and tokenised once.

    ``factors`` returns those of the checkpoint with this number, where the index has a metric.

    Raises:
        FingerprintError: model, task or parameters are not those the index was made with.
        InputError: an example that the task cannot read.
        NonFiniteError: the loss or gradient of an example is not finite.
    """
    began, sketched = time.perf_counter(), []
    rows, lengths = read_all(task, examples, _name)
    settings, is_compared = settings_of(model), False
    team = Ranks(model).team
    for number, (store, checkpoint) in enumerate(zip(stores, checkpoints, strict=True)):
        with team.together(), weights_of(model, checkpoint):
            team.meet(number)  # before weights are gathered to be hashed
            metric = factors(number)
            sketch = sketch_for(model, description, metric)
            facts = {name: value for name, value in store.manifest.facts.items() if name != "data"}
            fix = "Query with the model, task and parameters of the index, or build an index for these"
            require_same(comparable_facts(model, task, sketch, description, metric), facts, index, fix=fix)
            source = GradientSource(model, task, sketch, batch_tokens=batch_tokens)
            is_compared |= _warn_of_another_loss(source, store)
            sketched.append(source(rows, lengths, name=_name))
    if not is_compared:
        _warn_of_other_settings(model, settings, description.settings, index)
    return Queries(examples, groups, sketched, time.perf_counter() - began)


def _warn_of_other_settings(model: nn.Module, before: Mapping[str, str], stored: Mapping[str, str], index: str) -> None:
    """Warn where modules have other numbers as attributes than when the index was built.

    What the questions themselves changed, such as a counter of calls, tells nothing.
    """
    now = settings_of(model)
    other = [name for name in stored if name in now and now[name] == before.get(name) != stored[name]]
    if other:
        module, value = next((n, vars(m)[other[0]]) for n, m in model.named_modules() if other[0] in vars(m))
        warnings.warn(
            f"{index}: {', '.join(map(repr, other[:3]))} of the model's modules is not what it was when the index was "
            f"built ({'.'.join([module, other[0]]).lstrip('.')} is {value!r} now). Where it decides the loss, scores "
            "are of another model than the rows: set it back, or build an index for this one",
            GradsketchWarning,
            stacklevel=5,
        )


def _warn_of_another_loss(source: GradientSource, store: Store) -> bool:
    """Warn where a training row's loss is not the stored one: some settings of a model are in none of its tensors.

    The first checkpoint has the texts of rows. Returns whether there was one to compare.
    """
    if source.sketcher.ranks.several or not (ranges := store.ranges()):
        return False
    start, count = ranges[0]
    rows = range(start, start + min(count, _LOOKED_AT))
    texts = ((row, rebuild(record)) for row, record in zip(rows, store.records(rows), strict=True))
    row, example = next(((row, example) for row, example in texts if example is not None), (None, None))
    if row is None:
        return False
    try:
        losses = losses_of(source.model, source.sketcher.task, [example])
    except Exception:  # a task of the user's own need not take rows as the index rebuilds them
        return False
    if (apart := first_apart(losses, store, [row])) is not None:
        _, now, then = apart
        warnings.warn(
            f"{store.folder.uri}: the loss of its row {row} is {now:.4g} with this model, not {then:.4g} as when "
            "it was built. The model computes something else now (an adapter's scale, a temperature), or the "
            "row is not of its text alone",
            GradsketchWarning,
            stacklevel=5,
        )
    return True


def stored_queries(stores: Sequence[Store], rows: Sequence[int]) -> Queries:
    """Return training rows as questions, with the sketches that the stores of all checkpoints hold.

    Raises:
        InputError: a row that is not there, or that has no sketch.
    """
    began = time.perf_counter()
    rows = as_places(rows, stores[0].rows, "row")
    if not rows:
        raise InputError("no row", "at least one", "Pass a list of rows")
    records = stores[0].records(rows)
    sketched = [_stored(store, rows) for store in stores]
    without = [row for place, row in enumerate(rows) if any(bool(each.losses[place].isnan()) for each in sketched)]
    if without:
        raise InputError(
            f"row {without[0]}, which was left out of the index", "a row with a sketch", "Ask about another"
        )
    return Queries(records, [[i] for i in range(len(rows))], sketched, time.perf_counter() - began)


def _stored(store: Store, rows: Sequence[int]) -> Sketched:
    sketches = torch.empty(len(rows), store.d, dtype=torch.float32, device="cpu")
    losses = sketches.new_empty(len(rows))
    for shard, positions, places in store.by_shard(rows):
        sketches[positions], losses[positions] = shard.decoded(places), shard.numbers("loss")[places]
    return Sketched(sketches, losses, {})
