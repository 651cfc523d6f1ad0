"""Which tokens of a hit make its score: contributions of tokens, added up over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.attribution.checkpoints import Checkpoint, weights_of
from gradsketch.attribution.description import Description, sketch_for
from gradsketch.attribution.examples import rebuild
from gradsketch.attribution.gates import token_products
from gradsketch.attribution.results import Hit, Hits, QueryHits, TokenContribution
from gradsketch.attribution.scan import Probe
from gradsketch.errors import InputError
from gradsketch.gradients.data import to_device
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Store

__all__ = ["asked_again", "explain_hits", "training_examples"]


def asked_again(hits: Hits) -> tuple[list[Any], list[list[int]]]:
    """Return the examples of all questions, and the positions of each question's members among them."""
    members = [list(query.example) if query.members > 1 else [query.example] for query in hits.queries]
    ends = torch.tensor([len(group) for group in members]).cumsum(0).tolist()
    groups = [list(range(end - len(group), end)) for group, end in zip(members, ends, strict=True)]
    return [example for group in members for example in group], groups


def training_examples(store: Store, hits: Hits, top: int, data: Any) -> dict[int, Any]:
    """Return by row the examples behind the first ``top`` hits of each list: from the data, or as the index holds them.

    Raises:
        InputError: an example that is not a text, without the data.
    """
    rows = sorted({hit.row for query in hits.queries for hit in _first(query, top)})
    examples: dict[int, Any] = {}
    for row, record in zip(rows, store.records(rows), strict=True):
        examples[row] = data[row] if data is not None else rebuild(record)
        if examples[row] is None:
            raise InputError(
                f"row {row}, whose example is not a text that the index holds",
                "the training data",
                "Pass data=... to explain",
            )
    return examples


def explain_hits(
    model: nn.Module,
    task: Task,
    hits: Hits,
    probes: Sequence[Probe],
    examples: Mapping[int, Any],
    *,
    description: Description,
    checkpoints: Sequence[Checkpoint],
    top: int,
) -> Hits:
    """Return the hits with the contributions of their tokens, for the first ``top`` of each list."""
    explained = [
        [replace(hit, tokens=(), beyond_tokens=hit.score) for hit in _first(query, top)] for query in hits.queries
    ]
    device = next(model.parameters()).device
    batches = {row: to_device(task.collate([example]), device) for row, example in examples.items()}
    for probe, checkpoint in zip(probes, checkpoints, strict=True):
        with weights_of(model, checkpoint), evaluating(model):
            sketch = sketch_for(model, description)
            for part, q in zip(explained, probe.directions, strict=True):
                direction = _lifted(sketch, q)
                for i, hit in enumerate(part):
                    products, _ = token_products(model, task, batches[hit.row], direction)
                    texts = _token_texts(task, batches[hit.row], len(products))
                    part[i] = _with_tokens(hit, texts, products * _factor(probe, hit.row))
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


def _lifted(sketch: BlockSum, direction: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Return Phiᵀ q as tensors by parameter name."""
    vector = sketch.lift(direction)
    sizes = [torch.Size(shape).numel() for shape in sketch.shapes.values()]
    parts = vector.split(sizes)
    return {n: part.view(shape) for (n, shape), part in zip(sketch.shapes.items(), parts, strict=True)}


def _token_texts(task: Task, batch: Batch, count: int) -> list[str]:
    ids = batch["input_ids"][0].tolist()
    if count > len(ids):
        ids += batch["labels"][0].tolist()
    tokenizer = getattr(task, "tokenizer", None) or getattr(task, "processor", None)
    if tokenizer is None:
        return [str(i) for i in ids]
    return [str(tokenizer.decode([max(0, i)])) for i in ids]


def _with_tokens(hit: Hit, texts: list[str], values: Float[Tensor, " t"]) -> Hit:
    """Return the hit with these contributions added to those of earlier checkpoints."""
    before = [t.value for t in hit.tokens] or [0.0] * len(texts)
    tokens = tuple(
        TokenContribution(text, old + new) for text, old, new in zip(texts, before, values.tolist(), strict=True)
    )
    return replace(hit, tokens=tokens, beyond_tokens=hit.score - sum(t.value for t in tokens))


def _with_hits(query: QueryHits, hits: list[Hit], top: int) -> QueryHits:
    first = len(query.proponents[:top])
    return replace(
        query,
        proponents=(*hits[:first], *query.proponents[top:]),
        opponents=(*hits[first:], *query.opponents[top:]),
    )
