"""Conditions on metadata: which rows may be hits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gradsketch.attribution.scan import RowFilter
from gradsketch.errors import InputError
from gradsketch.store import Shard

__all__ = ["Where", "row_filter"]

# {column: value or list of values}, all of which must hold; or a function of a row's record (id, loss, gradient_norm
# and metadata).
Where = Mapping[str, Any] | Callable[[dict[str, Any]], bool]


def row_filter(where: Where | None, columns: Sequence[str]) -> RowFilter | None:
    """Return the condition as a function of a shard.

    Raises:
        InputError: a column the index does not have.
    """
    if where is None:
        return None
    if not isinstance(where, Mapping):
        return lambda shard: torch.tensor([bool(where(shard.record(i))) for i in range(shard.count)])
    unknown = [name for name in where if name not in ("id", *columns)]
    if unknown:
        raise InputError(
            f"a condition on {unknown[0]!r}",
            f"a column of the index: {', '.join(('id', *columns))}",
            "Check the name, or pass a function of the row's record",
        )
    wanted = {name: _values(value) for name, value in where.items()}

    def keep(shard: Shard) -> Bool[Tensor, " rows"]:
        kept = torch.ones(shard.count, dtype=torch.bool)
        for name, values in wanted.items():
            kept &= torch.tensor([value in values for value in shard.column(name)], dtype=torch.bool)
        return kept

    return keep


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
