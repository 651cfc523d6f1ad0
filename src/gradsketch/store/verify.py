"""Read every byte of a store and name what is damaged or missing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gradsketch.errors import StoreError
from gradsketch.store.manifest import MANIFEST_NAME, parse_shard_name
from gradsketch.store.shard import damage
from gradsketch.store.store import Store
from gradsketch.table import printable

__all__ = ["Damage", "Verification", "verify"]


@dataclass(frozen=True)
class Damage:
    """One damaged place: the file, its row range, and which part of it."""

    file: str
    start: int
    count: int
    where: str

    def __str__(self) -> str:
        return printable(f"{self.file}: damaged in {self.where}")


@dataclass(frozen=True)
class Verification:
    """What verifying found: rows and shards read, damaged places, ranges not written yet, files that do not belong."""

    store: str
    rows: int
    rows_expected: int
    shards: int
    damaged: tuple[Damage, ...]
    missing: tuple[tuple[int, int], ...]
    strangers: tuple[str, ...]
    bytes_read: int
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether every row is there and every byte is as written."""
        return not self.damaged and not self.missing

    def __str__(self) -> str:
        speed = f"{self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s"
        lines = [f"{printable(self.store)}: {self.rows} of {self.rows_expected} rows in {self.shards} shards, {speed}"]
        lines += [str(d) for d in self.damaged]
        if self.missing:
            rows = sum(count for _, count in self.missing)
            lines.append(f"{rows} rows not written yet: run the same build command again to go on")
        lines += [printable(f"{name}: not a file of this index") for name in self.strangers]
        return "\n".join([*lines, "sound" if self.sound else "NOT SOUND"])


def verify(store: Store) -> Verification:
    """Check every shard against its checksums, its name and the store's fingerprint.

    Raises:
        StoreError: the folder cannot be read at all.
    """
    began = time.perf_counter()
    wanted = set(store.manifest.shard_ranges())
    found: list[Damage] = []
    present: set[tuple[int, int]] = set()
    strangers, size = [], 0
    for name in store.folder.names():
        part = parse_shard_name(name)
        if part is None or part not in wanted:
            strangers += [] if name == MANIFEST_NAME else [name]
            continue
        present.add(part)
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
        tuple(sorted(wanted - present)),
        tuple(strangers),
        size,
        time.perf_counter() - began,
    )
