"""From what a session returns to what the page draws: plain values, with all texts made printable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradsketch.attribution.answers import hit_of
from gradsketch.attribution.results import Hit
from gradsketch.explorer.session import Answer, Neighbours, Outliers, RowPage
from gradsketch.plain import to_plain
from gradsketch.report.hits import shown_hit, shown_queries
from gradsketch.table import printable

__all__ = ["shown_answer", "shown_page", "shown_texts"]


def shown_answer(answer: Answer) -> dict[str, Any]:
    """Return what is drawn of an answer."""
    hits = answer.hits
    queries = shown_queries(hits)
    for query, found in zip(queries, hits, strict=True):
        for name in ("proponents", "opponents"):
            _number(query[name], getattr(found, name))
        if isinstance(answer.asked, Neighbours):
            query["row"] = shown_hit(hit_of(1, answer.asked.row, 0.0, found.example), 0.0, 0.0)
    shown = {"id": answer.id, "queries": queries, "score": to_plain(hits.score), "cost": to_plain(hits.cost)}
    return {**shown_texts({**shown, "sign": hits.sign}), "asked": to_plain(answer.asked)}


def shown_page(page: RowPage) -> dict[str, Any]:
    """Return what is drawn of a page of rows; bars end at the largest value of the page's list."""
    scale = max((abs(hit.score) for hit in page.rows), default=0.0)
    rows = [shown_hit(hit, scale, 0.0) for hit in page.rows]
    _number(rows, page.rows)
    shown: dict[str, Any] = {"total": page.total, "offset": page.offset, "rows": rows}
    if isinstance(page, Outliers):
        shown |= {"score": to_plain(page.score), "median": f"{page.median:.3g}"}
    return dict(shown_texts(shown))


def shown_texts(value: Any) -> Any:
    """Return plain values with every text made printable."""
    if isinstance(value, str):
        return printable(value, lines=True)
    if isinstance(value, Mapping):
        return {printable(str(name), lines=True): shown_texts(item) for name, item in value.items()}
    return [shown_texts(item) for item in value] if isinstance(value, list | tuple) else value


def _number(shown: list[dict[str, Any]], hits: Sequence[Hit]) -> None:
    """Say of each hit which row it is."""
    for one, hit in zip(shown, hits, strict=True):
        one["row"] = hit.row
