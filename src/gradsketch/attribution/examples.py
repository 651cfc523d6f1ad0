"""From a user's data to rows of an index: what each row is called and shown as."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from gradsketch.errors import InputError
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.tasks.conversations import shown_turns, transcript
from gradsketch.gradients.tasks.rows import is_input
from gradsketch.reading import by_position, read_examples
from gradsketch.store.columns import RESERVED

__all__ = ["as_examples", "display", "fields", "rebuild", "where"]

_RENAMED = "data_"
# Values that JSON has no type for, and that are kept as what they are written as.
_AS_TEXT = (bytes, bytearray, memoryview, complex, Decimal, Fraction, PurePath, UUID, timedelta)
_BYTES_SHOWN = 64


class _Slices(Sequence[Any]):
    """The examples of one big batch of tensors."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.length = batch, batch_length(batch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.length:
            raise IndexError(i)
        one = batch_slice(self.batch, i, i + 1)
        if isinstance(one, Tensor):
            return one[0]
        return {k: v[0] for k, v in one.items()} if isinstance(one, Mapping) else type(one)(v[0] for v in one)


def as_examples(data: Any) -> Any:
    """Return examples with a length and integer positions, from a path, a sequence, a table or a batch of tensors.

    Raises:
        InputError: the data can be read only once, is a DataLoader, or is empty.
    """
    if isinstance(data, str | Path):
        return read_examples(data)
    if isinstance(data, Tensor) or _is_batch(data):
        return _Slices(data)
    data = by_position(data)
    if isinstance(data, DataLoader):
        raise InputError("a DataLoader", "the examples themselves", "Pass loader.dataset; batches are made inside")
    if isinstance(data, Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise InputError(
            f"data of type {type(data).__name__}",
            "a path, a list, a table, a dataset with a length and positions, or a dict of tensors",
            'Pass one part, such as data["train"]' if isinstance(data, Mapping) else "Wrap it in list(...)",
        )
    return data


def _is_batch(data: Any) -> bool:
    values = list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, tuple) else []
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def where(examples: Any, place: int) -> str:
    """Return where an example stands, as a person finds it."""
    return str(examples.where(place)) if hasattr(examples, "where") else f"example {place}"


def fields(example: Any) -> tuple[str | None, dict[str, Any]]:
    """Return an example's own id, if it has one, and its metadata: every value that is text, number or plain JSON."""
    if isinstance(example, str):
        return None, {"text": example}
    if isinstance(example, Mapping):
        id_ = example.get("id")
        return (None if id_ is None else str(id_)), _columns(example)
    if isinstance(example, tuple | list) and len(example) == 2:
        first, second = example
        if isinstance(first, str) and isinstance(second, str):
            return None, {"prompt": first, "answer": second}
        if isinstance(first, str):
            return None, {"text": first, "label": _plain(second)}
        return None, {"label": _plain(second)} if _is_plain(second) else {}
    return None, {}


def _columns(example: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the metadata of a dict, by column; those that a store has itself are renamed."""
    ids, columns = example.get("input_ids"), dict[str, Any]()
    tokens = None if ids is None else len(ids)
    for name, value in example.items():
        if name == "id" or is_input(name, value, tokens) or not _is_plain(value):
            continue
        column = _RENAMED + str(name) if name in RESERVED else str(name)
        if column in columns:
            raise InputError(
                f"a row with two fields for the column {column!r}", "one of them", "Rename or drop the other"
            )
        columns[column] = _plain(value)
    return columns


def rebuild(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a stored row as an example a task can read again, or None where it was not made of plain values."""
    names = {"text", "prompt", "source", "messages"} & set(record)
    if not any(record[name] is not None for name in names):
        return None
    return {
        _own_name(name): value
        for name, value in record.items()
        if value is not None and name not in ("id", "loss", "gradient_norm")
    }


def _own_name(column: str) -> str:
    """Return what the data calls a column; a name of its own may begin as those that were renamed do."""
    name = column.removeprefix(_RENAMED)
    return name if name in RESERVED else column


def display(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return what to show of an example: its text, and apart from it the answer where it has one.

    A chat is shown as a transcript, each turn behind its role.
    """
    if (turns := shown_turns(record)) is not None and (shown := transcript(turns[0])) is not None:
        return shown[0], None
    answer = next((record[n] for n in ("answer", "completion", "target") if isinstance(record.get(n), str)), None)
    if isinstance(record.get("text"), str):
        pair = record.get("text_pair")
        return f"{record['text']}\n{pair}" if isinstance(pair, str) else record["text"], answer
    question = next((record[n] for n in ("prompt", "source") if isinstance(record.get(n), str)), None)
    return question, answer


def _is_plain(value: Any) -> bool:
    """Whether a value is metadata: text, a number, what is written as text, or JSON made of them.

    Arrays of more than one entry, images and other objects are not.
    """
    if hasattr(value, "shape"):
        return int(np.prod(value.shape)) == 1
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (str, bool, int, float, *_AS_TEXT)) or hasattr(value, "isoformat")


def _plain(value: Any) -> Any:
    if getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M"):  # numpy's nanoseconds would become integers
        return str(np.asarray(value).reshape(())[()])
    if hasattr(value, "item") and not isinstance(value, Mapping):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_as_text(bytes(value))
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value) if isinstance(value, _AS_TEXT) else value


def _bytes_as_text(data: bytes) -> str:
    """Return bytes as the text that they are in UTF-8, or in hexadecimal; of many, what tells them from others."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if len(data) <= _BYTES_SHOWN:
            return data.hex()
        return f"{data[:8].hex()}… ({len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]})"
