"""A build reads its data part by part, because no pass over all of it should come first. A part is a shard's rows.

Each row is read and encoded when its part's turn comes, so memory is bounded by a part. A row that cannot be used keeps
its place: the shard says why it is left out. So a row's number is its place in the data, whatever is found on the way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from gradsketch.attribution.examples import fields, where
from gradsketch.errors import InputError
from gradsketch.gradients.fingerprints import canonical
from gradsketch.gradients.tasks import Encoded, Task
from gradsketch.reading.rows import rows_or_errors, sound

__all__ = ["BadRow", "Part", "PartReader", "Sample", "digest_of", "read_part", "refuse_bad_rows", "sample"]

_BAD_ROWS_SHOWN = 5
# Of rows that the task takes as they are, such as pictures, a part holds as much; of more, each is read again.
_RAW_BYTES = 1 << 27
# Encoded rows that are kept where there are several checkpoints, so that they are not tokenised again for each.
_KEPT_BYTES = 1 << 30
_BYTES_A_ROW = 700  # of Python's objects around a row's numbers
# What a plan is made from: so many stretches of so many rows, spread over the data.
_STRETCHES, _STRETCH_ROWS = 8, 32


@dataclass(frozen=True)
class BadRow:
    """A row that the task cannot use: its place in the data, where it stands, why, what the task takes, what to do."""

    place: int
    where: str
    reason: str
    wanted: str
    fix: str


@dataclass(frozen=True)
class Part:
    """Rows ``start … start+count-1`` of the data; of those that can be used the places, encoded rows and lengths.

    ``ids`` and ``columns`` (metadata by name) have an entry per row. ``digest`` is a hash of the content.
    """

    start: int
    count: int
    places: Sequence[int]
    encoded: Sequence[Any]
    lengths: Sequence[int]
    ids: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    bad: Sequence[BadRow]
    digest: str

    @property
    def bytes(self) -> int:
        """Roughly the memory it takes."""
        if isinstance(self.encoded, _Again):
            return 0
        return sum(row.bytes + _BYTES_A_ROW for row in self.encoded if isinstance(row, Encoded))


@dataclass(frozen=True)
class Sample:
    """Rows spread over the data: encoded, with their lengths; how many were read, and which of them are bad."""

    encoded: Sequence[Any]
    lengths: Sequence[int]
    read: int
    bad: tuple[BadRow, ...]

    @property
    def tokens_a_row(self) -> float:
        """Mean tokens of a row that can be used."""
        return sum(self.lengths) / max(1, len(self.lengths))


class PartReader:
    """Reads parts of one run's data; the first is kept, and with ``keep`` as many as memory is kept for.

    ``tell`` hears of each bad row that is left out.
    """

    def __init__(
        self,
        examples: Any,
        task: Task,
        model: nn.Module,
        *,
        skip_bad: bool,
        keep: bool,
        tell: Callable[[BadRow], Any] = lambda row: None,
    ) -> None:
        self.examples, self.task, self.model, self.tell = examples, task, model, tell
        self.skip_bad, self.keep = skip_bad, keep
        self._parts: dict[int, Part] = {}
        self._kept_bytes = 0
        self._digests: dict[tuple[int, int], str] = {}

    @cached_property
    def ends(self) -> str:
        """A hash of the first and the last row, which tells data from other data without a pass over it."""
        return " ".join(self.digest(place, 1) for place in (0, len(self.examples) - 1) if len(self.examples))

    def read(self, start: int, count: int) -> Part:
        """Read and encode some rows.

        Raises:
            InputError: some cannot be used or, with ``skip_bad``, none of the data's first part can.
        """
        if start in self._parts:
            return self._parts[start]
        part = read_part(self.examples, start, count, self.task, self.model)
        if not self.skip_bad or (start == 0 and not part.places):
            refuse_bad_rows(part.bad, count)
        for row in part.bad:
            self.tell(row)
        if not self._parts or (self.keep and self._kept_bytes < _KEPT_BYTES):
            self._parts[start] = part
            self._kept_bytes += part.bytes
        return part

    def digest(self, start: int, count: int) -> str:
        """Return the hash of some rows' content."""
        key = start, count
        if key not in self._digests:
            self._digests[key] = digest_of(self.examples, start, count)
        return self._digests[key]


