"""Ask an index which training examples caused an output."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.attribution.checkpoints import Checkpoint, as_checkpoints, weights_of
from gradsketch.attribution.description import Description, comparable_facts, sketch_for
from gradsketch.attribution.examples import as_examples, display, fields, rebuild
from gradsketch.attribution.explain import token_products
from gradsketch.attribution.filters import Where, row_filter
from gradsketch.attribution.gradients import GradientSource, Sketched
from gradsketch.attribution.precondition import Preconditioner, fit_preconditioner, held_out_damping
from gradsketch.attribution.results import Cost, Hit, Hits, QueryHits, SelfInfluence, TokenContribution
from gradsketch.attribution.scan import Probe, Top, rescore, top
from gradsketch.attribution.scores import Kind, kind_of
from gradsketch.durable import require_same
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.data import to_device
from gradsketch.gradients.tasks import Task, as_task
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Store
from gradsketch.store.encoding import bytes_per_entry
from gradsketch.store.folder import Folder, open_folder

__all__ = ["Index"]

DAMPING = 0.1
# Rows scored exactly for every hit wanted, where a coarse scan goes first.
_CANDIDATES_A_HIT = 20
_CANDIDATES_AT_LEAST = 200


@dataclass(frozen=True)
class _Queries:
    """Gradients of the queries at every checkpoint: sketches [m, d] each, and the last checkpoint's losses."""

    examples: list[Any]
    sketched: list[Sketched]
    seconds: float


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
        self._checkpoints = checkpoints or _stored_checkpoints(description)
        self._preconditioners: dict[tuple[int, bool, float | str], Preconditioner] = {}

    @classmethod
    def open(
        cls, path: str | Path, *, task: Task | Any | None = None, checkpoints: Sequence[Any] | None = None
    ) -> Index:
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
        """Training examples in the finished index."""
        return self.stores[0].rows

    @property
    def d(self) -> int:
        """Length of a sketch."""
        return self.description.d

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
        kind = kind_of(score)
        for name, value, least in (
            ("k", k, 1),
            ("opponents", opponents, 0),
            ("coarse", 1 if coarse is None else coarse, 1),
        ):
            if value < least:
                raise InputError(f"{name}={value}", f"at least {least}", f"Pass {name}={least} or more")
        if coarse is not None and coarse > self.d:
            raise InputError(f"coarse={coarse}", f"at most d={self.d}", "Pass a smaller number")
        self._warn_if_incomplete()
        keep = row_filter(where, list(self.stores[0].manifest.columns))
        queries = self._sketch(model, _as_queries(examples), batch_tokens)
        groups = [[i] for i in range(len(queries.examples))] if groups is None else _checked(groups, queries.examples)
        began = time.perf_counter()
        probes, used = self._probes(queries, kind, damping, groups)
        prepared = time.perf_counter()
        proponents = self._best(probes, k, 1, keep, coarse)
        others = self._best(probes, opponents, -1, keep, coarse) if opponents else None
        cost = Cost(
            queries.seconds, prepared - began, time.perf_counter() - prepared, self._bytes_read(coarse), self.rows
        )
        answers = self._answers(queries, groups, proponents, others)
        return Hits(answers, kind.described(used), self.folder.uri, self.rows, self.d, cost)

    def self_influence(self, score: str = "ridge", *, damping: float | str = DAMPING) -> SelfInfluence:
        """Return every training example's score for itself: large for outliers, mislabelled and unique examples.

        Needs no model. "dot" gives ‖x‖², "influence" xᵀ(F + λI)⁻¹x / N, "ridge" the same with x of unit length (its
        leverage, from 0 to 1).

        Raises:
            InputError: an unknown score.
        """
        kind, began = kind_of(score), time.perf_counter()
        values = torch.zeros(self.rows)
        self._warn_if_incomplete()
        for number, (store, checkpoint) in enumerate(zip(self.stores, self.description.checkpoints, strict=True)):
            preconditioner = self._preconditioner(number, kind, damping) if kind.preconditioned and self.rows else None
            for shard in store:
                x, norm = shard.decoded(), shard.numbers("gradient_norm")
                x = x / norm.clamp_min(torch.finfo(torch.float32).tiny)[:, None] if kind.unit_length else x
                y = preconditioner.solve(x) / preconditioner.rows if preconditioner else x
                values[shard.start : shard.start + shard.count] += checkpoint.weight * (x * y).sum(dim=-1)
        ids, losses = [""] * self.rows, torch.full((self.rows,), torch.nan)
        for shard in self.stores[0]:
            ids[shard.start : shard.start + shard.count] = shard.column("id")
            losses[shard.start : shard.start + shard.count] = shard.numbers("loss")
        used = self._preconditioner(0, kind, damping).damping if kind.preconditioned and self.rows else None
        values = values.where(torch.isfinite(losses), torch.nan)
        return SelfInfluence(tuple(ids), values, losses, kind.described(used), time.perf_counter() - began)

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
        task, kind = self._task(), kind_of(hits.score.name)
        explained = [
            [replace(hit, tokens=(), beyond_tokens=hit.score) for hit in (*q.proponents[:top], *q.opponents[:top])]
            for q in hits.queries
        ]
        members = [list(q.example) if q.members > 1 else [q.example] for q in hits.queries]
        queries = self._sketch(model, [example for group in members for example in group], 4096)
        ends = torch.tensor([len(group) for group in members]).cumsum(0).tolist()
        groups = [list(range(end - len(group), end)) for group, end in zip(members, ends, strict=True)]
        damping = DAMPING if hits.score.damping is None else hits.score.damping
        probes, _ = self._probes(queries, kind, damping, groups)
        examples = self._training_examples([hit.row for part in explained for hit in part], data)
        for number, checkpoint in enumerate(self._checkpoints):
            with weights_of(model, checkpoint), evaluating(model):
                sketch = sketch_for(model, self.description)
                for query, part in enumerate(explained):
                    direction = _lifted(sketch, probes[number].directions[query])
                    for i, hit in enumerate(part):
                        example = examples[hit.row]
                        batch = to_device(task.collate([example]), next(model.parameters()).device)
                        products, _ = token_products(model, task, batch, direction)
                        factor = probes[number].weight / (self._norm(number, hit.row) if kind.unit_length else 1.0)
                        part[i] = _with_tokens(hit, _token_texts(task, batch, len(products)), products * factor)
        return replace(hits, queries=tuple(map(_with_hits, hits.queries, explained, [top] * len(hits.queries))))

    def _sketch(self, model: nn.Module, examples: list[Any], batch_tokens: int) -> _Queries:
        """Sketch the queries at every checkpoint, having checked that model and task are those of the index."""
        began, task, sketched = time.perf_counter(), self._task(), []
        for store, checkpoint in zip(self.stores, self._checkpoints, strict=True):
            with weights_of(model, checkpoint):
                sketch = sketch_for(model, self.description)
                facts = {k: v for k, v in store.manifest.facts.items() if k != "data"}
                require_same(
                    comparable_facts(model, task, sketch),
                    facts,
                    self.folder.uri,
                    fix="Query with the model, task and parameters of the index, or build an index for these",
                )
                sketched.append(GradientSource(model, task, sketch, batch_tokens=batch_tokens)(examples))
        return _Queries(examples, sketched, time.perf_counter() - began)

    def _probes(
        self, queries: _Queries, kind: Kind, damping: float | str, groups: Sequence[Sequence[int]]
    ) -> tuple[list[Probe], float | None]:
        """Return what each store is multiplied with, and the damping used."""
        probes, used = [], None
        for number, (store, sketched) in enumerate(zip(self.stores, queries.sketched, strict=True)):
            q = sketched.sketches
            if kind.unit_length:
                q = torch.nn.functional.normalize(q, dim=-1, eps=torch.finfo(torch.float32).tiny)
            q = torch.stack([q[list(group)].mean(dim=0) for group in groups])
            if kind.preconditioned and self.rows:
                preconditioner = self._preconditioner(number, kind, damping)
                q, used = preconditioner.solve(q) / preconditioner.rows, preconditioner.damping
            weight = self.description.checkpoints[number].weight
            probes.append(Probe(store, q, weight, kind.unit_length))
        return probes, used

    def _preconditioner(self, number: int, kind: Kind, damping: float | str) -> Preconditioner:
        if isinstance(damping, str) and damping != "auto":
            raise InputError(f"damping={damping!r}", 'a positive number or "auto"', "Pass damping=0.1")
        key = (number, kind.unit_length, damping)
        if key not in self._preconditioners:
            store = self.stores[number]
            value = held_out_damping(store, unit_length=kind.unit_length) if isinstance(damping, str) else damping
            self._preconditioners[key] = fit_preconditioner(store, unit_length=kind.unit_length, damping=value)
        return self._preconditioners[key]

    def _best(self, probes: list[Probe], k: int, sign: int, keep: Callable[..., Any] | None, coarse: int | None) -> Top:
        k = min(k, max(1, self.rows))
        if coarse is None:
            return top(probes, k, sign=sign, keep=keep)
        candidates = min(self.rows, max(_CANDIDATES_AT_LEAST, _CANDIDATES_A_HIT * k))
        found = top(probes, candidates, sign=sign, keep=keep, width=coarse)
        exact = sign * rescore(probes, found.rows)
        values, places = exact.where(found.rows >= 0, -torch.inf).sort(dim=1, descending=True, stable=True)
        return Top(sign * values[:, :k], found.rows.gather(1, places[:, :k]))

    def _answers(
        self, queries: _Queries, groups: Sequence[Sequence[int]], best: Top, worst: Top | None
    ) -> tuple[QueryHits, ...]:
        lists = [best] if worst is None else [best, worst]
        rows = sorted({row for found in lists for row in found.rows.flatten().tolist() if row >= 0})
        records = dict(zip(rows, self.stores[0].records(rows), strict=True))
        norms = queries.sketched[-1].sketches.norm(dim=-1)
        answers = []
        for number, group in enumerate(groups):
            members = [queries.examples[i] for i in group]
            text, answer = _display_query(members[0])
            text += f" (and {len(group) - 1} more)" * (len(group) > 1)
            hits = [_hit_list(found, number, records) for found in lists]
            answers.append(
                QueryHits(
                    text=text,
                    answer=answer,
                    loss=float(queries.sketched[-1].losses[list(group)].mean()),
                    gradient_norm=float(norms[list(group)].mean()),
                    proponents=hits[0],
                    opponents=hits[1] if worst is not None else (),
                    members=len(group),
                    example=members if len(group) > 1 else members[0],
                )
            )
        return tuple(answers)

    def _warn_if_incomplete(self) -> None:
        absent = sum(count for store in self.stores for _, count in store.missing())
        if absent:
            total = self.rows * len(self.stores)
            warnings.warn(
                f"{self.folder.uri} holds {total - absent} of {total} rows: run the command that builds it to the end",
                GradsketchWarning,
                stacklevel=3,
            )

    def _task(self) -> Task:
        if self.task is None:
            name = self.stores[0].manifest.facts.get("task", {}).get("class", "Task")
            raise InputError(
                "an index opened without a task", f"the {name} it was made with", f"Index.open(path, task={name}(...))"
            )
        return self.task

    def _norm(self, number: int, row: int) -> float:
        return float(self.stores[number].records([row])[0]["gradient_norm"])

    def _training_examples(self, rows: Sequence[int], data: Any) -> dict[int, Any]:
        examples: dict[int, Any] = {}
        for row, record in zip(rows, self.stores[0].records(rows), strict=True):
            example = data[row] if data is not None else rebuild(record)
            if example is None:
                raise InputError(
                    f"row {row}, whose example is not a text that the index holds",
                    "the training data",
                    "Pass data=... to explain",
                )
            examples[row] = example
        return examples

    def _bytes_read(self, coarse: int | None) -> int:
        width = self.d if coarse is None else coarse
        return sum(store.rows * width * bytes_per_entry(store.manifest.dtype) for store in self.stores)


