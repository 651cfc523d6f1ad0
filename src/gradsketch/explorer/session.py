"""What the page asks of an index: questions, rows, outliers, neighbours, sources, comparisons; no web.

Work with the model is serialised by one lock, and the fitting of preconditioners by another. Paging takes neither, so
that a long question holds up no one who reads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from gradsketch.attribution.answers import hit_of
from gradsketch.attribution.index import Index
from gradsketch.attribution.queries import Queries
from gradsketch.attribution.results import Hit, Hits, Score, SelfInfluence
from gradsketch.attribution.scores import KINDS
from gradsketch.attribution.scoring import DAMPING
from gradsketch.errors import InputError
from gradsketch.explorer.forms import Form, Question, form_of
from gradsketch.explorer.rows import Facet, RowTable

__all__ = ["About", "Answer", "Ask", "Comparison", "Neighbours", "Outliers", "RowPage", "Session", "Source", "Sources"]

_ANSWERS, _SKETCHED, _SCORES, _OUTLIERS = 16, 32, 4, 4  # that stay in memory
_SAMPLES = 4  # questions that are offered
_MOST_ROWS, _MOST_HITS, _MOST_QUESTIONS, _MOST_TOKENS = 200, 200, 100, 1000

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Ask:
    """Questions, and how rows are scored for them; ``checkpoint``: its score alone counts, by default all together."""

    questions: tuple[Question, ...]
    score: str = "ridge"
    damping: float | str = DAMPING
    k: int = 10
    opponents: int = 5
    where: dict[str, list[Any]] = field(default_factory=dict)
    together: bool = False
    checkpoint: int | None = None
    tokens: int = 32


@dataclass(frozen=True)
class Neighbours:
    """The rows whose gradients are most like, and most unlike, that of one row."""

    row: int
    score: str = "cosine"
    damping: float | str = DAMPING
    k: int = 10
    opponents: int = 5
    where: dict[str, list[Any]] = field(default_factory=dict)
    checkpoint: int | None = None


@dataclass(frozen=True)
class About:
    """What is open: the index, its columns, the form of its questions, and what is missing to ask it some."""

    index: str
    rows: int
    there: int
    d: int
    dtype: str
    loaded: str
    missing: str
    checkpoints: tuple[str, ...]
    facets: tuple[Facet, ...]
    columns: tuple[str, ...]
    scores: tuple[Score, ...]
    prompt: str
    answer: str | None
    takes_whole: bool
    samples: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """The hits of what was asked; ``id`` names it, and ``asked`` has the answers that the model gave."""

    id: str
    asked: Ask | Neighbours
    hits: Hits


@dataclass(frozen=True)
class RowPage:
    """Rows from a place in a list of ``total``, each as a hit whose score is what the list is in order of."""

    total: int
    offset: int
    rows: tuple[Hit, ...]


@dataclass(frozen=True)
class Outliers(RowPage):
    """Rows by their score for themselves, the largest first, with the median over all rows."""

    score: Score
    median: float


@dataclass(frozen=True)
class Source:
    """One value of a column: how many rows, the sum of their scores, and the sums of those above and below zero."""

    value: Any
    rows: int
    total: float
    positive: float
    negative: float


@dataclass(frozen=True)
class Sources:
    """Which source did it: scores summed by the values of a column, the largest sums first."""

    column: str
    question: int
    distinct: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Comparison:
    """How alike two answers are: hits they share, and the correlation of their scores over all rows (None: flat)."""

    shared: tuple[int, ...]
    hits: tuple[int, int]
    correlation: float | None
    rows: int


class Session:
    """One index, and the model it is asked with, where there is one.

    Args:
        index: opened with its task, where there is a model.
        model: None where it cannot be loaded; then ``missing`` says why.
        loaded: a line that says what the model is.
        missing: what is missing.
    """

    def __init__(self, index: Index, model: nn.Module | None = None, *, loaded: str = "", missing: str = "") -> None:
        self.index, self.model, self.loaded, self.missing = index, model, loaded, missing
        self.table = RowTable(index.stores[0])
        self.left_out = index.left_out
        task = index.task
        self.form: Form | None = None if task is None or model is None else form_of(task, self.table.kinds)
        self._model_lock, self._scoring_lock = threading.Lock(), threading.Lock()
        self._answers: _Recent[tuple[Answer, Queries]] = _Recent(_ANSWERS)
        self._sketched: _Recent[Queries] = _Recent(_SKETCHED)
        self._scores: _Recent[torch.Tensor] = _Recent(_SCORES)
        self._outliers: _Recent[tuple[SelfInfluence, torch.Tensor]] = _Recent(_OUTLIERS)

    def about(self) -> About:
        """Say what is open."""
        store = self.index.stores[0]
        return About(
            index=self.index.folder.uri,
            rows=self.index.rows,
            there=int(self.table.there.sum()),
            d=self.index.d,
            dtype=store.manifest.dtype,
            loaded=self.loaded,
            missing=self.missing,
            checkpoints=tuple(c.name for c in self.index.description.checkpoints),
            facets=self.table.facets(),
            columns=tuple(self.table.kinds),
            scores=tuple(kind.described(None) for kind in KINDS.values()),
            prompt="Text" if self.form is None else self.form.prompt,
            answer=None if self.form is None else self.form.answer,
            takes_whole=self.form is not None and self.form.takes_whole,
            samples=self._samples(),
        )

    def _samples(self) -> tuple[Question, ...]:
        """Return questions like a few rows, spread over the data."""
        rows = self.table.there.nonzero()[0]
        if self.form is None or not len(rows):
            return ()
        chosen = sorted({int(rows[len(rows) * i // _SAMPLES]) for i in range(_SAMPLES)})
        found = (self.form.sample(record) for record in self.table.store.records(chosen))
        return tuple(question for question in found if question is not None)

    def ask(self, ask: Ask) -> Answer:
        """Return the hits of some questions, whose answers the model gives where none was typed.

        Raises:
            InputError: no model, no question, or anything that ``Index.query`` refuses.
        """
        if not 0 < len(ask.questions) <= _MOST_QUESTIONS:
            raise InputError(f"{len(ask.questions)} questions", f"1 to {_MOST_QUESTIONS}", "Type a question")
        _require_few(ask)
        with self._model_lock:
            asked = replace(ask, questions=tuple(self._completed(question, ask.tokens) for question in ask.questions))
            examples = [self._example(question) for question in asked.questions]
            queries = self._sketched.get(_name(examples), lambda: self.index.sketch(self.model, examples))
        groups = [list(range(len(examples)))] if ask.together else [[i] for i in range(len(examples))]
        return self._answered(asked, queries.grouped(groups))

    def neighbours(self, asked: Neighbours) -> Answer:
        """Return the rows nearest to one row, and those farthest from it, by their gradients; needs no model.

        Raises:
            InputError: there is no such row, or anything that ``Index.query`` refuses.
        """
        _require_few(asked)
        return self._answered(asked, self.index.stored([asked.row]), itself=asked.row)

    def explain(self, answer: str, top: int = 5) -> Answer:
        """Return an answer with the shares of tokens in its first hits.

        Raises:
            InputError: the answer is forgotten, there is no model, or the index does not hold the examples.
        """
        found, queries = self._known(answer)
        if self.model is None:
            raise InputError("no model to colour tokens with", "the model of the index", "Start with --model")
        weights = self._weights(found.asked.checkpoint)
        with self._model_lock:
            hits = self.index.explain(self.model, found.hits, top=top, sketched=queries, weights=weights)
        coloured = replace(found, hits=hits)
        self._answers.put(answer, (coloured, queries))
        return coloured

    def answer(self, answer: str) -> Answer:
        """Return an answer that was given before.

        Raises:
            InputError: it is forgotten.
        """
        return self._known(answer)[0]

    def sources(self, answer: str, column: str, question: int = 0) -> Sources:
        """Return the scores of all rows for one question, summed by a column; the answer's conditions hold.

        Raises:
            InputError: the answer is forgotten, or there is no such column or question.
        """
        asked = self._known(answer)[0].asked
        scores = self._scores_of(answer, question).numpy()
        kept = self.table.keep(asked.where)
        if isinstance(asked, Neighbours):
            kept[asked.row] = False
        sums = self.table.sums(column, scores, kept)
        distinct = len(self.table.coded(column).values)
        found = tuple(Source(value, rows, up + down, up, down) for value, rows, up, down in sums)
        return Sources(column, question, distinct, found)

    def compare(self, first: tuple[str, int], second: tuple[str, int]) -> Comparison:
        """Return how alike two answers are; each is an answer's id, and the number of its question.

        Raises:
            InputError: an answer is forgotten, or has no such question.
        """
        a, b = (self._scores_of(*one) for one in (first, second))
        rows = [
            {hit.row: None for hit in self._known(name)[0].hits[number].proponents} for name, number in (first, second)
        ]
        usable = torch.isfinite(a) & torch.isfinite(b)
        shared = tuple(row for row in rows[0] if row in rows[1])
        return Comparison(shared, (len(rows[0]), len(rows[1])), _correlation(a[usable], b[usable]), int(usable.sum()))

    def rows(
        self, where: Mapping[str, Sequence[Any]], words: str = "", order: str = "row", offset: int = 0, count: int = 20
    ) -> RowPage:
        """Return a page of the rows that meet conditions and hold some words.

        Raises:
            InputError: no such column or order, or a page that is too long.
        """
        found = self.table.matching(where, words, order)
        _require_page(offset, count)
        chosen = found[offset : offset + count].tolist()
        return RowPage(len(found), offset, self._shown(chosen, [0.0] * len(chosen), offset))

    def outliers(
        self,
        score: str = "ridge",
        damping: float | str = DAMPING,
        where: Mapping[str, Sequence[Any]] | None = None,
        offset: int = 0,
        count: int = 20,
    ) -> Outliers:
        """Return a page of the rows by their score for themselves, the largest first.

        Raises:
            InputError: no such score or column, sketches too coarse for it, or a page that is too long.
        """
        _require_page(offset, count)
        with self._scoring_lock:
            own, order = self._outliers.get(_name([score, damping]), lambda: self._self_influence(score, damping))
        kept = torch.from_numpy(self.table.keep(where or {}))
        rows = order[kept[order]]
        chosen = rows[offset : offset + count].tolist()
        shown = self._shown(chosen, own.values[chosen].tolist(), offset)
        return Outliers(len(rows), offset, shown, own.score, float(own.values.nanmedian()))

    def _self_influence(self, score: str, damping: float | str) -> tuple[SelfInfluence, torch.Tensor]:
        own = self.index.self_influence(score, damping=damping)
        order = own.values.nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices
        return own, order[: int((~own.values.isnan()).sum())]

    def _shown(self, rows: Sequence[int], values: Sequence[float], offset: int) -> tuple[Hit, ...]:
        records = self.table.store.records(rows)
        told = [{"left out": self.left_out[row]} if row in self.left_out else {} for row in rows]
        parts = zip(rows, values, records, told, strict=True)
        return tuple(
            hit_of(offset + i, row, value, record | more) for i, (row, value, record, more) in enumerate(parts, 1)
        )

    def _completed(self, question: Question, tokens: int) -> Question:
        """Return the question with an answer: as it was typed, or as the model gives it."""
        if self.form is None or self.model is None:
            raise InputError(self.missing or "no model", "the model of the index", "Start with --model")
        if question.whole or question.answer or self.form.answer is None:
            return question
        if not 0 < tokens <= _MOST_TOKENS:
            raise InputError(f"an answer of {tokens} tokens", f"1 to {_MOST_TOKENS}", "Ask for fewer")
        answer = self.form.complete(self.model, question.prompt, tokens)
        if not answer:
            raise InputError(f"{question.prompt[:80]!r}, to which the model says nothing", "an answer", "Type one")
        return replace(question, answer=answer)

    def _example(self, question: Question) -> Any:
        assert self.form is not None
        if question.whole:
            return {"text": question.prompt}
        return self.form.example(question.prompt, question.answer or "")

    def _answered(self, asked: Ask | Neighbours, queries: Queries, itself: int | None = None) -> Answer:
        """Return the hits of sketched questions, without the row that is itself the question, and keep them."""
        weights, more = self._weights(asked.checkpoint), int(itself is not None)
        with self._scoring_lock:
            hits = self.index.query(
                None,
                queries,
                k=asked.k + more,
                score=asked.score,
                opponents=asked.opponents + more * bool(asked.opponents),
                damping=asked.damping,
                where=asked.where or None,
                weights=weights,
            )
        hits = hits if itself is None else _without(hits, itself, asked.k, asked.opponents)
        answer = Answer(_name(asdict(asked)), asked, hits)
        self._answers.put(answer.id, (answer, queries))
        return answer

    def _weights(self, checkpoint: int | None) -> list[float] | None:
        """Return weights under which one checkpoint counts alone, as it was weighed; None: all of them."""
        stored = [c.weight for c in self.index.description.checkpoints]
        if checkpoint is None:
            return None
        if not 0 <= checkpoint < len(stored):
            raise InputError(f"checkpoint {checkpoint}", f"0 to {len(stored) - 1}", "Choose one of the index")
        return [weight * (number == checkpoint) for number, weight in enumerate(stored)]

    def _known(self, answer: str) -> tuple[Answer, Queries]:
        found = self._answers.find(answer)
        if found is None:
            raise InputError("an answer that is no longer kept", f"one of the last {_ANSWERS}", "Ask again")
        return found

    def _scores_of(self, answer: str, question: int) -> torch.Tensor:
        """Return every row's score for one question of an answer."""
        found, queries = self._known(answer)
        asked, count = found.asked, len(found.hits)
        if not 0 <= question < count:
            raise InputError(f"question {question}", f"0 to {count - 1}", "Choose one of the answer")
        weights = self._weights(asked.checkpoint)

        def scored() -> torch.Tensor:
            return self.index.scores(None, queries, score=asked.score, damping=asked.damping, weights=weights)

        with self._scoring_lock:
            return self._scores.get(answer, scored)[question]


