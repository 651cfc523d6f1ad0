"""Which training rows help a target set: scores of all rows, added up over the targets, and the best within a budget.

Xia et al. 2024 (LESS) choose fine-tuning data in this way: by the agreement of a row's gradient with the targets'. A
budget is often filled by copies of one row, so a row whose gradient nearly equals a chosen one's is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.attribution.parts import digest_of
from gradsketch.attribution.passes import Each, Part, here, parts_of
from gradsketch.attribution.results import Score
from gradsketch.attribution.scan import Probe, every_score, scan
from gradsketch.durable import written_whole
from gradsketch.errors import InputError
from gradsketch.gradients.fingerprints import digest
from gradsketch.reading.folders import is_read_from
from gradsketch.reading.mapped import MappedRows
from gradsketch.report.numbers import ranked_figure
from gradsketch.results import Result
from gradsketch.store import Store
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AGGREGATES", "Budget", "Selection", "chosen_rows", "data_digest", "described_rows", "target_scores"]

AGGREGATES = ("mean", "max", "rank")
# Rows compared with all chosen ones at a time, to find copies.
_COMPARED = 256


@dataclass(frozen=True)
class Budget:
    """How much may be chosen: so many rows, this share of all rows, or rows of so many tokens in all.

    Raises:
        InputError: none of the three, or several, or a number out of range.
    """

    rows: int | None = None
    share: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not (len(given) == 1 and all(_is_amount(name, value) for name, value in given.items())):
            raise InputError(
                f"a budget of {', '.join(f'{n}={v!r}' for n, v in given.items()) or 'nothing'}",
                "a positive whole number of rows or tokens, or a share of all rows up to 1",
                "Pass one of rows=1000, share=0.05 or tokens=100_000",
            )


def _is_amount(name: str, value: Any) -> bool:
    kind = Real if name == "share" else Integral
    sound = isinstance(value, kind) and not isinstance(value, bool)
    return sound and 0 < float(value) <= (1 if name == "share" else math.inf)


@dataclass(frozen=True, eq=False)
class Selection(Result):
    """The answer to "which rows shall I train on?": those that help (or harm) a target set most, best first.

    ``rows`` are their places in the data, ``ids`` their names, ``values`` their scores and ``tokens`` their lengths.
    ``copies`` counts rows that were passed over because a chosen one is alike. ``of`` is how many rows were scored, for
    how many ``targets``; ``score`` and ``aggregate`` say by what, and ``harmful`` at which end. ``data`` is a hash of
    the indexed data, ``shard_rows`` at a time; "" where that is not known. A score says which rows to try first; what
    training on them brings, only training shows.
    """

    rows: tuple[int, ...]
    ids: tuple[str, ...]
    values: Float[Tensor, " chosen"]
    tokens: Float[Tensor, " chosen"]
    copies: int
    of: int
    targets: int
    aggregate: str
    score: Score
    harmful: bool
    data: str = ""
    shard_rows: int = 1

    def summary(self) -> str:
        total = float(self.tokens.nansum())
        kind = "harm" if self.harmful else "help"
        return (
            f"{len(self.rows):,} of {self.of:,} rows ({total:,.0f} tokens) that {kind} {self.targets} targets most, "
            f"by the {self.aggregate} of {self.score.name}; {self.copies:,} passed over as copies"
        )

    def __str__(self) -> str:
        """Return the first ten as a table for the terminal."""
        shown = zip(self.rows[:10], self.ids, self.values.tolist(), self.tokens.tolist(), strict=False)
        cells = [[str(row), id_, f"{value:+.4g}", f"{tokens:.0f}"] for row, id_, value, tokens in shown]
        return "\n".join([*aligned(["row", "id", "score", "tokens"], cells), self.summary()])

    def _figure(self) -> Figure:
        return ranked_figure(self.values.tolist(), f"{self.aggregate} of {self.score.name}", "chosen row")

    def write(self, path: str | Path, data: Sequence[Any], *, drop: bool = False) -> Path:
        """Write the chosen rows of the data as JSON lines, in the data's order; with ``drop`` all others.

        Rows that were read under other names (``mapped_rows``) are written under their own.

        Raises:
            InputError: the data is not that of the index, holds rows that are no JSON, or is read from that very file.
            StoreError: the file cannot be written.
        """
        if len(data) != self.of:
            raise InputError(
                f"data of {len(data):,} rows", f"the {self.of:,} rows of the index", "Pass the data it was built of"
            )
        if is_read_from(str(getattr(data, "path", "://")), Path(path)):
            raise InputError(f"{path}, from which the data is read", "a file of its own", "Choose another name")
        self._require_same(data)
        data = data.rows if isinstance(data, MappedRows) else data  # rows as they stand, under their own names
        chosen = set(self.rows)
        with written_whole(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
            for place in range(len(data)):
                if (place in chosen) != drop:
                    file.write(_line(data[place], place))
        return Path(path)

    def _require_same(self, data: Sequence[Any]) -> None:
        starts = range(0, self.of, self.shard_rows) if self.data else ()
        found = [digest_of(data, start, min(self.shard_rows, self.of - start)) for start in starts]
        if self.data and digest(found) != self.data:
            raise InputError(
                "data of another content or order than the index's",
                "the data that the index was built of, whose places the chosen rows are",
                "Pass that data, or take selection.rows and write them yourself",
            )


def data_digest(store: Store, each: Each = here) -> str:
    """Return a hash of the data behind a store, or nothing where rows or their hashes are missing."""
    parts = each(partial(_digests_of, store), parts_of(store.ranges()))
    digests = [of_shard for part in parts for of_shard in part]
    return digest(digests) if all(digests) and not store.rows_missing else ""


def _digests_of(store: Store, part: Part) -> list[str]:
    return [store.shard(start, count).digest for start, count in part]


def target_scores(probes: Sequence[Probe], aggregate: str, sign: int = 1, each: Each = here) -> Float[Tensor, " rows"]:
    """Return every row's score for the targets together; NaN for rows that were left out when the index was built.

    "mean" and "max" over the targets ("max" is the least with ``sign=-1``); "rank": the mean place among all rows, from
    0 (worst) to 1 (best), so that no target with large gradients outvotes the others. Rows of one score share a place.

    Raises:
        InputError: another aggregate.
    """
    if aggregate not in AGGREGATES:
        raise InputError(f"aggregate={aggregate!r}", f"one of {', '.join(AGGREGATES)}", 'Pass aggregate="mean"')
    total = probes[0].store.rows
    if aggregate != "rank":
        out = torch.full((total,), torch.nan, dtype=torch.float32, device="cpu")
        for found in each(partial(_aggregates_of, probes, aggregate, sign), parts_of(probes[0].store.ranges())):
            for start, scores in found:
                out[start : start + len(scores)] = scores
        return out.where(torch.isfinite(out), torch.nan)
    from scipy.stats import rankdata  # here, for builds and questions would wait for it and never rank

    ranks, every = torch.zeros(total, dtype=torch.float32, device="cpu"), every_score(probes, each)
    usable = torch.isfinite(every).all(0)
    for scores in every:
        places = rankdata(scores[usable].numpy()) - 1
        ranks[usable] += torch.from_numpy(places / max(1, len(places) - 1) / len(every)).float()
    return ranks.where(usable, torch.nan)


def _aggregates_of(
    probes: Sequence[Probe], aggregate: str, sign: int, part: Part
) -> list[tuple[int, Float[Tensor, " rows"]]]:
    """Return of each shard its first row, and its rows' scores for the targets together."""
    return [
        (shards[0].start, scores.mean(0) if aggregate == "mean" else sign * (sign * scores).amax(0))
        for shards, scores in scan(probes, part)
    ]


