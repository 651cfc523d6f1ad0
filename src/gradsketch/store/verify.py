"""Read every byte of a store and name what is damaged or missing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gradsketch.errors import StoreError
from gradsketch.store.manifest import MANIFEST_NAME, parse_shard_name
from gradsketch.store.shard import damage
from gradsketch.store.store import Store
from gradsketch.table import printable

__all__ = ["Damage", "Verification", "verify"]


@dataclass(frozen=True)
class Damage:
    """One damaged place: the file, its row range (0 rows where it holds none), and which part of it."""

    file: str
    start: int
    count: int
    where: str

    def __str__(self) -> str:
        return printable(f"{self.file}: damaged in {self.where}")


@dataclass(frozen=True)
class Verification:
    """What verifying found.

    Rows and shards read, damaged places, ranges of rows not written yet, shards of another store, which every reader
    refuses, and other files that do not belong, which every reader passes over.
    """

    store: str
    rows: int
    rows_expected: int
    shards: int
    damaged: tuple[Damage, ...]
    missing: tuple[tuple[int, int], ...]
    foreign: tuple[str, ...]
    strangers: tuple[str, ...]
    bytes_read: int
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether every row is there, every byte is as written, and no shard of another store lies among them."""
        return not (self.damaged or self.missing or self.foreign)

    def __str__(self) -> str:
        speed = f"{self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s"
        lines = [f"{printable(self.store)}: {self.rows} of {self.rows_expected} rows in {self.shards} shards, {speed}"]
        lines += [str(d) for d in self.damaged]
        if self.missing:
            rows = sum(count for _, count in self.missing)
            lines.append(f"{rows} rows not written yet: run the same build command again to go on")
        lines += [printable(f"{name}: a shard of another index: move it away") for name in self.foreign]
        lines += [printable(f"{name}: not a file of this index") for name in self.strangers]
        return "\n".join([*lines, "sound" if self.sound else "NOT SOUND"])


def verify(store: Store) -> Verification:
    """Check every shard against its checksums, its name and the store's fingerprint.

    Raises:
        StoreError: the folder cannot be read at all.
    """
    began = time.perf_counter()
    found: list[Damage] = []
    present: list[tuple[int, int]] = []
    foreign, strangers, size = [], [], 0
    for name in store.folder.names():
        part = parse_shard_name(name)
        if part is None:
            strangers += [] if name == MANIFEST_NAME else [name]
        elif not store.manifest.has_shard(*part):
            foreign.append(name)
        else:
            present.append(part)
            file = f"{store.folder.uri}/{name}"
            try:
                data = store.folder.read(name)
                size += data.size
                places = damage(data, file, *part, store.manifest)
            except StoreError as error:
                places = [f"the whole file ({error.came})"]
            found += [Damage(file, *part, place) for place in places]
    return Verification(
        store.folder.uri,
        sum(count for _, count in present),
        store.rows,
        len(present),
        tuple(found),
        tuple(_gaps(present, store.rows)),
        tuple(foreign),
        tuple(strangers),
        size,
        time.perf_counter() - began,
    )


def _gaps(present: Iterable[tuple[int, int]], rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of the rows between the shards that are there."""
    end = 0
    for start, count in (*sorted(present), (rows, 0)):
        if start > end:
            yield end, start - end
        end = start + count
