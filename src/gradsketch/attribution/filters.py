"""Conditions on metadata: which rows may be hits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gradsketch.attribution.passes import Each, Part, here, parts_of
from gradsketch.attribution.scan import RowFilter
from gradsketch.errors import InputError
from gradsketch.store import Shard, Store
from gradsketch.store.columns import among

__all__ = ["Where", "columns_of", "row_filter"]

# {column: value or list of values}, all of which must hold; or a function of a row's record (id, loss, gradient_norm
# and metadata).
Where = Mapping[str, Any] | Callable[[dict[str, Any]], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# What the values of a column can equal. A column of JSON holds anything, and None stands for a missing value.
_CAN_EQUAL: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "int": lambda value: _is_number(value) and value % 1 == 0,
    "float": lambda value: _is_number(value) and not math.isnan(value),
    "bool": lambda value: isinstance(value, bool),
    "json": lambda value: True,
    "null": lambda value: False,
}


def columns_of(store: Store, each: Each = here) -> dict[str, set[str]]:
    """Return the metadata columns, each with the kinds of values that shards hold in it."""
    found: dict[str, set[str]] = {}
    for part in each(partial(_columns_of, store), parts_of(store.ranges())):
        for name, kinds in part.items():
            found.setdefault(name, set()).update(kinds)
    return found


def _columns_of(store: Store, part: Part) -> dict[str, set[str]]:
    return store.snapshot(part).columns()


def row_filter(where: Where | None, store: Store, each: Each = here) -> RowFilter | None:
    """Return the condition as a function of a shard of this store, or of one with the same rows.

    Raises:
        InputError: a column the index does not have, or a value that no row of its column can have.
    """
    if where is None:
        return None
    if not isinstance(where, Mapping):
        none = dict.fromkeys(columns_of(store, each))  # a shard has the columns of its own rows only
        return lambda shard: torch.tensor(
            [bool(where(none | shard.record(i))) for i in range(shard.count)], device="cpu"
        )
    columns = {"id": {"string"}, **columns_of(store, each)}
    unknown = [name for name in where if name not in columns]
    if unknown:
        raise InputError(
            f"a condition on {unknown[0]!r}",
            f"a column of the index: {', '.join(columns)}",
            "Check the name, or pass a function of the row's record",
        )
    wanted = {name: _values(value) for name, value in where.items()}
    for name, values in wanted.items():
        _require_possible(name, values, columns[name])

    def keep(shard: Shard) -> Bool[Tensor, " rows"]:
        kept = torch.ones(shard.count, dtype=torch.bool, device="cpu")
        for name, values in wanted.items():
            kept &= torch.tensor([among(value, values) for value in shard.column(name)], dtype=torch.bool, device="cpu")
        return kept

    return keep


def _require_possible(name: str, values: list[Any], kinds: Collection[str]) -> None:
    kind = " or ".join(sorted(kinds))
    impossible = [v for v in values if not (v is None or any(_CAN_EQUAL[kind](v) for kind in kinds))]
    if impossible or not values:
        came = f"{impossible[0]!r} of type {type(impossible[0]).__name__}" if impossible else "no value"
        raise InputError(
            f"a condition that no row can meet: {came} for the column {name!r} of type {kind}",
            f"values of type {kind}",
            "Pass the value as the data has it",
        )


def _values(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value  # arrays and numbers of numpy and torch
    values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    return [v.item() if hasattr(v, "item") else v for v in values]
