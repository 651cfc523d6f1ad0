"""What a shard's metadata columns hold. Each shard says it of its own rows: no pass over the data comes first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

__all__ = ["COLUMN_TYPES", "RESERVED", "among", "common_kind", "kind_of"]

# Columns hold values of one of these kinds; values of several kinds are stored as JSON text, and read back from it.
COLUMN_TYPES: Mapping[str, pa.DataType] = {
    "string": pa.large_string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "json": pa.large_string(),
    "null": pa.null(),
}
RESERVED = ("id", "sketch", "scale", "gradient_norm", "loss", "tokens")

_EXACT = 1 << 53  # up to here every integer is a float64
_KINDS = {str: "string", bool: "bool", int: "int", float: "float", type(None): "null"}


def kind_of(values: Iterable[Any]) -> str:
    """Return the kind of a column that holds these values; None, for a value that is missing, fits every kind.

    Integers that a float would round are not put among floats.
    """
    values = list(values)
    kind = common_kind({_kind(value) for value in values})
    is_rounded = kind == "float" and any(isinstance(value, int) and abs(value) > _EXACT for value in values)
    return "json" if is_rounded else kind


def common_kind(kinds: Collection[str]) -> str:
    """Return the kind of a column that holds values of all these kinds."""
    found = set(kinds) - {"null"}
    if found == {"int", "float"}:
        return "float"
    return found.pop() if len(found) == 1 else "json" if found else "null"


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "json"
    return _KINDS.get(type(value), "json")


def among(value: Any, wanted: Iterable[Any]) -> bool:
    """Whether a value is one of those wanted; True is not the number 1, as it is in Python."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in wanted)
