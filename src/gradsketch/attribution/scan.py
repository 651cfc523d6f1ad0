"""One streaming pass over stored sketches: products with the queries and a running top k.

Memory is bounded by a shard, whatever the size of the index; the shards are memory-mapped one after the other.
Letters: m queries, d sketch, k hits.

8 queries × 20,000 rows × d = 4096 in float16 take 0.05 s on two cores from the page cache, and 1.5 times as long as
reading the bytes from disk (benchmarks/results/query_speed.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gradsketch.attribution.passes import Each, Part, here, parts_of
from gradsketch.errors import NonFiniteError
from gradsketch.store import Shard, Store
from gradsketch.store.products import products

__all__ = ["Probe", "RowFilter", "Top", "every_score", "require_held", "rescore", "scan", "top", "tops"]

_TINY = torch.finfo(torch.float32).tiny

# From a shard to one truth value a row: may this row be a hit?
RowFilter = Callable[[Shard], Bool[Tensor, " rows"]]


@dataclass(frozen=True)
class Probe:
    """What one checkpoint's store is multiplied with: directions [m, d], and the checkpoint's weight in the sum.

    With ``unit_length`` each row counts as a vector of length one.
    """

    store: Store
    directions: Float[Tensor, "m d"]
    weight: float = 1.0
    unit_length: bool = False


@dataclass(frozen=True)
class Top:
    """The k largest scores of each query and the rows they belong to, largest first, ties by row; −inf pads."""

    scores: Float[Tensor, "m k"]
    rows: Int64[Tensor, "m k"]


def scan(
    probes: Sequence[Probe], part: Part, width: int | None = None
) -> Iterator[tuple[list[Shard], Float[Tensor, "m rows"]]]:
    """Yield, shard by shard, the shards of every checkpoint and the scores of their rows (−inf for rows left out).

    With ``width`` only the first so many numbers of each sketch are used, scaled so that products stay unbiased.
    """
    for start, count in part:
        shards = [probe.store.shard(start, count, whole=width is None) for probe in probes]
        yield shards, _combined(probes, shards, width)


def every_score(probes: Sequence[Probe], each: Each = here) -> Float[Tensor, "m rows"]:
    """Return all scores of all rows; NaN for rows that were left out, or are not there yet."""
    every = torch.full((len(probes[0].directions), probes[0].store.rows), torch.nan, dtype=torch.float32, device="cpu")
    for found in each(partial(_scores_of, probes), parts_of(probes[0].store.ranges())):
        for start, scores in found:
            every[:, start : start + scores.shape[1]] = scores
    return every.where(torch.isfinite(every), torch.nan)


def _scores_of(probes: Sequence[Probe], part: Part) -> list[tuple[int, Float[Tensor, "m rows"]]]:
    return [(shards[0].start, scores) for shards, scores in scan(probes, part)]


def top(
    probes: Sequence[Probe],
    k: int,
    *,
    sign: int = 1,
    keep: RowFilter | None = None,
    width: int | None = None,
    each: Each = here,
) -> Top:
    """Return the k rows of largest ``sign * score`` for each query (``sign=-1``: the opponents).

    Scores come back with their own sign; fewer than k rows are padded with −inf and row −1.
    """
    return tops(probes, [(k, sign)], keep=keep, width=width, each=each)[0]


def tops(
    probes: Sequence[Probe],
    wanted: Sequence[tuple[int, int]],
    *,
    keep: RowFilter | None = None,
    width: int | None = None,
    each: Each = here,
) -> list[Top]:
    """Return what ``top`` does for each (k, sign), in one pass over the stores."""
    found = [_nothing(len(probes[0].directions), k) for k, _ in wanted]
    for part in each(partial(_best_of, probes, wanted, keep, width), parts_of(probes[0].store.ranges())):
        found = [_merged(*best, *more) for best, more in zip(found, part, strict=True)]
    return [_top(best, rows, sign) for (best, rows), (_, sign) in zip(found, wanted, strict=True)]


def _best_of(
    probes: Sequence[Probe], wanted: Sequence[tuple[int, int]], keep: RowFilter | None, width: int | None, part: Part
) -> list[tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]]:
    """Return the best signed scores of a part's rows, and the rows, for each (k, sign)."""
    found = [_nothing(len(probes[0].directions), k) for k, _ in wanted]
    for shards, scores in scan(probes, part, width):
        kept = None if keep is None else keep(shards[0])
        for place, (_, sign) in enumerate(wanted):
            found[place] = _merge(*found[place], scores if sign == 1 else -scores, kept, shards[0].start)
    return found


def _nothing(m: int, k: int) -> tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]:
    return (
        torch.full((m, k), -torch.inf, dtype=torch.float32, device="cpu"),
        torch.full((m, k), -1, dtype=torch.int64, device="cpu"),
    )