class _Recent(OrderedDict[str, _Value]):
    """The values that were used last, at most ``most`` of them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self._lock = most, threading.Lock()

    def find(self, key: str) -> _Value | None:
        with self._lock:
            if key in self:
                self.move_to_end(key)
            return super().get(key)

    def put(self, key: str, value: _Value) -> None:
        with self._lock:
            self[key] = value
            self.move_to_end(key)
            while len(self) > self.most:
                self.popitem(last=False)

    def get(self, key: str, make: Callable[[], _Value]) -> _Value:  # type: ignore[override]
        found = self.find(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found


def _name(value: Any) -> str:
    """Return a name that only this value has."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _require_few(asked: Ask | Neighbours) -> None:
    for name, value in (("k", asked.k), ("opponents", asked.opponents)):
        if value > _MOST_HITS:
            raise InputError(f"{name}={value}", f"at most {_MOST_HITS}", "Ask for fewer")


def _require_page(offset: int, count: int) -> None:
    if offset < 0 or not 0 < count <= _MOST_ROWS:
        raise InputError(f"{count} rows from {offset}", f"1 to {_MOST_ROWS} rows, from 0 on", "Ask for fewer")


def _without(hits: Hits, row: int, k: int, opponents: int) -> Hits:
    """Return the hits of one question without a row."""

    def rest(found: Sequence[Hit], most: int) -> tuple[Hit, ...]:
        others = [hit for hit in found if hit.row != row][:most]
        return tuple(replace(hit, rank=rank) for rank, hit in enumerate(others, start=1))

    query = hits[0]
    query = replace(query, proponents=rest(query.proponents, k), opponents=rest(query.opponents, opponents))
    return replace(hits, queries=(query,))


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return Pearson's correlation, or None where one side is constant."""
    if len(a) < 2 or float(a.std()) == 0 or float(b.std()) == 0:
        return None
    return float(np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1])
