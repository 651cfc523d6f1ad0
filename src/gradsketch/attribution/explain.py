"""Which tokens of a hit make its score: contributions of tokens, added up over checkpoints.

For a causal language model a token's contribution is that of its prediction: the loss sits there. The first token, and
tokens whose labels do not count, are predicted by nobody and have none. For every other task it is the part of the
gradient that flows through the token's place in the layers (:mod:`gradsketch.attribution.gates`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.attribution.checkpoints import Checkpoint, weights_of
from gradsketch.attribution.description import Description, sketch_for
from gradsketch.attribution.examples import fields, rebuild
from gradsketch.attribution.gates import token_products
from gradsketch.attribution.predictions import prediction_products
from gradsketch.attribution.rerank import Reranker
from gradsketch.attribution.results import Hit, Hits, QueryHits, TokenContribution
from gradsketch.attribution.scan import Probe
from gradsketch.errors import InputError
from gradsketch.gradients.data import to_device
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.per_example.contributions import GradientSketch
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.gradients.tasks.pieces import Piece, decoded
from gradsketch.store import Store

__all__ = ["Aim", "asked_again", "exact_aims", "explain_hits", "first_rows", "sketched_aims", "training_examples"]

_OWN_DATA = "Pass the data that the index was built of, in its order"


def asked_again(hits: Hits) -> tuple[list[Any], list[list[int]]]:
    """Return the examples of all questions, and the positions of each question's members among them."""
    members = [list(query.example) if query.members > 1 else [query.example] for query in hits.queries]
    ends = torch.tensor([len(group) for group in members], device="cpu").cumsum(0).tolist()
    groups = [list(range(end - len(group), end)) for group, end in zip(members, ends, strict=True)]
    return [example for group in members for example in group], groups


def first_rows(hits: Hits, top: int) -> list[int]:
    """Return the rows of the first ``top`` hits of each list, in order."""
    return sorted({hit.row for query in hits.queries for hit in _first(query, top)})


def training_examples(store: Store, rows: Sequence[int], data: Any) -> dict[int, Any]:
    """Return examples by row: from the data, or as the index holds them.

    Raises:
        InputError: an example that is not a text, without the data; data that is not the index's.
    """
    if data is not None and len(data) != store.rows:
        raise InputError(f"data of {len(data):,} rows", f"the {store.rows:,} rows of the index", _OWN_DATA)
    examples: dict[int, Any] = {}
    for row, record in zip(rows, store.records(list(rows)), strict=True):
        if data is not None:
            _require_same(row, data[row], record)
        examples[row] = data[row] if data is not None else rebuild(record)
        if examples[row] is None:
            raise InputError(
                f"row {row}, whose example is not a text that the index holds", "the training data", "Pass data=..."
            )
    return examples


def _require_same(row: int, example: Any, record: Mapping[str, Any]) -> None:
    """Refuse an example whose id, text or other metadata is not what the index holds of its row."""
    id_, columns = fields(example)
    came = {**columns, "id": str(row) if id_ is None else id_}
    other = [name for name, value in came.items() if not _equal(value, record.get(name))]
    if other:
        raise InputError(
            f"data whose row {row} is not that of the index: its {other[0]} is {str(came[other[0]])[:80]!r}",
            f"{str(record.get(other[0]))[:80]!r}",
            _OWN_DATA,
        )


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or json.dumps(a, default=str) == json.dumps(b, default=str)  # NaN is not NaN


@dataclass(frozen=True)
class Aim:
    """What a row's score at one checkpoint is: ``factor`` of the row times its gradient's product with a direction."""

    direction: Mapping[str, Tensor]
    factor: Callable[[int], float]


# From the number of a checkpoint, whose weights the model has then, to an aim for each group of questions.
Aims = Callable[[int], Iterator[Aim]]


def sketched_aims(
    model: nn.Module,
    description: Description,
    factors: Callable[[int], Factors | None],
    probes: Sequence[Probe],
    number: int,
) -> Iterator[Aim]:
    """Yield what scores by sketches are made of."""
    sketch, probe = sketch_for(model, description, factors(number)), probes[number]
    return (Aim(_lifted(sketch, q), partial(_factor, probe)) for q in probe.directions)


def exact_aims(reranker: Reranker, groups: Sequence[Sequence[Any]], number: int) -> Iterator[Aim]:
    """Yield what exact scores are made of."""
    factor = reranker.checkpoints[number].weight / reranker.store.rows
    return (Aim(direction, lambda row: factor) for direction in reranker.directions(groups, number))


