"""Dataclasses as plain values, which every JSON reader takes, and back, without losing a bit.

Numbers that JSON does not have are texts, as in Protocol Buffers: "NaN", "Infinity", "-Infinity". A tensor is its
dtype, its shape, and its bytes (little-endian) in base64.
"""

from __future__ import annotations

import base64
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_json", "from_plain", "to_plain"]

_TENSOR = {"dtype", "shape", "base64"}
# What a terminal would obey or could not show, and half of a surrogate pair, which is no UTF-8; escaped it is JSON.
_ESCAPED = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def as_json(value: Any, *, indent: int | None = 1) -> str:
    """Return any value as strict JSON that can be shown in a terminal, and loses nothing."""
    text = json.dumps(to_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def to_plain(value: Any) -> Any:
    """Return a value as dicts, lists, texts, numbers and None; what is none of these becomes its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _name(value)
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape), "base64": base64.b64encode(data).decode()}
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [to_plain(item) for item in value]
    return str(value)


def from_plain(hint: Any, value: Any) -> Any:
    """Return what ``to_plain`` was given, as the type hint says: a dataclass, tuples of them, numbers, tensors.

    Raises:
        KeyError, TypeError, ValueError: the values are not those of the hint.
    """
    if isinstance(value, Mapping) and value.keys() == _TENSOR:
        return _tensor(value)
    if is_dataclass(hint):
        return _dataclass(hint, value)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return tuple(from_plain(kind, item) for kind, item in zip(kinds, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: from_plain(inner[1], item) for key, item in value.items()}
    if origin in (Union, types.UnionType) and value is not None:
        kinds = tuple(kind for kind in inner if kind is not type(None))
        return from_plain(kinds[0], value) if len(kinds) == 1 else value
    return float(value) if hint is float else value


def _dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    unknown = values.keys() - {f.name for f in fields(kind)}
    if unknown:
        raise KeyError(f"unknown name {min(unknown)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: from_plain(hints[name], value) for name, value in values.items()})


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _tensor(record: Mapping[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, record["dtype"]), record["shape"]
    data = bytearray(base64.b64decode(record["base64"]))
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype, device="cpu")
