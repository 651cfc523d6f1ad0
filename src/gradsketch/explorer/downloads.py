"""An answer as a file: the page of a query, JSON that ``Hits.from_json`` reads, or a table without formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from gradsketch.attribution.results import Hits
from gradsketch.explorer.session import Answer
from gradsketch.plain import as_json
from gradsketch.report.hits import hits_html
from gradsketch.table import printable

__all__ = ["FORMATS", "download", "harmless"]

FORMATS = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
}
# What a cell begins with that Excel, LibreOffice or Sheets computes or skips; the wide forms are taken for them too.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\x00", "＝", "＋", "－", "＠")


def download(answer: Answer, kind: str) -> bytes:
    """Return an answer as the bytes of a file of one of ``FORMATS``."""
    if kind == "html":
        return hits_html(answer.hits).encode("utf-8", "replace")
    if kind == "json":
        return f"{answer.hits.to_json()}\n".encode()
    return _table(answer.hits).encode("utf-8", "replace")


def harmless(cell: Any) -> Any:
    """Return a cell of a table; a text that a program would compute is marked as text by an apostrophe."""
    if not isinstance(cell, str):
        return cell
    shown = printable(cell, lines=True)
    return f"'{shown}" if shown.lstrip(" ").startswith(_FORMULA) else shown


def _table(hits: Hits) -> str:
    columns = list(dict.fromkeys(name for query in hits for _, hit in query.both_ends() for name in hit.metadata))
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_MINIMAL, lineterminator="\r\n")
    fixed = ["question", "asked", "answer", "kind", "rank", "row", "id", "score", "text", "loss", "gradient_norm"]
    names = [f"metadata_{name}" if name in fixed else name for name in columns]
    writer.writerow([harmless(name) for name in [*fixed, *names]])
    for record in _records(hits, columns):
        writer.writerow([harmless(cell) for cell in record])
    return out.getvalue()


def _records(hits: Hits, columns: list[str]) -> Iterator[list[Any]]:
    for number, query in enumerate(hits, start=1):
        for kind, hit in query.both_ends():
            own = [hit.rank, hit.row, hit.id, hit.score, hit.text, hit.loss, hit.gradient_norm]
            metadata = (hit.metadata.get(name) for name in columns)
            yield [number, query.text, query.answer, kind, *own, *(_cell(value) for value in metadata)]


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else as_json(value, indent=None)