def chosen_rows(
    stores: Sequence[Store], values: Float[Tensor, " rows"], budget: Budget, *, alike: float | None, each: Each = here
) -> tuple[list[int], int]:
    """Return the rows of largest value within the budget, best first, and how many were passed over as copies.

    A row is a copy where the cosine of its gradient with a chosen one's is above ``alike`` at every checkpoint. A row
    that would exceed the budget of tokens is left out, and smaller ones may follow.

    Raises:
        InputError: ``alike`` is out of range, or tokens were not counted when the index was built.
    """
    if alike is not None and not 0 < alike <= 1:
        raise InputError(f"alike={alike!r}", "a cosine above 0, up to 1, or None", "Pass alike=0.99")
    usable = torch.isfinite(values)
    order = values.where(usable, -torch.inf).sort(descending=True, stable=True).indices[: int(usable.sum())]
    tokens = (
        _tokens(stores[0], values, each)
        if budget.tokens is not None
        else torch.ones(len(values), dtype=torch.float32, device="cpu")
    )
    limit = budget.tokens or budget.rows or max(1, round((budget.share or 0) * len(order)))
    rows: list[int] = []
    known, copies, spent = _Copies(stores, alike), 0, 0.0
    for block in order.split(_COMPARED):
        if spent >= limit:
            break
        known.begin(block.tolist())
        for position, row in enumerate(block.tolist()):
            length = float(tokens[row])
            if spent + length > limit:
                continue
            if known.accepts(position):
                rows.append(row)
                spent += length
            else:
                copies += 1
    return rows, copies