def explain_hits(
    model: nn.Module,
    task: Task,
    hits: Hits,
    aims: Aims,
    examples: Mapping[int, Any],
    *,
    checkpoints: Sequence[Checkpoint],
    top: int,
) -> Hits:
    """Return the hits with the contributions of their tokens, for the first ``top`` of each list."""
    explained = [
        [replace(hit, tokens=(), beyond_tokens=hit.score) for hit in _first(query, top)] for query in hits.queries
    ]
    device = next(model.parameters()).device
    batches = {row: to_device(task.collate([example]), device) for row, example in examples.items()}
    for number, checkpoint in enumerate(checkpoints):
        with weights_of(model, checkpoint), evaluating(model):
            for part, aim in zip(explained, aims(number), strict=True):
                for i, hit in enumerate(part):
                    products = _products(model, task, batches[hit.row], aim.direction) * aim.factor(hit.row)
                    pieces = _pieces(task, examples[hit.row], batches[hit.row], len(products), hit.text)
                    part[i] = _with_tokens(hit, pieces, products.tolist())
    return replace(
        hits, queries=tuple(_with_hits(q, part, top) for q, part in zip(hits.queries, explained, strict=True))
    )


def _first(query: QueryHits, top: int) -> list[Hit]:
    return [*query.proponents[:top], *query.opponents[:top]]


def _factor(probe: Probe, row: int) -> float:
    """Return what products with a row are multiplied with in its score; nothing comes of a gradient that is zero."""
    if not probe.unit_length:
        return probe.weight
    norm = float(probe.store.records([row])[0]["gradient_norm"])
    return probe.weight / norm if norm > 0 else 0.0


def _lifted(sketch: GradientSketch, direction: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Return Phiᵀ q, or P Phiᵀ q in a metric, as tensors by parameter name."""
    vector = sketch.lift(direction)
    sizes = [torch.Size(shape).numel() for shape in sketch.shapes.values()]
    parts = vector.split(sizes)
    return {n: part.view(shape) for (n, shape), part in zip(sketch.shapes.items(), parts, strict=True)}


def _products(model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor]) -> Float[Tensor, " t"]:
    """Return each token's part of the product of the example's gradient with a direction."""
    parts = prediction_products(model, task, batch, direction)
    return token_products(model, task, batch, direction)[0] if parts is None else parts


def _pieces(task: Task, example: Any, batch: Batch, count: int, text: str | None) -> list[Piece]:
    """Return the pieces of a hit's text, which join to it, for ``count`` tokens; some may stand for no text."""
    pieces = task.pieces(example)
    if pieces is None or sum(piece.tokens for piece in pieces) != count:
        ids = batch["input_ids"][0].tolist()
        ids += batch["labels"][0].clamp(min=0).tolist() if count > len(ids) else []
        pieces = decoded(getattr(task, "tokenizer", None) or getattr(task, "processor", None), ids)
    return pieces if text is None else _placed(pieces, text)


def _placed(pieces: Sequence[Piece], text: str) -> list[Piece]:
    """Return pieces that join to a text, from some that stand in it in this order, with gaps or not at all.

    Gaps are what the task does not read: the arrow between source and target, an end that was cut off.
    """
    placed, done = [], 0
    for piece in pieces:
        at = text.find(piece.text, done)
        if at > done:
            placed.append(Piece(text[done:at], 0))
        placed.append(piece if at >= 0 else Piece("", piece.tokens))
        done = at + len(piece.text) if at >= 0 else done
    return [*placed, Piece(text[done:], 0)] if done < len(text) else placed


def _with_tokens(hit: Hit, pieces: Sequence[Piece], values: Sequence[float]) -> Hit:
    """Return the hit with these contributions added to those of earlier checkpoints."""
    ends = accumulate(piece.tokens for piece in pieces)
    new = [sum(values[end - piece.tokens : end]) for piece, end in zip(pieces, ends, strict=True)]
    before = [token.value for token in hit.tokens] or [0.0] * len(pieces)
    tokens = tuple(
        TokenContribution(piece.text, old + value) for piece, old, value in zip(pieces, before, new, strict=True)
    )
    return replace(hit, tokens=tokens, beyond_tokens=hit.score - sum(t.value for t in tokens))


def _with_hits(query: QueryHits, hits: list[Hit], top: int) -> QueryHits:
    first = len(query.proponents[:top])
    return replace(
        query,
        proponents=(*hits[:first], *query.proponents[top:]),
        opponents=(*hits[first:], *query.opponents[top:]),
    )