def _display_query(example: Any) -> tuple[str, str | None]:
    """Return what to show of a query: its text, and its answer where it has one."""
    text, answer = display(fields(example)[1])
    return text if text is not None else "(not a text)", answer


def _as_queries(examples: Any) -> list[Any]:
    if isinstance(examples, str) or (
        isinstance(examples, Mapping) and not any(isinstance(v, Tensor) for v in examples.values())
    ):
        return [examples]
    listed = as_examples(examples)
    if len(listed) == 0:
        raise InputError("no query", "at least one example", "Pass a list of texts")
    return [listed[i] for i in range(len(listed))]


def _checked(groups: Sequence[Sequence[int]], examples: list[Any]) -> Sequence[Sequence[int]]:
    if not groups or not all(group and all(0 <= i < len(examples) for i in group) for group in groups):
        raise InputError(f"groups={groups}", f"lists of positions from 0 to {len(examples) - 1}", "Check the positions")
    return groups


def _stored_checkpoints(description: Description) -> tuple[Checkpoint, ...]:
    if len(description.checkpoints) > 1 and any(c.weights is None for c in description.checkpoints):
        raise InputError(
            f"an index of {len(description.checkpoints)} checkpoints whose weights were given in memory",
            "those weights again",
            "Index.open(path, checkpoints=[...])",
        )
    return tuple(Checkpoint(c.name, c.weights, c.weight) for c in description.checkpoints)


