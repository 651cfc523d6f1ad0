"""Ask an index which training examples caused an output."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradsketch.attribution.answers import answers
from gradsketch.attribution.checkpoints import Checkpoint, as_checkpoints
from gradsketch.attribution.description import Description
from gradsketch.attribution.explain import asked_again, explain_hits, training_examples
from gradsketch.attribution.filters import Where, row_filter
from gradsketch.attribution.metric import read_factors
from gradsketch.attribution.queries import Queries, as_queries, checked_groups, ready_queries, sketch_queries
from gradsketch.attribution.results import Cost, Hits, SelfInfluence
from gradsketch.attribution.scan import RowFilter
from gradsketch.attribution.scores import kind_of
from gradsketch.attribution.scoring import DAMPING, Scorer, best, bytes_read
from gradsketch.attribution.select import Budget, Selection, chosen_rows, described_rows, target_scores
from gradsketch.durable import damaged, record_of
from gradsketch.errors import GradsketchWarning, InputError, StoreError
from gradsketch.gradients.factors.factors import Factors
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
        """Return, by row, why rows have no sketch: they could not be read, encoded or differentiated."""
        return self.stores[0].left_out()

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        checkpoints = f", {len(self.stores)} checkpoints" * (len(self.stores) > 1)
        return f"Index({self.folder.uri!r}, rows={self.rows}, d={self.d}{checkpoints})"

    def query(
        self,
        model: nn.Module,
        examples: Any,
        *,
        k: int = 10,
        score: str = "ridge",
        opponents: int = 0,
        damping: float | str = DAMPING,
        where: Where | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        coarse: int | None = None,
        batch_tokens: int = 4096,
    ) -> Hits:
        """Find the training examples that explain why the model says this.

        Args:
            model: the model the index was made with; left as it was.
            examples: what the task takes: texts, (prompt, answer) pairs, dicts; one text or dict counts as a list of
                one.
            k: proponents a query: training on them lowers its loss.
            score: "ridge" (default), "influence", "cosine" or "dot".
            opponents: how many of the other end of the list to return as well.
            damping: λ as a fraction of the mean eigenvalue of F, or "auto": the one under which held-out gradients are
                most likely.
            where: {column: value or values}, or a function of a row's record: only such rows can be hits.
            groups: positions of examples that ask together; a group's score is the mean of its members'.
            coarse: find candidates with this many numbers of each sketch first, then score those exactly.
            batch_tokens: tokens a batch of queries.

        Raises:
            FingerprintError: the model, the task or the parameters are not those of the index.
            InputError: an unknown score or column, k below 1, no task, an example the task cannot read.
        """
        self._check(k, opponents, coarse)
        kind_of(score)
        examples = as_queries(examples)
        scorer = self._scorer_of_now()
        keep = row_filter(where, scorer.stores[0])
        queries = self._sketched(model, examples, checked_groups(groups, len(examples)), batch_tokens)
        return self._answered(queries, scorer, k, score, opponents, damping, keep, coarse)

    def query_sketches(
        self,
        sketches: Any,
        losses: Any,
        examples: Sequence[Any],
        sketch: BlockSum,
        *,
        k: int = 10,
        score: str = "ridge",
        opponents: int = 0,
        damping: float | str = DAMPING,
        where: Where | None = None,
    ) -> Hits:
        """Find training examples for questions whose gradients were sketched elsewhere, in JAX for instance.

        The sketch, its names and its shapes are compared with the index's. That the model and the loss are the same is
        up to you, because nothing here has seen them.

        Args:
            sketches: [m, d], an array of any library.
            losses: [m].
            examples: what was asked, for the page.
            sketch: with which they were made; ``gj.block_sum(...).torch`` of one in JAX.
            k, score, opponents, damping, where: see ``query``.

        Raises:
            FingerprintError: the index was made with another sketch.
            InputError: an index with a metric or of several checkpoints; arrays of other shapes.
            NonFiniteError: a sketch or a loss is not finite.
        """
        self._check(k, opponents, None)
        kind_of(score)
        scorer = self._scorer_of_now()
        keep = row_filter(where, scorer.stores[0])
        queries = ready_queries(sketches, losses, examples, sketch, index=self.folder.uri, stores=self.stores)
        return self._answered(queries, scorer, k, score, opponents, damping, keep, None)

    def _answered(
        self,
        queries: Queries,
        scorer: Scorer,
        k: int,
        score: str,
        opponents: int,
        damping: float | str,
        keep: RowFilter | None,
        coarse: int | None,
    ) -> Hits:
        kind = kind_of(score)
        began = time.perf_counter()
        probes = scorer.probes(queries, kind, damping)
        prepared = time.perf_counter()
        proponents = best(probes, k, sign=1, keep=keep, coarse=coarse)
        others = best(probes, opponents, sign=-1, keep=keep, coarse=coarse) if opponents else None
        scanned = time.perf_counter()
        read = bytes_read(self.stores, self.d if coarse is None else coarse)
        cost = Cost(queries.seconds, prepared - began, scanned - prepared, read, self.rows)
        found = answers(self.stores[0], queries, proponents, others)
        described = kind.described(scorer.damping(kind, damping))
        return Hits(found, described, self.folder.uri, self.rows, self.d, cost)

    def self_influence(self, score: str = "ridge", *, damping: float | str = DAMPING) -> SelfInfluence:
        """Return every training example's score for itself: large for outliers, mislabelled and unique examples.

        Needs no model. "dot" gives ‖x‖², "influence" xᵀ(F + λI)⁻¹x / N, "ridge" the same with x of unit length (its
        leverage, from 0 to 1).

        Raises:
            InputError: an unknown score.
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
            alike: a row is passed over where the cosine of its gradient with a chosen one's is above this; None: never.
            score: "ridge" (default), "influence", "cosine" or "dot".
            damping: see ``query``.
            batch_tokens: tokens a batch of targets.

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
        values = target_scores(scorer.probes(queries, kind, damping), aggregate, sign)
        store = scorer.stores[0]
        found, copies = chosen_rows(store, sign * values, budget, alike=alike)
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
        )

    def explain(self, model: nn.Module, hits: Hits, *, top: int = 3, data: Any = None) -> Hits:
        """Return the hits with token contributions for the first ``top`` of each query's lists.

        The contributions of a hit's tokens and its ``beyond_tokens`` add up to its score. They are exact for every
        layer with one output a token (linear, embedding, norm), up to the rounding of the stored sketch.

        Args:
            model: the model the index was made with.
            hits: what ``query`` returned.
            top: proponents and opponents to explain, for each query.
            data: the training data, where its examples are not texts that the index holds.

        Raises:
            FingerprintError: the model is not the index's.
            InputError: examples that are not texts, without ``data``.
        """
        kind, damping = kind_of(hits.score.name), DAMPING if hits.score.damping is None else hits.score.damping
        examples = training_examples(self.stores[0], hits, top, data)
        queries = self._sketched(model, *asked_again(hits), 4096)
        return explain_hits(
            model,
            self._known_task(),
            hits,
            self._scorer_of_now().probes(queries, kind, damping),
            examples,
            description=self.description,
            checkpoints=self._checkpoints,
            factors=self._factors_of,
            top=top,
        )

    def _check(self, k: int, opponents: int, coarse: int | None) -> None:
        wanted = (("k", k, 1), ("opponents", opponents, 0), ("coarse", 1 if coarse is None else coarse, 1))
        for name, value, least in wanted:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}", f"an integer, at least {least}", f"Pass {name}={max(least, 10)}")
        if coarse is not None and coarse > self.d:
            raise InputError(f"coarse={coarse}", f"at most d={self.d}", "Pass a smaller number")

    def _sketched(
        self, model: nn.Module, examples: list[Any], groups: Sequence[Sequence[int]], batch_tokens: int
    ) -> Queries:
        return sketch_queries(
            model,
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