def _top(best: Float[Tensor, "m k"], rows: Int64[Tensor, "m k"], sign: int) -> Top:
    there = torch.isfinite(best)
    return Top(torch.where(there, sign * best, -torch.inf), torch.where(there, rows, -1))


def rescore(probes: Sequence[Probe], found: Int64[Tensor, "m c"], each: Each = here) -> Float[Tensor, "m c"]:
    """Return the exact scores of given rows, each row of ``found`` belonging to one query (−1: no row, −inf)."""
    manifest = probes[0].store.manifest
    shards = sorted({manifest.shard_at(row) for row in found[found >= 0].tolist()})
    out = torch.full(found.shape, -torch.inf, dtype=torch.float32, device="cpu")
    for scores in each(partial(_rescored, probes, found), parts_of(shards)):
        out = torch.maximum(out, scores)  # each entry is finite in one part
    return out


def _rescored(probes: Sequence[Probe], found: Int64[Tensor, "m c"], part: Part) -> Float[Tensor, "m c"]:
    out = torch.full(found.shape, -torch.inf, dtype=torch.float32, device="cpu")
    for start, count in part:
        inside = (found >= start) & (found < start + count)
        places, inverse = torch.unique(found[inside] - start, return_inverse=True)
        scores = _combined(probes, [p.store.shard(start, count) for p in probes], None, places)
        out[inside] = scores[inside.nonzero()[:, 0], inverse]
    return out


def _combined(
    probes: Sequence[Probe], shards: Sequence[Shard], width: int | None, places: Int64[Tensor, " rows"] | None = None
) -> Float[Tensor, "m rows"]:
    """Weighted sum over checkpoints of the scores of a shard's rows, or of some of them."""
    total: Tensor | None = None
    usable = torch.ones((), dtype=torch.bool, device="cpu")
    for probe, shard in zip(probes, shards, strict=True):
        stored = shard.sketches if places is None else shard.sketches[places]
        factors = _factors(probe, shard) if places is None else _factors(probe, shard)[places]
        usable = usable & torch.isfinite(factors)
        out = products(stored, shard.dtype, probe.directions, width).mul_(factors * probe.weight)
        total = out if total is None else total.add_(out)
    assert total is not None
    which = f"rows {shards[0].start} to {shards[0].start + shards[0].count - 1}"
    require_held(total, usable, f"score of {which}")
    return total


def require_held(scores: Tensor, usable: Tensor, name: str) -> None:
    """Refuse scores of usable rows that are not finite.

    Raises:
        NonFiniteError: one is not.
    """
    if bool((usable & ~torch.isfinite(scores)).any()):
        raise NonFiniteError(
            f"a {name} beyond what float32 holds",
            "products of gradients below 3e38",
            'Pass score="cosine" or "ridge", which compare directions, or leave out rows of such a gradient_norm',
        )


def _factors(probe: Probe, shard: Shard) -> Float[Tensor, " rows"]:
    """What stored numbers are multiplied with; NaN marks a row that was skipped when the index was built."""
    norm = shard.numbers("gradient_norm")
    if not probe.unit_length:
        return torch.where(torch.isnan(norm), norm, shard.scale)
    return torch.where(norm < _TINY, 0.0, shard.scale / norm)  # such a row was rounded away


def _merge(
    best: Float[Tensor, "m k"],
    rows: Int64[Tensor, "m k"],
    scores: Float[Tensor, "m count"],
    kept: Bool[Tensor, " count"] | None,
    start: int,
) -> tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """Fold a shard into the running top k; of equal scores the earlier row wins, and NaN is never among them."""
    better = scores > best[:, -1:]
    columns = (better if kept is None else better & kept).any(dim=0).nonzero()[:, 0]
    scores = torch.where(better[:, columns], scores[:, columns], -torch.inf)
    if len(columns) > (k := best.shape[1]):
        # Every entry that can be among the k, ties included; for few queries these are a few columns.
        least = scores.topk(k, dim=1).values[:, -1:]
        few = ((scores >= least) & (scores > best[:, -1:])).any(dim=0).nonzero()[:, 0]
        columns, scores = columns[few], scores[:, few]
    return _merged(best, rows, scores, (columns + start).expand(len(rows), -1))


def _merged(
    best: Float[Tensor, "m k"], rows: Int64[Tensor, "m k"], more: Float[Tensor, "m c"], numbers: Int64[Tensor, "m c"]
) -> tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """Keep the k best of what was found and what came later; of equal scores the earlier row wins."""
    values, places = torch.cat([best, more], dim=1).sort(dim=1, descending=True, stable=True)
    k = best.shape[1]
    return values[:, :k].contiguous(), torch.cat([rows, numbers], dim=1).gather(1, places[:, :k])
