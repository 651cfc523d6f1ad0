"""From a user's data to rows of an index: what each row is called, shown as, and hashed to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradsketch.errors import InputError
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.files import read_examples
from gradsketch.gradients.fingerprints import canonical
from gradsketch.gradients.tasks import Encoded, Task
from gradsketch.gradients.tasks.rows import is_input
from gradsketch.store.manifest import RESERVED

__all__ = ["BadRow", "Survey", "as_examples", "display", "fields", "rebuild", "survey"]

_KINDS = {str: "string", bool: "bool", int: "int", float: "float"}
_RENAMED = "data_"
# Encoded rows that a survey keeps, so that a build tokenises nothing twice. Beyond that much, rows are encoded again
# when their turn comes: by then the gradients of those before have taken hours.
_KEPT_BYTES = 1 << 30
_BYTES_A_ROW = 700  # of Python's objects around a row's numbers
_BAD_ROWS_SHOWN = 5


@dataclass(frozen=True)
class BadRow:
    """A row that the task cannot use: where it stands, why, and what the task takes."""

    where: str
    reason: str
    wanted: str


@dataclass(frozen=True)
class Survey:
    """One pass over the data: places and lengths of usable rows, column types, a hash of everything, bad rows.

    ``encoded`` holds rows by place, as many as memory is kept for.
    """

    places: tuple[int, ...]
    lengths: tuple[int, ...]
    encoded: Mapping[int, Encoded]
    columns: dict[str, str]
    digest: str
    bad: tuple[BadRow, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all usable rows."""
        return sum(self.lengths)


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
    """Return examples with a length and integer positions, from a path, a sequence, a dataset or a batch of tensors.

    Raises:
        InputError: the data can be read only once, is a DataLoader, or is empty.
    """
    if isinstance(data, str | Path):
        return read_examples(data)
    if isinstance(data, Tensor) or _is_batch(data):
        return _Slices(data)
    if isinstance(data, DataLoader):
        raise InputError("a DataLoader", "the examples themselves", "Pass loader.dataset; batches are made inside")
    if isinstance(data, Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise InputError(
            f"data of type {type(data).__name__}",
            "a path, a list, a dataset with a length and positions, or a dict of tensors",
            'Pass one part, such as data["train"]' if isinstance(data, Mapping) else "Wrap it in list(...)",
        )
    return data


def _is_batch(data: Any) -> bool:
    values = list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, tuple) else []
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def survey(examples: Any, task: Task, model: nn.Module) -> Survey:
    """Read every example once: encode it, see that the model takes it, and collect what the manifest needs."""
    digest = hashlib.sha256()
    places, lengths, kept = [], [], _Kept()
    bad: list[BadRow] = []
    kinds: dict[str, set[str]] = {}
    for place in range(len(examples)):
        try:
            example = _example(examples, place)
            row = task.read(example)
            if isinstance(row, Encoded):
                task.check(model, row)
            length = task.length(row)
            metadata = _storable(example)
        except InputError as error:
            stands = where(examples, place)
            bad.append(BadRow(stands, error.came.removeprefix(f"{stands}: "), error.wanted))
            continue
        places.append(place)
        lengths.append(length)
        kept.add(place, row)
        for part in canonical(example):
            digest.update(part)
        for name, value in metadata.items():
            kinds.setdefault(name, set()).add(_kind(value))
    columns = {name: _common(found) for name, found in kinds.items()}
    return Survey(tuple(places), tuple(lengths), kept.rows, columns, digest.hexdigest()[:16], tuple(bad))


def _example(examples: Any, place: int) -> Any:
    try:
        return examples[place]
    except InputError:
        raise
    except Exception as error:  # a data set of the user's own raises whatever it likes where a file is damaged
        came = f"an example that cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(came, "data whose examples can be read", "Repair or drop it") from error