def _hit_list(found: Top, number: int, records: Mapping[int, dict[str, Any]]) -> tuple[Hit, ...]:
    pairs = zip(found.rows[number].tolist(), found.scores[number].tolist(), strict=True)
    kept = [(row, score) for row, score in pairs if row >= 0]
    return tuple(_hit(rank, row, score, records[row]) for rank, (row, score) in enumerate(kept, start=1))


def _hit(rank: int, row: int, score: float, record: dict[str, Any]) -> Hit:
    record = dict(record)
    id_, loss, norm = record.pop("id"), record.pop("loss"), record.pop("gradient_norm")
    text, answer = display(record)
    parts = ("text", "prompt", "source", "answer", "completion", "target")
    metadata = {n: value for n, value in record.items() if n not in parts or value not in (text, answer)}
    if answer is not None and text is not None:
        text += answer if "prompt" in record else f" → {answer}"
    return Hit(rank, row, id_, score, text, loss, norm, metadata)


def _lifted(sketch: BlockSum, direction: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Return Phiᵀ q as tensors by parameter name."""
    vector = sketch.lift(direction)
    sizes = [torch.Size(shape).numel() for shape in sketch.shapes.values()]
    parts = vector.split(sizes)
    return {n: part.view(shape) for (n, shape), part in zip(sketch.shapes.items(), parts, strict=True)}


def _token_texts(task: Task, batch: Mapping[str, Tensor], count: int) -> list[str]:
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
