"""From the best rows to answers that can be read: the last step of a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.attribution.examples import display, fields
from gradsketch.attribution.queries import Queries
from gradsketch.attribution.results import Hit, QueryHits
from gradsketch.attribution.scan import Top
from gradsketch.store import Store

__all__ = ["answers", "hit_of"]


def answers(store: Store, queries: Queries, best: Top, worst: Top | None) -> tuple[QueryHits, ...]:
    """Return the hits of every group of questions, with what the store says of each row."""
    lists = [best] if worst is None else [best, worst]
    rows = sorted({row for found in lists for row in found.rows.flatten().tolist() if row >= 0})
    records = dict(zip(rows, store.records(rows), strict=True))
    last = queries.sketched[-1]
    norms = queries.means(torch.linalg.vector_norm(last.sketches.double(), dim=-1).float())
    losses = queries.means(last.losses)
    return tuple(
        _answer(queries, number, losses, norms, [_hits(found, number, records) for found in lists])
        for number in range(len(queries.groups))
    )


def _answer(
    queries: Queries,
    number: int,
    losses: Float[Tensor, " groups"],
    norms: Float[Tensor, " groups"],
    hits: list[tuple[Hit, ...]],
) -> QueryHits:
    members = [queries.examples[i] for i in queries.groups[number]]
    text, answer = display(fields(members[0])[1])
    more = f" (and {len(members) - 1} more)" * (len(members) > 1)
    return QueryHits(
        text=("(not a text)" if text is None else text) + more,
        answer=answer,
        loss=float(losses[number]),
        gradient_norm=float(norms[number]),
        proponents=hits[0],
        opponents=hits[1] if len(hits) > 1 else (),
        members=len(members),
        example=members if len(members) > 1 else members[0],
    )


def _hits(found: Top, number: int, records: Mapping[int, dict[str, Any]]) -> tuple[Hit, ...]:
    pairs = zip(found.rows[number].tolist(), found.scores[number].tolist(), strict=True)
    kept = [(row, score) for row, score in pairs if row >= 0]
    return tuple(hit_of(rank, row, score, records[row]) for rank, (row, score) in enumerate(kept, start=1))


def hit_of(rank: int, row: int, score: float, record: dict[str, Any]) -> Hit:
    """Return a row with its score, from what the store says of it."""
    record = dict(record)
    id_, loss, norm = record.pop("id"), record.pop("loss"), record.pop("gradient_norm")
    text, answer = display(record)
    parts = ("text", "text_pair", "prompt", "source", "answer", "completion", "target")
    shown = (text, answer, *([record["text"], record.get("text_pair")] if isinstance(record.get("text"), str) else []))
    metadata = {n: value for n, value in record.items() if n not in parts or value not in shown}
    if answer is not None and text is not None:
        text += answer if "prompt" in record else f" → {answer}"
    return Hit(rank, row, id_, score, text, loss, norm, metadata)