def _storable(example: Any) -> dict[str, Any]:
    """Return an example's metadata, which a shard must be able to hold together with its id."""
    try:
        id_, metadata = fields(example)
        json.dumps([id_, metadata], ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:  # half of a surrogate pair; lists within lists without end
        raise InputError(
            f"a value that cannot be stored ({type(error).__name__}: {str(error)[:200]})",
            "metadata in UTF-8, nested less deep",
            "Repair or drop it",
        ) from error
    return metadata


class _Kept:
    """Encoded rows by place, up to a bound of memory."""

    def __init__(self) -> None:
        self.rows: dict[int, Encoded] = {}
        self._bytes = 0

    def add(self, place: int, row: Any) -> None:
        if isinstance(row, Encoded) and self._bytes < _KEPT_BYTES:
            self.rows[place] = row
            self._bytes += row.bytes + _BYTES_A_ROW


def where(examples: Any, place: int) -> str:
    """Return where an example stands, as a person finds it."""
    return str(examples.where(place)) if hasattr(examples, "where") else f"example {place}"


def refuse_bad_rows(bad: Sequence[BadRow], total: int) -> None:
    """Stop where rows cannot be used.

    Raises:
        InputError: with the place and reason of the first few.
    """
    if bad:
        shown = "; ".join(f"{row.where} ({row.reason})" for row in bad[:_BAD_ROWS_SHOWN])
        more = f" and {len(bad) - _BAD_ROWS_SHOWN} more" if len(bad) > _BAD_ROWS_SHOWN else ""
        raise InputError(
            f"{len(bad)} of {total} rows that cannot be used: {shown}{more}",
            "; ".join(dict.fromkeys(row.wanted for row in bad[:_BAD_ROWS_SHOWN])),
            "Repair them, or leave them out with skip_bad=True" if len(bad) < total else "Repair them",
        )


def fields(example: Any) -> tuple[str | None, dict[str, Any]]:
    """Return an example's own id, if it has one, and its metadata: every value that is text, number or plain JSON."""
    if isinstance(example, str):
        return None, {"text": example}
    if isinstance(example, Mapping):
        id_, ids = example.get("id"), example.get("input_ids")
        tokens = None if ids is None else len(ids)
        columns = {
            (_RENAMED + str(name) if name in RESERVED else str(name)): _plain(value)
            for name, value in example.items()
            if name != "id" and not is_input(name, value, tokens) and _is_plain(value)
        }
        return (None if id_ is None else str(id_)), columns
    if isinstance(example, tuple | list) and len(example) == 2:
        first, second = example
        if isinstance(first, str) and isinstance(second, str):
            return None, {"prompt": first, "answer": second}
        if isinstance(first, str):
            return None, {"text": first, "label": _plain(second)}
        return None, {"label": _plain(second)} if _is_plain(second) else {}
    return None, {}


def rebuild(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a stored row as an example a task can read again, or None where it was not made of plain values."""
    names = {"text", "prompt", "source", "messages"} & set(record)
    if not any(record[name] is not None for name in names):
        return None
    return {
        name.removeprefix(_RENAMED): value
        for name, value in record.items()
        if value is not None and name not in ("id", "loss", "gradient_norm")
    }


def display(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return what to show of an example: its text, and apart from it the answer where it has one."""
    answer = next((record[n] for n in ("answer", "completion", "target") if isinstance(record.get(n), str)), None)
    if isinstance(record.get("text"), str):
        pair = record.get("text_pair")
        return f"{record['text']}\n{pair}" if isinstance(pair, str) else record["text"], answer
    question = next((record[n] for n in ("prompt", "source") if isinstance(record.get(n), str)), None)
    return question, answer


def _is_plain(value: Any) -> bool:
    """Whether a value is metadata: text, a number, or JSON made of them; arrays of more than one entry are not."""
    if hasattr(value, "shape"):
        return int(np.prod(value.shape)) == 1
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | bool | int | float) or hasattr(value, "isoformat")


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and not isinstance(value, Mapping):
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.isoformat() if hasattr(value, "isoformat") else value


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "json"
    return "none" if value is None else _KINDS.get(type(value), "json")


def _common(found: set[str]) -> str:
    """Return the column type that holds all kinds of values found in a column."""
    found = found - {"none"}
    if found == {"int", "float"}:
        return "float"
    return found.pop() if len(found) == 1 else "json" if found else "string"
