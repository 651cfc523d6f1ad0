"""Which columns of text are columns of numbers: those whose every entry a number is written as, and nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["Kind", "converted", "joined", "seen"]

_EXACT = 1 << 53  # up to here every integer is a float64


@dataclass(frozen=True)
class Kind:
    """What the entries of a column have been so far: "empty", "int", "float" or "text"; and the largest integer."""

    name: str = "empty"
    largest: int = 0


def seen(kind: Kind, column: pa.ChunkedArray) -> Kind:
    """Return the kind of a column, as texts, of which more entries have been seen; empty entries are missing numbers.

    "7" and "-0.5" are numbers. "007", "+7", "1.10", "1e5", "NaN" and 20 digits are not: written again from the number,
    they would be another text. Integers among decimals count where a float64 holds them.
    """
    column = column.filter(pc.not_equal(column, ""))
    if kind.name == "text" or len(column) == 0:
        return kind
    found = _ints(column) or _floats(column) or Kind("text")
    return joined([kind, found])


def joined(kinds: Iterable[Kind]) -> Kind:
    """Return the kind of a column that has entries of all of them."""
    return reduce(_join, kinds, Kind())


def _join(a: Kind, b: Kind) -> Kind:
    names, largest = {a.name, b.name} - {"empty"}, max(a.largest, b.largest)
    if len(names) <= 1:
        return Kind(names.pop() if names else "empty", largest)
    return Kind("float", largest) if "text" not in names and largest <= _EXACT else Kind("text")


def converted(kind: Kind, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts as what its kind says."""
    if kind.name not in ("int", "float"):
        return column
    present = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    return present.cast(pa.int64() if kind.name == "int" else pa.float64())


def _ints(column: pa.ChunkedArray) -> Kind | None:
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowException:
        return None
    if not pc.all(pc.equal(numbers.cast(pa.string()), column)).as_py():
        return None
    ends = pc.min_max(numbers).as_py()
    return Kind("int", max(abs(ends["min"]), abs(ends["max"])))


def _floats(column: pa.ChunkedArray) -> Kind | None:
    largest = 0
    for text in column.to_pylist():
        try:
            number = float(text)
        except ValueError:
            return None
        if repr(number) != text or not math.isfinite(number):
            if repr(number) != f"{text}.0" or abs(number) > _EXACT:
                return None
            largest = max(largest, int(abs(number)))
    return Kind("float", largest)
