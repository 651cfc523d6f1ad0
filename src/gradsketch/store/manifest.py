"""What a store holds and what it was made of: the contents of ``index.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from gradsketch.durable import require_same
from gradsketch.errors import DamageError, InputError, StoreError
from gradsketch.store.encoding import DTYPES

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "Manifest", "parse_shard_name"]

FORMAT_VERSION = 2
MANIFEST_NAME = "index.json"

# What Arrow's lists and the names of shards can hold.
_MOST_D, _MOST_ROWS = 2**31 - 1, 10**12
_SHARD_NAME = re.compile(r"part-([0-9]{12})-([0-9]{6,12})\.arrow")


@dataclass(frozen=True)
class Manifest:
    """The fixed facts of a store: length and dtype of a sketch, rows in all, rows a shard.

    ``facts`` says what the sketches were made of (model, task, sketch, parameters, data), as plain JSON values; two
    manifests with equal fingerprints describe interchangeable stores.

    Raises:
        InputError: a number out of range, or an unknown dtype.
    """

    d: int
    rows: int
    shard_rows: int
    dtype: str = "float16"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least, most in (("d", 1, _MOST_D), ("rows", 0, _MOST_ROWS), ("shard_rows", 1, _MOST_ROWS)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"{name}={value}", f"from {least} to {most}", f"Pass another {name}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r}", f"one of {', '.join(DTYPES)}", 'Pass dtype="float16"')

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every field; it stands in each shard."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def has_shard(self, start: int, count: int) -> bool:
        """Whether a complete store has a shard of ``count`` rows from row ``start``."""
        return 0 <= start < self.rows and start % self.shard_rows == 0 and count == self.shard_at(start)[1]

    def shard_at(self, row: int) -> tuple[int, int]:
        """Return (start, count) of the shard that holds a row."""
        start = row - row % self.shard_rows
        return start, min(self.shard_rows, self.rows - start)

    def shard_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (start, count) of every shard a complete store has."""
        for start in range(0, self.rows, self.shard_rows):
            yield self.shard_at(start)

    def to_json(self) -> str:
        """Return the text of ``index.json``."""
        body = {
            "format": "gradsketch-store",
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            **asdict(self),
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read the text of ``index.json``.

        Raises:
            StoreError: not a store, a newer format, or text that no longer matches its own fingerprint.
        """
        try:
            body = json.loads(text)
            version = body["version"] if body["format"] == "gradsketch-store" else None
            fields = {name: body[name] for name in ("d", "rows", "shard_rows", "dtype", "facts")}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(source, f"is not a store's {MANIFEST_NAME} ({type(error).__name__}: {error})") from error
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{source} has format version {version}",
                f"version {FORMAT_VERSION}",
                "Install the gradsketch that wrote it, or build the index again",
            )
        try:
            manifest = cls(**fields)
            same = manifest.fingerprint == body.get("fingerprint")
        except (InputError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(source, f"describes no store ({error})") from error
        if not same:
            raise _unreadable(source, "was changed after it was written: its fingerprint does not match")
        return manifest

    def require_same(self, other: Manifest, source: str) -> None:
        """Check that a run with this manifest may go on with the store that has ``other``.

        Raises:
            FingerprintError: naming every field and fact that differs.
        """
        here, there = asdict(self), asdict(other)
        require_same({**here.pop("facts"), **here}, {**there.pop("facts"), **there}, source)


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """Return (start, count) of a shard's file name, or None for any other file."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None:
        return None
    start, count = int(match[1]), int(match[2])
    return (start, count) if shard_name(start, count) == name else None


def shard_name(start: int, count: int) -> str:
    """Return the file name of the shard with rows ``start … start+count-1``."""
    return f"part-{start:012d}-{count:06d}.arrow"


def _unreadable(source: str, what: str) -> DamageError:
    fix = "Run the command that built the index again, which writes this file anew, or restore it from a copy"
    return DamageError(f"{source} {what}", "an index written by gradsketch", fix)
