"""Ask an index which training examples caused an output."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.attribution.answers import answers
from gradsketch.attribution.checkpoints import Checkpoint, as_checkpoints, checked_weights
from gradsketch.attribution.description import Description
from gradsketch.attribution.engine import Engine, Local
from gradsketch.attribution.examples import as_examples
from gradsketch.attribution.explain import (
    asked_again,
    exact_aims,
    explain_hits,
    first_rows,
    sketched_aims,
    training_examples,
)
from gradsketch.attribution.filters import Where, row_filter
from gradsketch.attribution.metric import read_factors
from gradsketch.attribution.queries import (
    Queries,
    as_queries,
    checked_groups,
    ready_queries,
    sketch_queries,
    stored_queries,
)
from gradsketch.attribution.rerank import Reranker, exact_named, is_exact
from gradsketch.attribution.results import Cost, Hits, SelfInfluence
from gradsketch.attribution.scan import every_score
from gradsketch.attribution.scores import kind_of
from gradsketch.attribution.scoring import DAMPING, Scorer, both_ends, bytes_read
from gradsketch.attribution.select import (
    Budget,
    Selection,
    chosen_rows,
    data_digest,
    described_rows,
    target_scores,
)
from gradsketch.durable import damaged, record_of
from gradsketch.errors import GradsketchWarning, InputError, StoreError
from gradsketch.fsdp import require_unsplit, require_whole
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.factors.inverse import InverseFisher
from gradsketch.gradients.parameters import bare
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.gradients.tasks import Task, TaskLike, as_task
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Store
from gradsketch.store.folder import Folder, open_folder

__all__ = ["AUDITS", "Index"]

AUDITS = "audits-"  # the beginning of the names of files that say how often gradients were checked


class Index:
    """The sketched gradients of a training set, open for questions. See :func:`build_index`.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> _ = gs.build_index("runs/toy", model, task, data, d=32, progress=False)
        >>> index = gs.Index.open("runs/toy", task=task)
        >>> hits = index.query(model, data[:1], k=3)
        >>> len(hits[0].proponents)
        3
    """

    def __init__(
        self,
        folder: Folder,
        description: Description,
        task: Task | None = None,
        checkpoints: tuple[Checkpoint, ...] | None = None,
    ) -> None:
        self.folder, self.description, self.task = folder, description, task
        self.stores = tuple(Store.open(folder.child(c.folder)) for c in description.checkpoints)
        _require_alike(self.stores, description)
        self._checkpoints = checkpoints or _stored_checkpoints(description)
        self._factors: dict[int, Factors] = {}
        self._inverses: dict[Any, InverseFisher] = {}
        self._scorer = Scorer(self.stores, [c.weight for c in description.checkpoints])

    @classmethod
    def open(cls, path: str | Path, *, task: TaskLike | None = None, checkpoints: Sequence[Any] | None = None) -> Index:
        """Open an index. ``task`` is needed for questions; ``checkpoints`` where they were given in memory.

        Raises:
            StoreError: there is no index, or it is damaged.
        """
        folder = open_folder(path)
        description = Description.read(folder)
        weights = [c.weight for c in description.checkpoints]
        chosen = as_checkpoints(checkpoints, weights) if checkpoints is not None else None
        return cls(folder, description, None if task is None else as_task(task), chosen)

    @property
    def rows(self) -> int:
        """Rows of the data behind the finished index; ``left_out`` says which of them have no sketch."""
        return self.stores[0].rows

    @property
    def d(self) -> int:
        """Length of a sketch."""
        return self.description.d

    @property
    def audits(self) -> Audits:
        """How often the gradients in it were held against autograd's own while it was built, and the largest error."""
        names = [name for name in self.folder.names() if name.startswith(AUDITS)]
        found = [_audits_in(self.folder, name) for name in names]
        return Audits(
            sum(a.batches for a in found),
            sum(a.audited for a in found),
            max((a.largest_error for a in found), default=0.0),
        )

    @property
    def rows_there(self) -> int:
        """Rows that are finished at every checkpoint, those left out included."""
        return sum(count for _, count in self._ranges())

    @property
    def left_out(self) -> dict[int, str]:
        """Return, by row, why rows have no sketch: they could not be read, encoded or differentiated.

        A row that has none at one of several checkpoints has no score.
        """
        reasons = {row: reason for store in reversed(self.stores) for row, reason in store.left_out().items()}
        return dict(sorted(reasons.items()))

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        checkpoints = f", {len(self.stores)} checkpoints" * (len(self.stores) > 1)
        return f"Index({self.folder.uri!r}, rows={self.rows}, d={self.d}{checkpoints})"

    def sketch(
        self,
        model: nn.Module | None,
        examples: Any,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        batch_tokens: int = 4096,
    ) -> Queries:
        """Return questions with their gradients, which ``query``, ``scores`` and ``explain`` take instead of examples.

        So one question is asked in several ways, and its gradient is formed once. The arguments are those of ``query``.

        Raises:
            FingerprintError: the model, the task or the parameters are not those of the index.
            InputError: no task, no model, an example the task cannot read.
        """
        examples = as_queries(examples)
        return self._sketched(model, examples, checked_groups(groups, len(examples)), batch_tokens)

    def stored(self, rows: Sequence[int]) -> Queries:
        """Return training rows as questions, with the gradients that the index holds; needs no model.

        Raises:
            InputError: a row that the index does not have, or that has no sketch.
        """
        return stored_queries(self.stores, rows)

    def query(
        self,
        model: nn.Module | None,
        examples: Any,
        *,
        k: int = 10,
        score: str = "ridge",
        opponents: int = 0,
        damping: float | str | None = None,
        where: Where | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        coarse: int | None = None,
        weights: Sequence[float] | None = None,
        rerank: int | None = None,
        exact: str = "ekfac",
        data: Any = None,
        batch_tokens: int = 4096,
        engine: Engine | None = None,
        progress: bool | None = False,
    ) -> Hits:
        """Find the training examples that explain why the model says this.

        Args:
            model: the model the index was made with; left as it was. None where ``examples`` are sketched.
            examples: what the task takes: texts, (prompt, answer) pairs, dicts; one text or dict counts as a list of
                one. Or what ``sketch`` or ``stored`` returned.
            k: proponents a query: training on them lowers its loss.
            score: "ridge" (default), "influence", "cosine" or "dot"; it finds the candidates where rows are re-ranked.
            opponents: how many of the other end of the list to return as well.
            damping: λ as a fraction of the mean eigenvalue of F, by default 1, and 0.001 where EK-FAC re-ranks; or
                "auto": the one under which held-out gradients are most likely, not the one that ranks rows best.
            where: {column: value or values}, or a function of a row's record: only such rows can be hits.
            groups: positions of examples that ask together; a group's score is the mean of its members'.
            coarse: find candidates with this many numbers of each sketch first, then score those by all.
            rerank: score this many of the best rows again, by whole gradients; they are formed for it, which costs a
                training step's forward and backward pass a row and checkpoint.
            exact: in which metric: "ekfac", estimated from up to 1,024 training rows with labels drawn from the model;
                "empirical-ekfac" with those of the data; or "gauss-newton", by conjugate gradients over 256 rows.
            data: the training data, where a re-ranked index holds no texts.
            weights: one a checkpoint, in place of those the index was built with; [0, 1] asks the second one alone.
            batch_tokens: tokens a batch of queries, or of candidates.
            engine: who reads the shards: by default this process; ``gs.Ray(...)`` for tasks of a Ray cluster. Gradients
                are formed here in any case.
            progress: whether to say what re-ranking costs and show a bar; None: in a terminal.

        Raises:
            FingerprintError: the model, the task or the parameters are not those of the index.
            InputError: an unknown score or column, k below 1, no task, an example the task cannot read, weights that
                are not one finite number a checkpoint.
        """
        kind = kind_of(score)
        self._check(k, opponents, coarse, rerank)
        scorer = self._scorer_of_now()
        with (engine or Local()).reading() as each:
            keep = row_filter(where, scorer.stores[0], each)
            queries = self._asked(model, examples, groups, batch_tokens)
            began = time.perf_counter()
            sketched = DAMPING if damping is None else damping
            probes = scorer.probes(queries, kind, sketched, weights, each)
            prepared = time.perf_counter()
            counts = (k, opponents) if rerank is None else (max(k, rerank), max(opponents, rerank) if opponents else 0)
            proponents, others = both_ends(probes, *counts, keep=keep, coarse=coarse, each=each)
            scanned = time.perf_counter()
        if rerank is None:
            described, reranking = kind.described(scorer.damping(kind, sketched)), 0.0
        else:
            reranker = self._reranker(
                model, exact, damping, data, weights, batch_tokens=batch_tokens, progress=progress
            )
            proponents, others = reranker.best(queries.asked(), proponents, others, k, opponents)
            described, reranking = reranker.score, time.perf_counter() - scanned
        read = bytes_read(self.stores, self.d if coarse is None else coarse)
        cost = Cost(queries.seconds, prepared - began, scanned - prepared, read, self.rows, reranking)
        found = answers(self.stores[0], queries, proponents, others)
        asked = tuple(float(w) for w in (scorer.weights if weights is None else weights))
        return Hits(found, described, self.folder.uri, self.rows, self.d, cost, weights=asked)

    def query_sketches(
        self, sketches: Any, losses: Any, examples: Sequence[Any], sketch: BlockSum, **options: Any
    ) -> Hits:
        """Find training examples for questions whose gradients were sketched elsewhere, in JAX for instance.

        The sketch, its names and its shapes are compared with the index's. That the model and the loss are the same is
        up to you, because nothing here has seen them.

        Args:
            sketches: [m, d], an array of any library.
            losses: [m].
            examples: what was asked, for the page.
            sketch: with which they were made; ``gj.block_sum(...).torch`` of one in JAX.
            options: those of ``query`` that need no model.

        Raises:
            FingerprintError: the index was made with another sketch.
            InputError: an index with a metric or of several checkpoints; arrays of other shapes.
            NonFiniteError: a sketch or a loss is not finite.
        """
        queries = ready_queries(sketches, losses, examples, sketch, index=self.folder.uri, stores=self.stores)
        return self.query(None, queries, **options)

    def scores(
        self,
        model: nn.Module | None,
        examples: Any,
        *,
        score: str = "ridge",
        damping: float | str = DAMPING,
        groups: Sequence[Sequence[int]] | None = None,
        weights: Sequence[float] | None = None,
        batch_tokens: int = 4096,
        engine: Engine | None = None,
    ) -> Float[Tensor, "groups rows"]:
        """Return the score of every row for every question; NaN for rows that have no sketch.

        The arguments are those of ``query``.

        Raises:
            FingerprintError: the model, the task or the parameters are not those of the index.
            InputError: see ``query``.
        """
        kind, scorer = kind_of(score), self._scorer_of_now()
        queries = self._asked(model, examples, groups, batch_tokens)
        with (engine or Local()).reading() as each:
            return every_score(scorer.probes(queries, kind, damping, weights, each), each)

    def self_influence(self, score: str = "ridge", *, damping: float | str = DAMPING) -> SelfInfluence:
        """Return every training example's score for itself: large for outliers, mislabelled and unique examples.

        Needs no model. "dot" gives ‖x‖², "influence" xᵀ(F + λI)⁻¹x / N, "ridge" the same with x of unit length (its
        leverage, from 0 to 1).

        Raises:
            InputError: an unknown score, or rows stored as int4 or signs.
            NonFiniteError: a score beyond what float32 holds.
        """
        kind = kind_of(score)
        return self._scorer_of_now().self_influence(kind, damping)

    def select(
        self,
        model: nn.Module,
        targets: Any,
        *,
        rows: int | None = None,
        share: float | None = None,
        tokens: int | None = None,
        harmful: bool = False,
        aggregate: str = "mean",
        alike: float | None = 0.99,
        score: str = "ridge",
        damping: float | str = DAMPING,
        batch_tokens: int = 4096,
        engine: Engine | None = None,
    ) -> Selection:
        """Return the training rows that help a target set most, within a budget.

        Args:
            model: the model the index was made with; left as it was.
            targets: what the task takes: examples that the model should do well on.
            rows: how many to choose; or
            share: which share of all; or
            tokens: rows of so many tokens in all.
            harmful: the rows that harm the targets most instead.
            aggregate: "mean" or "max" over the targets, or "rank": the mean place among all rows.
            alike: a row is passed over where the cosine of its gradient with a chosen one's is above this at every
                checkpoint; None: never. Copies of a harmful row harm as it does, and are chosen too.
            score: "ridge" (default), "influence", "cosine" or "dot".
            damping: see ``query``.
            batch_tokens: tokens a batch of targets.
            engine: who reads the shards; see ``query``.

        Example:
            >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
            >>> data = [(torch.randn(20), i % 2) for i in range(32)]
            >>> index = gs.build_index("runs/select", model, task, data, d=32, progress=False)
            >>> len(index.select(model, data[:4], share=0.25).rows)
            8

        Raises:
            FingerprintError: the model, the task or the parameters are not those of the index.
            InputError: no budget or several, an unknown score or aggregate, no task, a target the task cannot read.
        """
        budget, kind, scorer = Budget(rows, share, tokens), kind_of(score), self._scorer_of_now()
        examples = as_queries(targets)
        queries = self._sketched(model, examples, [[i] for i in range(len(examples))], batch_tokens)
        sign = -1 if harmful else 1
        store = scorer.stores[0]
        with (engine or Local()).reading() as each:
            values = target_scores(scorer.probes(queries, kind, damping, each=each), aggregate, sign, each)
            found, copies = chosen_rows(
                scorer.stores, sign * values, budget, alike=None if harmful else alike, each=each
            )
            data = data_digest(store, each)
        ids, lengths = described_rows(store, found)
        return Selection(
            rows=tuple(found),
            ids=ids,
            values=values[found],
            tokens=lengths,
            copies=copies,
            of=len(values),
            targets=len(examples),
            aggregate=aggregate,
            score=kind.described(scorer.damping(kind, damping)),
            harmful=harmful,
            data=data,
            shard_rows=store.manifest.shard_rows,
        )

    def explain(
        self,
        model: nn.Module,
        hits: Hits,
        *,
        top: int = 3,
        data: Any = None,
        sketched: Queries | None = None,
        weights: Sequence[float] | None = None,
    ) -> Hits:
        """Return the hits with token contributions for the first ``top`` of each query's lists.

        The contributions of a hit's tokens and its ``beyond_tokens`` add up to its score. They are exact for every
        layer with one output a token (linear, embedding, norm), up to the rounding of the stored sketch.

        Args:
            model: the model the index was made with.
            hits: what ``query`` returned.
            top: proponents and opponents to explain, for each query.
            data: the training data, where its examples are not texts that the index holds.
            sketched: the questions of the hits, where ``sketch`` returned them.
            weights: those that ``query`` was given, where the hits do not say.

        Raises:
            FingerprintError: the model is not the index's.
            InputError: examples that are not texts, without ``data``; other weights than those of the hits.
        """
        if hits.weights and weights is not None and list(hits.weights) != list(map(float, weights)):
            raise InputError(
                f"weights={list(weights)}", f"those of the hits, {list(hits.weights)}", "Leave them out, or ask again"
            )
        weights = list(hits.weights) or weights
        damping, model = DAMPING if hits.score.damping is None else hits.score.damping, bare(model)
        require_whole(model, "token contributions")
        examples = training_examples(self.stores[0], first_rows(hits, top), data)
        queries = self._sketched(model, *asked_again(hits), 4096) if sketched is None else sketched
        if is_exact(hits.score.name):
            reranker = self._reranker(model, hits.score.name, damping, data, weights)
            aims = partial(exact_aims, reranker, queries.asked())
        else:
            probes = self._scorer_of_now().probes(queries, kind_of(hits.score.name), damping, weights)
            aims = partial(sketched_aims, model, self.description, self._factors_of, probes)
        return explain_hits(model, self._known_task(), hits, aims, examples, checkpoints=self._checkpoints, top=top)

    def _reranker(
        self,
        model: nn.Module | None,
        exact: str,
        damping: float | str | None,
        data: Any,
        weights: Sequence[float] | None,
        **options: Any,
    ) -> Reranker:
        if model is None:
            raise InputError("exact scores without a model", "the model of the index", "Pass the model")
        require_unsplit(model, "exact scores", "Leave out rerank=, or load the model in one piece")
        data, kind = None if data is None else as_examples(data), exact_named(exact)
        return Reranker(
            bare(model),
            self._known_task(),
            kind,
            kind.damping if damping is None else damping,
            names=self.description.parameters,
            checkpoints=self._checkpoints if weights is None else _weighed(self._checkpoints, weights),
            store=self.stores[0],
            examples=lambda rows: training_examples(self.stores[0], rows, data),
            kept=self._inverses,
            **options,
        )

    def _check(self, k: int, opponents: int, coarse: int | None, rerank: int | None) -> None:
        wanted = (
            ("k", k, 1),
            ("opponents", opponents, 0),
            ("coarse", 1 if coarse is None else coarse, 1),
            ("rerank", 1 if rerank is None else rerank, 1),
        )
        for name, value, least in wanted:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}", f"an integer, at least {least}", f"Pass {name}={max(least, 10)}")
        if coarse is not None and coarse > self.d:
            raise InputError(f"coarse={coarse}", f"at most d={self.d}", "Pass a smaller number")

    def _asked(
        self, model: nn.Module | None, examples: Any, groups: Sequence[Sequence[int]] | None, batch_tokens: int
    ) -> Queries:
        """Return the questions with their gradients, which are formed where they are not there yet."""
        if not isinstance(examples, Queries):
            return self.sketch(model, examples, groups=groups, batch_tokens=batch_tokens)
        return examples if groups is None else examples.grouped(groups)

    def _sketched(
        self, model: nn.Module | None, examples: list[Any], groups: Sequence[Sequence[int]], batch_tokens: int
    ) -> Queries:
        if model is None:
            raise InputError(
                "questions without a model", "the model of the index", "Pass the model, or index.stored(rows)"
            )
        return sketch_queries(
            bare(model),
            self._known_task(),
            examples,
            groups,
            index=self.folder.uri,
            description=self.description,
            stores=self.stores,
            checkpoints=self._checkpoints,
            factors=self._factors_of,
            batch_tokens=batch_tokens,
        )

    def _factors_of(self, number: int) -> Factors | None:
        """Return the factors of a checkpoint, read once; None where rows were sketched as they are."""
        if self.description.precondition is None:
            return None
        if number not in self._factors:
            self._factors[number] = read_factors(self.folder, self.description.checkpoints[number].folder)
        return self._factors[number]

    def _scorer_of_now(self) -> Scorer:
        """Return scores of the rows that are there now at every checkpoint, whatever a builder writes meanwhile."""
        ranges = self._ranges()
        self._warn_if_incomplete(sum(count for _, count in ranges))
        if any(store.ranges() != ranges for store in self._scorer.stores):
            stores = [store.snapshot(ranges) for store in self.stores]
            self._scorer = Scorer(stores, [c.weight for c in self.description.checkpoints])
        return self._scorer

    def _ranges(self) -> list[tuple[int, int]]:
        return sorted(set.intersection(*(set(store.ranges()) for store in self.stores)))

    def _warn_if_incomplete(self, rows: int) -> None:
        if rows < self.rows:
            warnings.warn(
                f"{self.folder.uri} holds {rows} of {self.rows} rows: run the command that builds it to the end",
                GradsketchWarning,
                stacklevel=4,
            )

    def _known_task(self) -> Task:
        if self.task is None:
            name = self.stores[0].manifest.facts.get("task", {}).get("class", "Task")
            raise InputError(
                "an index opened without a task", f"the {name} it was made with", f"Index.open(path, task={name}(...))"
            )
        return self.task


