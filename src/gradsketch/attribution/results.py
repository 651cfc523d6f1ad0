"""What a query gives back: frozen records, with their units, their sign and what they cost.

The sign is one everywhere: a positive score is a proponent. A gradient step on that training example lowers the
query's loss; a step on an example with a negative score (an opponent) raises it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.durable import write_file

if TYPE_CHECKING:
    import pandas

__all__ = ["SIGN", "Cost", "Hit", "Hits", "QueryHits", "Score", "SelfInfluence", "TokenContribution"]

SIGN = "positive: training on the example lowers the query's loss; negative: it raises it"
_TEXT_WIDTH = 72


@dataclass(frozen=True)
class Score:
    """What a score means: its name, the formula, and what the number counts.

    ``formula`` uses q for the query's gradient sketch, x for the training example's, X for all of them.
    """

    name: str
    formula: str
    units: str
    damping: float | None = None


@dataclass(frozen=True)
class TokenContribution:
    """How much one token of a training example adds to its score. The tokens of a hit add up to the score."""

    token: str
    value: float


@dataclass(frozen=True)
class Hit:
    """One training example found for a query.

    ``rank`` counts from 1, strongest first; ``row`` is the example's position in the indexed data; ``gradient_norm``
    is that of its sketch, an unbiased estimate for the gradient. ``tokens`` is filled by :meth:`Index.explain`;
    what no single token carries (a pooled classification head) stands in ``beyond_tokens``.
    """

    rank: int
    row: int
    id: str
    score: float
    text: str | None
    loss: float
    gradient_norm: float
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[TokenContribution, ...] = ()
    beyond_tokens: float = 0.0


@dataclass(frozen=True)
class QueryHits:
    """The hits of one query: proponents from the top of the list, opponents from its bottom.

    ``text`` is what was asked and ``answer`` what the model said or should say, where the example tells them apart;
    ``example`` is the query as given, and ``members`` counts the examples averaged into it (1 unless a group).
    """

    text: str
    answer: str | None
    loss: float
    gradient_norm: float
    proponents: tuple[Hit, ...]
    opponents: tuple[Hit, ...] = ()
    members: int = 1
    example: Any = None

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.proponents)

    def __len__(self) -> int:
        return len(self.proponents)

    def __getitem__(self, position: int) -> Hit:
        return self.proponents[position]


@dataclass(frozen=True)
class Cost:
    """Seconds of wall time for the queries' gradients, the preconditioner and the scan; bytes read; rows scored."""

    gradients: float
    precondition: float
    scan: float
    bytes_read: int
    rows: int


@dataclass(frozen=True)
class Hits:
    """The answer to "which training examples made the model say this?", for one or more queries.

    A sequence of :class:`QueryHits`: ``hits[0].proponents[0].text`` is the strongest proponent of the first query.
    """

    queries: tuple[QueryHits, ...]
    score: Score
    index: str
    rows: int
    d: int
    cost: Cost
    sign: str = SIGN

    def __iter__(self) -> Iterator[QueryHits]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, position: int) -> QueryHits:
        return self.queries[position]

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per hit: query, query_text, kind, rank, row, id, score, text, loss, gradient_norm, metadata.

        A metadata column whose name is taken is prefixed with ``metadata_``.
        """
        import pandas

        return pandas.DataFrame(list(self._records()))

    def to_json(self, path: str | Path | None = None, *, indent: int | None = 1) -> str:
        """Return everything as JSON text, and write it to ``path`` where one is given. NaN becomes null."""
        text = json.dumps(_plain(asdict(self)), indent=indent, ensure_ascii=False, default=str)
        if path is not None:
            write_file(path, text + "\n")
        return text

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page (no network) and return its path."""
        # The report layer stands above this one and may import it, so it is looked up only when called.
        report = importlib.import_module("gradsketch.report")
        return Path(report.hits_page(self, path))

    def __str__(self) -> str:
        """Return a table for the terminal."""
        lines: list[str] = []
        for query in self.queries:
            answer = f" → {_one_line(query.answer)}" if query.answer else ""
            lines += ["", f"Query: {_one_line(query.text)}{answer}   (loss {query.loss:.3g})"]
            lines += [_table_line(hit) for hit in query.proponents]
            if query.opponents:
                lines += ["  opponents", *(_table_line(hit) for hit in query.opponents)]
        return "\n".join([f"{self.score.name}: {self.score.units}; {self.sign}", *lines])

    def _records(self) -> Iterator[dict[str, Any]]:
        for number, query in enumerate(self.queries):
            for kind, hits in (("proponent", query.proponents), ("opponent", query.opponents)):
                for hit in hits:
                    record = {"query": number, "query_text": query.text, "kind": kind, "rank": hit.rank}
                    record |= {"row": hit.row, "id": hit.id, "score": hit.score, "text": hit.text}
                    record |= {"loss": hit.loss, "gradient_norm": hit.gradient_norm}
                    yield record | {(f"metadata_{k}" if k in record else k): v for k, v in hit.metadata.items()}


@dataclass(frozen=True)
class SelfInfluence:
    """Every training example's score for itself, in the order of the rows (NaN: skipped when the index was built)."""

    ids: tuple[str, ...]
    values: Float[Tensor, " rows"]
    losses: Float[Tensor, " rows"]
    score: Score
    seconds: float

    def top(self, k: int) -> list[tuple[int, str, float]]:
        """Return (row, id, value) of the k largest, largest first."""
        finite = torch.nan_to_num(self.values, nan=-torch.inf)
        rows = finite.sort(descending=True, stable=True).indices[:k].tolist()
        return [(row, self.ids[row], float(self.values[row])) for row in rows]

    def to_pandas(self) -> pandas.DataFrame:
        """Return row, id, self_influence and loss, in the order of the rows."""
        import pandas

        columns = {"row": range(len(self.ids)), "id": self.ids}
        return pandas.DataFrame({**columns, "self_influence": self.values.numpy(), "loss": self.losses.numpy()})


def _table_line(hit: Hit) -> str:
    text = hit.text if hit.text is not None else ", ".join(f"{k}={v}" for k, v in hit.metadata.items())
    return f"  {hit.rank:>3}  {hit.score:>+9.4g}  {hit.id:<12}  {_one_line(text)}"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 1] + "…"


def _plain(value: Any) -> Any:
    """Return ``value`` with non-finite floats as None, so that every JSON reader takes the text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
