"""The rows of an index as a table: pages of it, filters, words, and sums by a column.

A million rows are browsed by whole columns of Arrow, never row by row. A column's values are numbered once and kept,
four bytes a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gradsketch.errors import InputError
from gradsketch.store import Shard, Store
from gradsketch.store.columns import among

__all__ = ["ORDERS", "Facet", "RowTable", "Value"]

Truths = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int32]

ORDERS = ("row", "loss", "gradient_norm")
_VALUES = 200  # distinct values of a column that are offered to filter by
_KEPT = 8  # columns, and lists of rows, that stay in memory


@dataclass(frozen=True)
class Value:
    """One value of a column, and how many rows have it; None stands for rows that have none."""

    value: Any
    rows: int


@dataclass(frozen=True)
class Facet:
    """A metadata column: its most frequent values, and how many distinct ones there are."""

    column: str
    distinct: int
    values: tuple[Value, ...]


@dataclass(frozen=True)
class _Coded:
    """A column as the number of each row's value among its distinct ``values``; −1: none."""

    values: pa.Array
    codes: npt.NDArray[np.int32]
    is_json: bool

    def value(self, code: int) -> Any:
        found = self.values[code].as_py()
        return json.loads(found) if self.is_json else found


class RowTable:
    """The rows of a store that were there when it was opened."""

    def __init__(self, store: Store) -> None:
        self.store = store.snapshot()
        self.kinds = self.store.columns()
        self.there = np.zeros(store.rows, dtype=bool)
        for start, count in self.store.ranges():
            self.there[start : start + count] = True
        self.coded = lru_cache(_KEPT)(self._coded)
        self._found = lru_cache(_KEPT)(self._matching)
        self.facets = lru_cache(1)(self._facets)
        self._numbers = lru_cache(len(ORDERS))(self._of_all)

    def _facets(self) -> tuple[Facet, ...]:
        """Return the columns that put rows into groups, those of fewest values first; not a text of each row's own."""
        rows = int(self.there.sum())
        most = min(max(_VALUES, rows // 100), rows // 2)
        facets = (self.facet(column) for column in self.kinds)
        return tuple(sorted((f for f in facets if 1 < f.distinct <= most), key=lambda facet: facet.distinct))

    def facet(self, column: str) -> Facet:
        """Return a column with its most frequent values."""
        coded = self.coded(column)
        counts = np.bincount(coded.codes[self.there] + 1, minlength=len(coded.values) + 1)
        order = np.argsort(-counts, kind="stable")[:_VALUES].tolist()
        shown = [Value(None if at == 0 else coded.value(at - 1), int(counts[at])) for at in order if counts[at]]
        return Facet(column, int((counts > 0).sum()), tuple(shown))

    def matching(self, where: Mapping[str, Sequence[Any]], words: str, order: str = "row") -> Rows:
        """Return the rows that meet all conditions and hold the words in a text or their id, in an order.

        Raises:
            InputError: another order, or a column the index does not have.
        """
        if order not in ORDERS:
            raise InputError(f"order={order!r}", f"one of {', '.join(ORDERS)}", "Choose one")
        return self._found(json.dumps(where, sort_keys=True), words.strip(), order)

    def keep(self, where: Mapping[str, Sequence[Any]]) -> Truths:
        """Return one truth value a row: is it there, and does it meet all conditions?"""
        kept = self.there.copy()
        for column, wanted in where.items():
            coded = self.coded(column)
            meets = [among(coded.value(code), wanted) for code in range(len(coded.values))]
            kept &= np.array([*meets, None in wanted], dtype=bool)[coded.codes]
        return kept

    def sums(self, column: str, scores: Numbers, kept: Truths) -> list[tuple[Any, int, float, float]]:
        """Return for each value of a column: its rows, and the sums of their positive and of their negative scores."""
        coded, used = self.coded(column), kept & np.isfinite(scores)
        codes, used_scores = coded.codes[used] + 1, scores[used].astype(np.float64)
        size = len(coded.values) + 1
        rows = np.bincount(codes, minlength=size)
        positive = np.bincount(codes, weights=np.maximum(used_scores, 0), minlength=size)
        negative = np.bincount(codes, weights=np.minimum(used_scores, 0), minlength=size)
        order = [int(at) for at in np.argsort(-np.abs(positive + negative), kind="stable")[:_VALUES] if rows[at]]
        names = [None if at == 0 else coded.value(at - 1) for at in order]
        return [
            (n, int(rows[at]), float(positive[at]), float(negative[at])) for n, at in zip(names, order, strict=True)
        ]

    def _matching(self, where: str, words: str, order: str) -> Rows:
        kept = self.keep(json.loads(where))
        for shard in self.store if words else ():
            part = slice(shard.start, shard.start + shard.count)
            if kept[part].any():
                kept[part] &= _holds(shard, words)
        rows: Rows = kept.nonzero()[0].astype(np.int32)
        if order == "row":
            return rows
        return rows[np.argsort(-np.nan_to_num(self._numbers(order)[rows], nan=-np.inf), kind="stable")]

    def _of_all(self, name: str) -> Numbers:
        numbers = np.full(len(self.there), np.nan, dtype=np.float32)
        for shard in self.store:
            numbers[shard.start : shard.start + shard.count] = shard.numbers(name).numpy()
        return numbers

    def _coded(self, column: str) -> _Coded:
        if column not in self.kinds:
            columns = ", ".join(self.kinds) or "of which this one has none"
            raise InputError(f"a column {column!r}", f"a column of the index: {columns}", "Choose one of them")
        kinds = self.kinds[column] - {"null"}
        codes = np.full(len(self.there), -1, dtype=np.int32)
        if len(kinds) > 1:  # shards that disagree, such as numbers in one and texts in another
            return self._numbered(column, codes)
        chunks = [shard.batch.column(column) for shard in self.store if shard.columns.get(column, "null") != "null"]
        if not chunks:
            return _Coded(pa.nulls(0), codes, False)
        whole = pa.chunked_array(chunks).combine_chunks().dictionary_encode()
        found, done = whole.indices.fill_null(-1).to_numpy(zero_copy_only=False), 0
        for shard in self.store:
            if shard.columns.get(column, "null") != "null":
                codes[shard.start : shard.start + shard.count] = found[done : done + shard.count]
                done += shard.count
        return _Coded(whole.dictionary, codes, kinds == {"json"})

    def _numbered(self, column: str, codes: npt.NDArray[np.int32]) -> _Coded:
        numbers: dict[str, int] = {}
        for shard in self.store:
            for place, value in enumerate(shard.column(column)):
                if value is not None:
                    codes[shard.start + place] = numbers.setdefault(json.dumps(value), len(numbers))
        return _Coded(pa.array(list(numbers), pa.large_string()), codes, True)


def _holds(shard: Shard, words: str) -> Truths:
    """Return which rows hold the words, in any case, in their id or a text."""
    kinds = {"id": "string", **{name: kind for name, kind in shard.columns.items() if kind in ("string", "json")}}
    found = np.zeros(shard.count, dtype=bool)
    for name, kind in kinds.items():
        # In JSON, as a chat is kept, a quote and a line feed stand escaped.
        written = json.dumps(words, ensure_ascii=False)[1:-1] if kind == "json" else words
        held = pc.match_substring(shard.batch.column(name), written, ignore_case=True)
        found |= held.fill_null(False).to_numpy(zero_copy_only=False)
    return found