class _Copies:
    """Finds rows whose gradients nearly equal those of chosen ones, block after block of candidates."""

    def __init__(self, stores: Sequence[Store], alike: float | None) -> None:
        self.stores, self.alike = stores, alike
        self._chosen: list[Tensor] = []  # unit-length sketches [checkpoints, rows, d]
        self._accepted: list[int] = []  # of the block
        self._unit = torch.empty(len(stores), 0, 0, dtype=torch.float32, device="cpu")

    def begin(self, rows: list[int]) -> None:
        """Take the next block of candidates."""
        if self.alike is None:
            return
        if self._accepted:
            self._chosen.append(self._unit[:, self._accepted])
        self._accepted, self._unit = [], _directions(torch.stack([_sketches(store, rows) for store in self.stores]))
        alike = [(self._unit @ part.mT).amin(0).amax(1) > self.alike for part in self._chosen]
        self._copy = torch.stack(alike).any(0) if alike else torch.zeros(len(rows), dtype=torch.bool, device="cpu")

    def accepts(self, position: int) -> bool:
        """Return whether a candidate of the block is no copy; it counts as chosen then."""
        if self.alike is None:
            return True
        if bool(self._copy[position]):
            return False
        self._copy |= (self._unit @ self._unit[:, position, :, None]).amin(0)[:, 0] > self.alike
        self._accepted.append(position)
        return True


def described_rows(store: Store, rows: Sequence[int]) -> tuple[tuple[str, ...], Float[Tensor, " chosen"]]:
    """Return the ids of rows, and their tokens."""
    ids, tokens = [""] * len(rows), torch.full((len(rows),), torch.nan, dtype=torch.float32, device="cpu")
    for shard, positions, places in store.by_shard(rows):
        names, lengths = shard.column("id"), shard.numbers("tokens")
        for position, place in zip(positions, places, strict=True):
            ids[position], tokens[position] = names[place], lengths[place]
    return tuple(ids), tokens


def _sketches(store: Store, rows: list[int]) -> Float[Tensor, "rows d"]:
    out = torch.empty(len(rows), store.d, dtype=torch.float32, device="cpu")
    for shard, positions, places in store.by_shard(rows):
        out[positions] = shard.decoded(places)
    return out


def _directions(sketches: Float[Tensor, "checkpoints rows d"]) -> Float[Tensor, "checkpoints rows _"]:
    """Return unit-length sketches; of several checkpoints those that are zero are alike, for they tell nothing."""
    unit: Tensor = torch.nn.functional.normalize(sketches, dim=2)
    return unit if len(unit) == 1 else torch.cat([unit, (unit == 0).all(2, keepdim=True).float()], dim=2)


def _tokens(store: Store, values: Float[Tensor, " rows"], each: Each) -> Float[Tensor, " rows"]:
    tokens = torch.full_like(values, torch.nan)
    for found in each(partial(_tokens_of, store), parts_of(store.ranges())):
        for start, lengths in found:
            tokens[start : start + len(lengths)] = lengths
    if bool(tokens[torch.isfinite(values)].isnan().any()):
        raise InputError("rows whose tokens were not counted", "a budget of rows", "Pass rows= or share=")
    return tokens


def _tokens_of(store: Store, part: Part) -> list[tuple[int, Float[Tensor, " rows"]]]:
    return [(shard.start, shard.numbers("tokens")) for shard in store.snapshot(part)]


def _line(example: Any, place: int) -> str:
    try:
        return json.dumps(example, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"row {place}, which is no JSON ({error})",
            "rows of texts, numbers, lists and dicts",
            "Take selection.rows and write them yourself",
        ) from error
