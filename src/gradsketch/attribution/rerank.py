"""Exact scores of the candidates that sketches found: their gradients are formed again, and nothing is sketched.

A score is qᵀ(F + λI)⁻¹x / N with whole gradients q and x. The inverse is applied to the few questions; products with
the many candidates then come from the factors that layers leave behind (``Directions``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from gradsketch.as_found import evaluating
from gradsketch.attribution.checkpoints import Checkpoint, weights_of
from gradsketch.attribution.gradients import GradientSource
from gradsketch.attribution.results import Score
from gradsketch.attribution.scan import Top
from gradsketch.attribution.stored_losses import first_apart, losses_of
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.curvature import gauss_newton, loss_gradient
from gradsketch.gradients.curvature.solve import DampedInverse
from gradsketch.gradients.data import read_all
from gradsketch.gradients.factors.estimation import Labels
from gradsketch.gradients.factors.inverse import InverseFisher, inverse_fisher
from gradsketch.gradients.parameters import Parameters
from gradsketch.gradients.per_example.audit import tolerance
from gradsketch.gradients.per_example.directions import Directions
from gradsketch.gradients.tasks import Task
from gradsketch.linear_map import LinearMap
from gradsketch.progress import hidden
from gradsketch.store import Store

__all__ = ["Exact", "Reranker", "exact_named", "is_exact"]

# Entries of questions' directions that are held at once.
_HELD = 1 << 28
_EXAMPLES = 8  # a batch of second derivatives

Advance = Callable[[int], Any]
Make = Callable[[nn.Module, Task, Sequence[Any], Parameters, float, Advance], LinearMap]


@dataclass(frozen=True)
class Exact:
    """A kind of exact score: how (F + λI)⁻¹ is made, from how many training rows, in how many passes over them.

    ``damping`` is what λ is by default, as a fraction of the mean eigenvalue.
    """

    name: str
    formula: str
    rows: int
    passes: int
    make: Make
    damping: float

    def score(self, damping: float) -> Score:
        """Return what goes into results."""
        units = "estimated rise of the query's loss when the example is left out, in nats"
        return Score(self.name, self.formula, units, damping)


def _fisher(labels: Labels) -> Make:
    def make(
        model: nn.Module, task: Task, rows: Sequence[Any], chosen: Parameters, damping: float, advance: Advance
    ) -> LinearMap:
        return inverse_fisher(model, task, rows, parameters=chosen, damping=damping, labels=labels, advance=advance)

    return make


def _gauss_newton(
    model: nn.Module, task: Task, rows: Sequence[Any], chosen: Parameters, damping: float, advance: Advance
) -> LinearMap:
    with evaluating(model):
        return DampedInverse(gauss_newton(model, task, rows, chosen, batch_size=_EXAMPLES), damping)


# Of 0.0001 to 10 the best or next to it, by retraining on digits and on a language model (benchmarks/damping.py,
# benchmarks/lm_attribution.py). Conjugate gradients settle on a larger one in fewer steps.
_EKFAC = 0.001
_FORMULA = "qᵀ(F + λI)⁻¹x / N with whole gradients, F {}"
_KINDS = {
    kind.name: kind
    for kind in (
        Exact("ekfac", _FORMULA.format("by EK-FAC"), 1024, 2, _fisher("sampled"), _EKFAC),
        Exact(
            "empirical-ekfac", _FORMULA.format("by EK-FAC, labels of the data"), 1024, 2, _fisher("empirical"), _EKFAC
        ),
        Exact("gauss-newton", _FORMULA.format("the Gauss-Newton matrix"), 256, 0, _gauss_newton, 0.1),
    )
}


def exact_named(name: str) -> Exact:
    """Return the kind of exact score with this name.

    Raises:
        InputError: there is none.
    """
    if not is_exact(name):
        raise InputError(f"exact={name!r}", f"one of {', '.join(_KINDS)}", 'Pass exact="ekfac"')
    return _KINDS[name]


def is_exact(name: str) -> bool:
    """Whether a score of this name is one of these."""
    return name in _KINDS


class Reranker:
    """Scores candidates exactly, at every checkpoint of an index of ``store``.

    ``names`` are those of the parameters. ``examples`` reads training examples by row. ``kept`` holds what was
    estimated before, by checkpoint and kind, and takes what is estimated now: with another damping it serves too. What
    takes products with the model again is never kept.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        kind: Exact,
        damping: float | str,
        *,
        names: Sequence[str],
        checkpoints: Sequence[Checkpoint],
        store: Store,
        examples: Callable[[Sequence[int]], Mapping[int, Any]],
        kept: dict[Any, InverseFisher],
        batch_tokens: int = 4096,
        progress: bool | None = False,
    ) -> None:
        if isinstance(damping, str):
            raise InputError(f"damping={damping!r} with exact scores", "a positive number", "Pass damping=0.001")
        self.model, self.task, self.kind, self.damping = model, task, kind, damping
        self.names, self.checkpoints, self.store = names, checkpoints, store
        self.examples, self.kept, self.batch_tokens, self.progress = examples, kept, batch_tokens, progress

    @property
    def score(self) -> Score:
        """What the scores mean."""
        return self.kind.score(float(self.damping))

    def __call__(self, groups: Sequence[Sequence[Any]], candidates: Int64[Tensor, "m c"]) -> Float[Tensor, "m c"]:
        """Return the score of each candidate for its group of questions (−1: no row, −inf).

        Raises:
            InputError: an example that the task cannot read, or a loss whose curvature cannot be had.
            NonFiniteError: a gradient is not finite.
        """
        if not (candidates >= 0).any():
            return torch.full(candidates.shape, -torch.inf, dtype=torch.float32, device="cpu")
        examples = self.examples(candidates[candidates >= 0].unique().tolist())
        scores, sample = torch.zeros(candidates.shape, dtype=torch.float32, device="cpu"), len(self._sample)
        if not self.checkpoints[0].weight:
            self._require_of_index(list(examples), list(examples.values()))
        total = sum(c.weight != 0 for c in self.checkpoints) * (self.kind.passes * sample + len(examples))
        with tqdm(total=total, unit="ex", desc=self._said(sample, len(examples)), disable=self._silent) as bar:
            for number, checkpoint in enumerate(self.checkpoints):
                if not checkpoint.weight:
                    continue
                with weights_of(self.model, checkpoint):
                    parameters, inverse = self._parameters(), self._inverse(number, bar.update)
                    step = max(1, _HELD // parameters.n)
                    for start in range(0, len(groups), step):
                        part = slice(start, start + step)
                        along = Directions(parameters.shapes, self._directions(groups[part], parameters, inverse))
                        products = self._products(along, candidates[part], examples, bar.update, number)
                        scores[part] += checkpoint.weight / self.store.rows * products
        return scores.masked_fill(candidates < 0, -torch.inf)

    def best(
        self, groups: Sequence[Sequence[Any]], proponents: Top, others: Top | None, k: int, opponents: int
    ) -> tuple[Top, Top | None]:
        """Return both ends of the list of what was found, by exact scores."""
        candidates = _candidates([proponents, *([others] if others else [])])
        scores = self(groups, candidates)
        least = _reordered(candidates, scores, opponents, sign=-1) if others else None
        return _reordered(candidates, scores, k, sign=1), least

    def directions(self, groups: Sequence[Sequence[Any]], number: int) -> Iterator[dict[str, Tensor]]:
        """Yield (F + λI)⁻¹ q for each group at a checkpoint, whose weights the model has now, by parameter name."""
        parameters, inverse = self._parameters(), self._inverse(number, lambda count: None)
        sizes = [math.prod(shape) for shape in parameters.shapes.values()]
        for group in groups:
            parts = self._directions([group], parameters, inverse)[0].split(sizes)
            yield {name: part.view(shape) for (name, shape), part in zip(parameters.shapes.items(), parts, strict=True)}

    def _inverse(self, number: int, advance: Advance) -> LinearMap:
        """Return (F + λI)⁻¹ at a checkpoint, estimated where that was not done before."""
        key, damping = (number, self.kind.name), float(self.damping)
        if key in self.kept:
            advance(self.kind.passes * len(self._sample))
            return self.kept[key].damped(damping)
        if number == next(i for i, checkpoint in enumerate(self.checkpoints) if checkpoint.weight):
            self._require_of_index(self._sample, self._sampled)
        made = self.kind.make(self.model, self.task, self._sampled, self._parameters(), damping, advance)
        if isinstance(made, InverseFisher):
            self.kept[key] = made
        return made

    def _require_of_index(self, rows: Sequence[int], examples: Sequence[Any]) -> None:
        """Refuse other examples than those of these rows, whose losses were stored at the first checkpoint."""
        with weights_of(self.model, self.checkpoints[0]):
            losses = losses_of(self.model, self.task, examples, batch_tokens=self.batch_tokens)
            self._require_same_losses(rows, losses)

    @cached_property
    def _sampled(self) -> list[Any]:
        """The examples of which F is estimated."""
        return list(self.examples(self._sample).values())

    @cached_property
    def _sample(self) -> list[int]:
        """Their rows: spread over the training data, without those that have no gradient."""
        rows = range(0, self.store.rows, max(1, -(-self.store.rows // self.kind.rows)))
        shards = {self.store.manifest.shard_at(row) for row in rows} & set(self.store.ranges())
        left_out = self.store.snapshot(sorted(shards)).left_out()  # of a large index, few shards of many
        return [row for row in rows if row not in left_out]

    @property
    def _silent(self) -> bool | None:
        return hidden(self.progress)

    def _said(self, sample: int, candidates: int) -> str:
        return f"{self.kind.name} of {sample:,} rows, {candidates:,} candidates"

    def _parameters(self) -> Parameters:
        return Parameters(self.model, include=self.names, frozen=True)

    def _directions(
        self, groups: Sequence[Sequence[Any]], parameters: Parameters, inverse: LinearMap
    ) -> Float[Tensor, "m n"]:
        """Return (F + λI)⁻¹ q for each group, q being the mean of its gradients."""
        with evaluating(self.model):
            means = [
                loss_gradient(self.model, self.task, list(group), parameters, batch_size=_EXAMPLES) for group in groups
            ]
            return inverse(torch.stack(means))

    def _products(
        self,
        along: Directions,
        candidates: Int64[Tensor, "m c"],
        examples: Mapping[int, Any],
        advance: Advance,
        number: int,
    ) -> Float[Tensor, "m c"]:
        """Return ⟨direction, gradient⟩ of every group with each of its candidates; one backward pass a candidate."""
        rows, places = candidates.unique(return_inverse=True)
        numbers = rows[rows >= 0].tolist()
        source = GradientSource(self.model, self.task, along, batch_tokens=self.batch_tokens)

        def name(place: int) -> str:
            return f"row {numbers[place]}"

        read, lengths = read_all(self.task, [examples[row] for row in numbers], name)
        found = source(read, lengths, advance, name)
        if number == 0:
            self._require_same_losses(numbers, found.losses)
        products = found.sketches.T
        self._hold(along, products[:, 0], examples[numbers[0]], name(0))
        none = products.new_zeros(len(products), len(rows) - len(numbers))  # the place of −1, which comes first
        return torch.cat([none, products], 1).gather(1, places)

    def _require_same_losses(self, rows: Sequence[int], losses: Float[Tensor, " rows"]) -> None:
        """Refuse examples that do not have the losses with which their rows were indexed: they are others.

        Raises:
            InputError: they are.
        """
        if (apart := first_apart(losses, self.store, rows)) is not None:
            row, now, then = apart
            raise InputError(
                f"an example of row {row} whose loss is {now:.4g}",
                f"{then:.4g}, with which it was indexed",
                "Pass the data that the index was built of, in its order",
            )

    def _hold(self, along: Directions, products: Float[Tensor, " m"], example: Any, name: str) -> None:
        """Hold one candidate's products, which come from layers' factors, against those with its whole gradient."""
        parameters = self._parameters()
        with evaluating(self.model):
            gradient = loss_gradient(self.model, self.task, [example], parameters)
        lengths, exact = (along.vectors.norm(dim=1) * gradient.norm()).cpu(), along(gradient).cpu()
        dtype = max((t.dtype for _, t in parameters), key=lambda dtype: torch.finfo(dtype).eps)
        # With a small λ a direction is long where gradients are short: lengths alone would hide an error of a product.
        errors, share = (exact - products).abs(), tolerance(dtype)
        allowed = share * exact.abs() + min(share, 100 * torch.finfo(dtype).eps) * lengths
        if (errors > allowed).any():
            warnings.warn(
                f"{name}: its products with whole gradients are off by {float((errors / allowed).max()):.1e} times "
                "what rounding explains: do not trust these exact scores. Without rerank= the scores do not use "
                "such products. Please report this model",
                GradsketchWarning,
                stacklevel=2,
            )


def _candidates(found: Sequence[Top]) -> Int64[Tensor, "m c"]:
    """Return the rows of several lists, each once for each group of questions; −1 pads."""
    listed = [sorted({row for row in rows if row >= 0}) for rows in torch.cat([t.rows for t in found], 1).tolist()]
    width = max(1, *map(len, listed))
    return torch.tensor([rows + [-1] * (width - len(rows)) for rows in listed], device="cpu")


def _reordered(candidates: Int64[Tensor, "m c"], scores: Float[Tensor, "m c"], k: int, *, sign: int) -> Top:
    """Return the k candidates of largest ``sign * score``, ties by row."""
    signed = torch.where(candidates >= 0, sign * scores, -torch.inf)
    values, places = signed.sort(dim=1, descending=True, stable=True)
    rows = candidates.gather(1, places)[:, :k]
    return Top(torch.where(rows >= 0, sign * values[:, :k], -torch.inf), rows)
