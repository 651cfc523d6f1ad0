"""What a query gives back: frozen records, with their units, their sign and what they cost.

The sign is one everywhere: a positive score is a proponent. A gradient step on that training example lowers the
query's loss; a step on an example with a negative score (an opponent) raises it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.report.numbers import ranked_figure
from gradsketch.results import Result
from gradsketch.table import aligned, one_line, printable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["SIGN", "Cost", "Hit", "Hits", "QueryHits", "Score", "SelfInfluence", "TokenContribution"]

SIGN = "positive: training on the example lowers the query's loss; negative: it raises it"
_TEXT_WIDTH = 72
_WORDS, _WORD_WIDTH = 4, 16  # shown of an explained hit


@dataclass(frozen=True)
class Score:
    """What a score means: its ``name``, the formula, and in ``units`` what the number counts, as words.

    ``damping`` is λ as a fraction of the mean eigenvalue of F, and None where the formula has none.
    ``formula`` uses q for the query's gradient sketch, x for the training example's, X for all of them. ``comparable``
    says whether scores of different queries compare, as those of unit-length gradients do.
    """

    name: str
    formula: str
    units: str
    damping: float | None = None
    comparable: bool = False


@dataclass(frozen=True)
class TokenContribution:
    """How much one token of a training example adds to its score: ``token`` is the piece of text that it stands for.

    The pieces of a hit join to its text, and their values with ``beyond_tokens`` add up to its score. Tokens inside one
    character share a piece, special tokens have an empty one, and text that the model does not read has the value 0.
    Under a causal language model a value belongs to the *prediction* of its token; the first token, and tokens whose
    labels do not count, have 0.
    """

    token: str
    value: float


@dataclass(frozen=True)
class Hit:
    """One training example found for a query.

    ``rank`` counts from 1, strongest first; ``row`` is the example's position in the indexed data, and ``id``, ``text``
    (None where it has none), ``loss`` and ``metadata`` are its own. What ``score`` counts is in ``hits.score``.
    ``gradient_norm`` is that of its sketch, and its square an unbiased estimate of the gradient's. ``tokens`` is filled
    by :meth:`Index.explain`; what no single token carries (a pooled classification head) stands in ``beyond_tokens``.
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
    """The hits of one query: ``proponents`` from the top of the list, ``opponents`` from its bottom.

    ``loss`` is the query's own, in the unit of the task, and ``gradient_norm`` that of its sketch.
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

    def both_ends(self) -> Iterator[tuple[str, Hit]]:
        """Yield "proponent" or "opponent" with each hit."""
        for kind, hits in (("proponent", self.proponents), ("opponent", self.opponents)):
            for hit in hits:
                yield kind, hit


@dataclass(frozen=True)
class Cost:
    """What an answer cost: seconds of wall time, ``bytes_read``, and the ``rows`` that were scored.

    ``gradients`` is the time of the queries' gradients, ``precondition`` that of the preconditioner, ``scan`` that of
    reading and scoring the rows, and ``rerank`` that of exact scores of candidates.
    """

    gradients: float
    precondition: float
    scan: float
    bytes_read: int
    rows: int
    rerank: float = 0.0


@dataclass(frozen=True, eq=False)
class Hits(Result):
    """The answer to "which training examples made the model say this?", for one or more queries.

    A sequence of its ``queries``: ``hits[0].proponents[0].text`` is the strongest proponent of the first one.
    ``score`` says what the numbers mean and ``sign`` how to read them; ``cost`` is in seconds and bytes; ``index`` is
    the index that was asked, of ``rows`` examples and ``d`` numbers each; ``weights`` are those of its checkpoints in
    the sum of scores. In JSON a value that is no text, number,
    list, dict or tensor (in metadata, or in a query's ``example``) is its text.
    """

    queries: tuple[QueryHits, ...]
    score: Score
    index: str
    rows: int
    d: int
    cost: Cost
    sign: str = SIGN
    weights: tuple[float, ...] = ()

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

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page (no network) and return its path."""
        from gradsketch.report.hits import hits_page  # loads a template engine, which nothing else needs

        return hits_page(self, path)

    def summary(self) -> str:
        strongest = next(iter(self[0]), None) if self.queries else None
        first = "no hit" if strongest is None else printable(strongest.id)
        found = first if strongest is None else f"strongest for the first: {first} ({strongest.score:+.3g})"
        return f"{len(self)} queries against {self.rows:,} examples by {self.score.name}; {found}"

    def _figure(self) -> Figure:
        from gradsketch.report.hits import hits_figure

        return hits_figure(self)

    def __str__(self) -> str:
        """Return a table for the terminal."""
        lines: list[str] = []
        for query in self.queries:
            answer = f" → {one_line(query.answer, _TEXT_WIDTH)}" if query.answer else ""
            lines += ["", f"Query: {one_line(query.text, _TEXT_WIDTH)}{answer}   (loss {query.loss:.3g})"]
            lines += [line for hit in query.proponents for line in _table_lines(hit)]
            if query.opponents:
                lines += ["  opponents", *(line for hit in query.opponents for line in _table_lines(hit))]
        return "\n".join([f"{self.score.name}: {self.score.units}; {self.sign}", *lines])

    def _records(self) -> Iterator[dict[str, Any]]:
        for number, query in enumerate(self.queries):
            for kind, hit in query.both_ends():
                record = {"query": number, "query_text": query.text, "kind": kind, "rank": hit.rank}
                record |= {"row": hit.row, "id": hit.id, "score": hit.score, "text": hit.text}
                record |= {"loss": hit.loss, "gradient_norm": hit.gradient_norm}
                yield record | {(f"metadata_{k}" if k in record else k): v for k, v in hit.metadata.items()}


@dataclass(frozen=True, eq=False)
class SelfInfluence(Result):
    """Every training example's score for itself, in the order of the rows (NaN: skipped when the index was built).

    ``ids`` and ``losses`` are those of the examples; ``score`` says what ``values`` count; ``seconds`` is wall time.
    """

    ids: tuple[str, ...]
    values: Float[Tensor, " rows"]
    losses: Float[Tensor, " rows"]
    score: Score
    seconds: float

    def top(self, k: int) -> list[tuple[int, str, float]]:
        """Return (row, id, value) of the k largest, largest first; rows that were skipped are not among them."""
        finite = torch.nan_to_num(self.values, nan=-torch.inf)
        usable = int((~self.values.isnan()).sum())
        rows = finite.sort(descending=True, stable=True).indices[: min(k, usable)].tolist()
        return [(row, self.ids[row], float(self.values[row])) for row in rows]

    def summary(self) -> str:
        skipped = int(self.values.isnan().sum())
        first = "".join(f", largest {value:.3g} ({printable(id_)})" for _, id_, value in self.top(1))
        return f"self-influence of {len(self.ids):,} examples by {self.score.name}{first}, {skipped} skipped"

    def __str__(self) -> str:
        """Return the ten largest as a table for the terminal."""
        cells = [[str(row), id_, f"{value:.4g}", f"{float(self.losses[row]):.4g}"] for row, id_, value in self.top(10)]
        return "\n".join([*aligned(["row", "id", "self-influence", "loss"], cells), self.summary()])

    def _figure(self) -> Figure:
        return ranked_figure(self.values.tolist(), f"self-influence ({self.score.name})", "example")

    def to_pandas(self) -> pandas.DataFrame:
        """Return row, id, self_influence and loss, in the order of the rows."""
        import pandas

        columns = {"row": range(len(self.ids)), "id": self.ids}
        return pandas.DataFrame({**columns, "self_influence": self.values.numpy(), "loss": self.losses.numpy()})


def _table_lines(hit: Hit) -> list[str]:
    """Return a hit's line, and one of the words that matter where it was explained."""
    text = hit.text if hit.text is not None else ", ".join(f"{k}={v}" for k, v in hit.metadata.items())
    line = f"  {hit.rank:>3}  {hit.score:>+9.4g}  {printable(hit.id):<12}  {one_line(text, _TEXT_WIDTH)}"
    words = [token for token in hit.tokens if token.token.strip() and token.value]
    strongest = sorted(words, key=lambda token: abs(token.value), reverse=True)[:_WORDS]
    shown = "  ".join(f"{one_line(token.token, _WORD_WIDTH)} {token.value:+.2g}" for token in strongest)
    return [line, f"{'':>32}{shown}"] if shown else [line]