def read_part(examples: Any, start: int, count: int, task: Task, model: nn.Module) -> Part:
    """Read and encode some rows of the data, and see that the model takes them."""
    used, bad = _Used(examples), list[BadRow]()
    ids = [str(place) for place in range(start, start + count)]
    columns: dict[str, list[Any]] = {}
    hashed = hashlib.sha256()
    for place, example in enumerate(rows_or_errors(examples, start, start + count), start):
        for part in (content := _content(example)):
            hashed.update(part)
        try:
            row, length = _encoded(example, task, model)
            id_, metadata = _storable(example)
        except InputError as error:
            stands = where(examples, place)
            bad.append(BadRow(place, stands, error.came.removeprefix(f"{stands}: "), error.wanted, error.fix))
            continue
        used.add(place, row, length, sum(map(len, content)) if row is example else 0)
        if id_ is not None:
            ids[place - start] = id_
        for name, value in metadata.items():
            columns.setdefault(name, [None] * count)[place - start] = value
    return Part(start, count, used.places, used.rows, used.lengths, ids, columns, bad, hashed.hexdigest()[:16])


class _Used:
    """The rows of a part that can be used, in full or, where those would take too much memory, by their places."""

    def __init__(self, examples: Any) -> None:
        self.places, self.lengths = list[int](), list[int]()
        self._examples, self._held, self._raw_bytes = examples, list[Any](), 0
        self._are_held = self._are_alike = True

    def add(self, place: int, row: Any, length: int, raw_bytes: int) -> None:
        """Add a row, of so many bytes if the task takes it as it is."""
        self.places.append(place)
        self.lengths.append(length)
        self._raw_bytes += raw_bytes
        self._are_alike = self._are_alike and length == self.lengths[0]
        if self._raw_bytes > _RAW_BYTES and self._are_alike:  # batches of like length come from all over a part
            self._are_held = False
            self._held.clear()
        if self._are_held:
            self._held.append(row)

    @property
    def rows(self) -> Sequence[Any]:
        """The rows as batches are made of them."""
        return self._held if self._are_held else _Again(self._examples, self.places)


class _Again(Sequence[Any]):
    """Rows of the data, each read when asked for."""

    def __init__(self, examples: Any, places: Sequence[int]) -> None:
        self._examples, self._places = examples, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        place = self._places[i]
        (row,) = rows_or_errors(self._examples, place, place + 1)
        return sound(row)


def digest_of(examples: Any, start: int, count: int) -> str:
    """Return the hash of some rows' content, as ``read_part`` finds it; nothing is encoded."""
    hashed = hashlib.sha256()
    for example in rows_or_errors(examples, start, start + count):
        for part in _content(example):
            hashed.update(part)
    return hashed.hexdigest()[:16]


def sample(examples: Any, task: Task, model: nn.Module, *, stretches: int = _STRETCHES) -> Sample:
    """Read rows spread over the data: so many stretches of 32, or all of it where it has fewer."""
    total = len(examples)
    step = max(_STRETCH_ROWS, -(-total // stretches))
    parts = [
        read_part(examples, start, min(_STRETCH_ROWS, total - start), task, model) for start in range(0, total, step)
    ]
    return Sample(
        [row for part in parts for row in part.encoded],
        [length for part in parts for length in part.lengths],
        sum(part.count for part in parts),
        tuple(row for part in parts for row in part.bad),
    )


def refuse_bad_rows(bad: Sequence[BadRow], total: int) -> None:
    """Stop where rows cannot be used.

    Raises:
        InputError: with the place and reason of the first few.
    """
    if bad:
        shown = "; ".join(f"{row.where} ({row.reason})" for row in bad[:_BAD_ROWS_SHOWN])
        more = f" and {len(bad) - _BAD_ROWS_SHOWN} more" if len(bad) > _BAD_ROWS_SHOWN else ""
        fixes = {row.fix for row in bad}
        # Where no row can be used, and all for one reason, the rows are not what is wrong.
        every = fixes.pop() if len(fixes) == 1 else "Repair them"
        raise InputError(
            f"{len(bad)} of {total} rows that cannot be used: {shown}{more}",
            "; ".join(dict.fromkeys(row.wanted for row in bad[:_BAD_ROWS_SHOWN])),
            "Repair them, or leave them out with skip_bad=True" if len(bad) < total else every,
        )


def _content(example: Any) -> list[bytes]:
    try:
        return list(canonical(str(example) if isinstance(example, InputError) else example))
    except (ValueError, RecursionError):  # lists within lists without end: a bad row, whatever else it holds
        return [b"!"]


def _encoded(example: Any, task: Task, model: nn.Module) -> tuple[Any, int]:
    row = task.read(sound(example))
    if isinstance(row, Encoded):
        task.check(model, row)
    return row, task.length(row)


def _storable(example: Any) -> tuple[str | None, dict[str, Any]]:
    """Return an example's id and metadata, which a shard must be able to hold."""
    try:
        id_, metadata = fields(example)
        json.dumps([id_, metadata], ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:  # half of a surrogate pair; lists within lists without end
        raise InputError(
            f"a value that cannot be stored ({type(error).__name__}: {str(error)[:200]})",
            "metadata in UTF-8, nested less deep",
            "Repair or drop it",
        ) from error
    return id_, metadata