def _weighed(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> tuple[Checkpoint, ...]:
    """Return the checkpoints with other weights."""
    checked = checked_weights(weights, len(checkpoints))
    return tuple(replace(c, weight=weight) for c, weight in zip(checkpoints, checked, strict=True))


def _audits_in(folder: Folder, name: str) -> Audits:
    file = f"{folder.uri}/{name}"
    record = record_of(folder.read(name).to_pybytes(), file)
    try:
        return Audits(**record)
    except TypeError as error:
        raise damaged(file, str(error)) from error


def _require_alike(stores: Sequence[Store], description: Description) -> None:
    """Refuse checkpoints of one index that do not have the same rows, or sketches of another length."""
    shapes = {(s.manifest.d, s.manifest.rows, s.manifest.shard_rows) for s in stores}
    if len(shapes) > 1 or stores[0].d != description.d:
        came = "; ".join(f"{s.folder.uri}: d={s.d}, {s.rows} rows, {s.manifest.shard_rows} a shard" for s in stores)
        raise StoreError(came, f"the same in every checkpoint, d={description.d}", "Build the index again")


def _stored_checkpoints(description: Description) -> tuple[Checkpoint, ...]:
    if len(description.checkpoints) > 1 and any(c.weights is None for c in description.checkpoints):
        raise InputError(
            f"an index of {len(description.checkpoints)} checkpoints whose weights were given in memory",
            "those weights again",
            "Index.open(path, checkpoints=[...])",
        )
    return tuple(Checkpoint(c.name, c.weights, c.weight) for c in description.checkpoints)
