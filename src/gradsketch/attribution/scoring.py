"""From sketches of questions to scores of rows: what the stores are multiplied with, and the best of the products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gradsketch.attribution.checkpoints import checked_weights
from gradsketch.attribution.passes import Each, here
from gradsketch.attribution.precondition import Preconditioner, fit_preconditioner, held_out_damping
from gradsketch.attribution.queries import Queries
from gradsketch.attribution.results import SelfInfluence
from gradsketch.attribution.scan import Probe, RowFilter, Top, require_held, rescore, top, tops
from gradsketch.attribution.scores import Kind
from gradsketch.errors import GradsketchError, InputError
from gradsketch.store import Store
from gradsketch.store.encoding import row_bytes

__all__ = ["DAMPING", "Scorer", "best", "both_ends", "bytes_read"]

# Held to retraining, this ranked rows better than a tenth of it for ridge everywhere, and for influence almost
# everywhere: on digits and on a language model, in the metric of K-FAC or not, with one checkpoint or several
# (benchmarks/damping.py, benchmarks/lm_attribution.py).
DAMPING = 1.0
# Rows scored exactly for every hit wanted, where a coarse scan goes first.
_CANDIDATES_A_HIT = 20
_CANDIDATES_AT_LEAST = 200
# Two ways of one product of float32 vectors, over their lengths: rounding gives 1e-6.
_SAME = 1e-3
_TINY = torch.finfo(torch.float32).tiny


class Scorer:
    """Scores of an index's rows, summed over checkpoints with their weights; what was fitted once is kept."""

    def __init__(self, stores: Sequence[Store], weights: Sequence[float]) -> None:
        stores = [store.snapshot() for store in stores]  # one listing, so that every pass sees the same rows
        self.stores, self.weights, self.rows = stores, weights, stores[0].rows
        self._fitted: dict[tuple[int, bool, float], Preconditioner] = {}
        self._held_out: dict[bool, float] = {}

    def probes(
        self,
        queries: Queries,
        kind: Kind,
        damping: float | str,
        weights: Sequence[float] | None = None,
        each: Each = here,
    ) -> list[Probe]:
        """Return what each checkpoint's store is multiplied with, one direction per group of questions.

        ``weights`` stand in place of the scorer's own, where they are given.

        Raises:
            InputError: they are not one finite number a checkpoint.
        """
        probes = []
        weights = self.weights if weights is None else checked_weights(weights, len(self.stores))
        for number, (store, weight) in enumerate(zip(self.stores, weights, strict=True)):
            q = queries.sketched[number].sketches
            q = queries.means(queries.unit_length(number) if kind.unit_length else q)
            probes.append(Probe(store, self._solved(number, q, kind, damping, each), weight, kind.unit_length))
        return probes

    def damping(self, kind: Kind, damping: float | str) -> float | None:
        """Return the number that a damping, perhaps "auto", stands for; None where nothing is preconditioned."""
        if not (kind.preconditioned and self.rows):
            return None
        return self._preconditioner(len(self.stores) - 1, kind, damping).damping

    def self_influence(self, kind: Kind, damping: float | str) -> SelfInfluence:
        """Return every row's score for itself.

        A few of them are held against what a query with that row finds.

        Raises:
            InputError: the rows are stored as int4 or signs, and a row's product with itself would count the rounding.
            NonFiniteError: a score beyond what float32 holds.
            GradsketchError: a query finds another score.
        """
        dtype = self.stores[0].manifest.dtype
        if dtype in ("int4", "sign"):
            raise InputError(
                f"self-influence of rows stored as {dtype}, in which rounding counts as part of a row",
                "rows stored as int8 or finer",
                'Build the index with dtype="int8" (--store int8)',
            )
        began, values = time.perf_counter(), torch.zeros(self.rows, dtype=torch.float32, device="cpu")
        ids, losses = [""] * self.rows, torch.full((self.rows,), torch.nan, dtype=torch.float32, device="cpu")
        there = torch.zeros(self.rows, dtype=torch.bool, device="cpu")
        for number, (store, weight) in enumerate(zip(self.stores, self.weights, strict=True)):
            for shard in store:
                x, at = shard.decoded(), slice(shard.start, shard.start + shard.count)
                x = x / shard.numbers("gradient_norm").clamp_min(_TINY)[:, None] if kind.unit_length else x
                values[at] += weight * (x * self._solved(number, x, kind, damping)).sum(dim=-1)
                if number == 0:
                    ids[at], losses[at] = shard.column("id"), shard.numbers("loss")
                    there[at] = True
                there[at] &= torch.isfinite(shard.numbers("loss"))  # a row may be left out at one checkpoint alone
        require_held(values, there, "self-influence")
        self._require_scores(values, there, kind, damping)
        values = values.where(there, torch.nan)
        score = kind.described(self.damping(kind, damping))
        return SelfInfluence(tuple(ids), values, losses, score, time.perf_counter() - began)

    def _require_scores(
        self, values: Float[Tensor, " rows"], there: Bool[Tensor, " rows"], kind: Kind, damping: float | str
    ) -> None:
        """Hold the first, the last and a middle row's score for itself against what a query with the row finds."""
        held = there.nonzero()[:, 0]
        if not len(held):
            return
        rows = held[[0, len(held) // 2, -1]]
        probes, lengths = [], torch.zeros(len(rows), dtype=torch.float32, device="cpu")
        for number, (store, weight) in enumerate(zip(self.stores, self.weights, strict=True)):
            x = _decoded(store, rows, kind.unit_length)
            directions = self._solved(number, x, kind, damping)
            probes.append(Probe(store, directions, weight, kind.unit_length))
            lengths += abs(weight) * x.norm(dim=1) * directions.norm(dim=1)
        found = rescore(probes, rows[:, None])[:, 0]
        if bool(((found - values[rows]).abs() > _SAME * lengths).any()):
            raise GradsketchError(
                f"the self-influence of rows {rows.tolist()} is {values[rows].tolist()}, and queries with those rows"
                f" find {found.tolist()}",
                "the same scores",
                "Do not trust either, and report this index",
            )

    def _solved(
        self, number: int, q: Float[Tensor, "m d"], kind: Kind, damping: float | str, each: Each = here
    ) -> Float[Tensor, "m d"]:
        """Return (F + λI)⁻¹ q / N, or q itself for kinds without it."""
        if not (kind.preconditioned and self.rows):
            return q
        preconditioner = self._preconditioner(number, kind, damping, each)
        return preconditioner.solve(q) / preconditioner.rows

    def _preconditioner(self, number: int, kind: Kind, damping: float | str, each: Each = here) -> Preconditioner:
        damping = self._number(kind.unit_length, damping, each)
        key = (number, kind.unit_length, damping)
        if key not in self._fitted:
            store = self.stores[number]
            self._fitted[key] = fit_preconditioner(store, unit_length=kind.unit_length, damping=damping, each=each)
        return self._fitted[key]

    def _number(self, unit_length: bool, damping: float | str, each: Each) -> float:
        """Return a damping as a number: "auto" is that of the last checkpoint, for all, as a result's score says it."""
        if not isinstance(damping, str):
            return damping
        if damping != "auto":
            raise InputError(f"damping={damping!r}", 'a positive number or "auto"', "Pass damping=1")
        if unit_length not in self._held_out:
            self._held_out[unit_length] = held_out_damping(self.stores[-1], unit_length=unit_length, each=each)
        return self._held_out[unit_length]


def _decoded(store: Store, rows: Int64[Tensor, " r"], unit_length: bool) -> Float[Tensor, "r d"]:
    found = []
    for row in rows.tolist():
        start, count = store.manifest.shard_at(row)
        shard = store.shard(start, count)
        x = shard.decoded([row - start])
        found.append(x / shard.numbers("gradient_norm")[row - start].clamp_min(_TINY) if unit_length else x)
    return torch.cat(found)


def both_ends(
    probes: Sequence[Probe],
    k: int,
    opponents: int,
    *,
    keep: RowFilter | None,
    coarse: int | None,
    each: Each = here,
) -> tuple[Top, Top | None]:
    """Return the k best rows, and so many of the worst (None for 0), in one pass unless candidates are found first."""
    if coarse is None and opponents:
        rows = max(1, probes[0].store.rows)
        first, last = tops(probes, [(min(k, rows), 1), (min(opponents, rows), -1)], keep=keep, each=each)
        return first, last
    last_ones = best(probes, opponents, sign=-1, keep=keep, coarse=coarse, each=each) if opponents else None
    return best(probes, k, sign=1, keep=keep, coarse=coarse, each=each), last_ones


def best(
    probes: Sequence[Probe], k: int, *, sign: int, keep: RowFilter | None, coarse: int | None, each: Each = here
) -> Top:
    """Return the k rows of largest ``sign * score``; with ``coarse``, candidates are found with so many numbers."""
    rows = probes[0].store.rows
    k = min(k, max(1, rows))
    if coarse is None:
        return top(probes, k, sign=sign, keep=keep, each=each)
    candidates = min(rows, max(_CANDIDATES_AT_LEAST, _CANDIDATES_A_HIT * k))
    found = top(probes, candidates, sign=sign, keep=keep, width=coarse, each=each)
    exact = sign * rescore(probes, found.rows, each)
    values, places = exact.where(found.rows >= 0, -torch.inf).sort(dim=1, descending=True, stable=True)
    return Top(sign * values[:, :k], found.rows.gather(1, places[:, :k]))


def bytes_read(stores: Sequence[Store], width: int) -> int:
    """Return the bytes of a scan over so many numbers of each sketch."""
    return sum(store.rows * row_bytes(width, store.manifest.dtype) for store in stores)
