"""A sketch store: one folder, one ``index.json``, and one immutable shard per range of rows.

The listing of shards, named by their row range, is the commit log. So there is no journal, no lock and no manifest to
rewrite, and several writers or a kill -9 can at worst leave a temporary file (tests/store/test_kills.py). A shard is 16
MB of sketches or a twentieth of the run, so a killed run loses at most that. A query lists the folder once, and
moments, preconditioner and scan take their rows from that listing, because a builder may write meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradsketch.errors import DamageError, InputError, StoreError
from gradsketch.store.encoding import row_bytes
from gradsketch.store.folder import Folder, open_folder
from gradsketch.store.manifest import MANIFEST_NAME, Manifest, parse_shard_name, shard_name
from gradsketch.store.shard import Rows, Shard, encode_shard, open_shard, require_sound

__all__ = ["Store", "default_shard_rows"]

_SHARD_BYTES = 16 << 20
_SHARDS_AT_LEAST = 20
_ROWS_AT_LEAST = 64


def default_shard_rows(rows: int, d: int, dtype: str) -> int:
    """Return rows a shard: 16 MB of sketches, or a twentieth of all rows if that is less (but at least 64).

    A run that is killed loses at most the shard it was working on.
    """
    by_bytes = max(1, _SHARD_BYTES // row_bytes(d, dtype))
    return min(by_bytes, max(_ROWS_AT_LEAST, -(-rows // _SHARDS_AT_LEAST)))


class Store:
    """A folder of sketches, open for reading and for writing missing shards.

    The listing of the folder is the commit log: a shard is written under a temporary name, flushed to disk, renamed,
    and the folder is flushed. So any number of processes may write at once and any of them may be killed at any
    moment; writing a shard again replaces it by the same rows.

    Example:
        >>> import tempfile
        >>> store = Store.create(tempfile.mkdtemp(), Manifest(d=4, rows=2, shard_rows=64))
        >>> store.write(0, Rows(["a", "b"], torch.ones(2, 4), torch.zeros(2), {}))
        >>> [shard.column("id") for shard in store], store.missing()
        ([['a', 'b']], [])
    """

    def __init__(self, folder: Folder, manifest: Manifest, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        self.folder, self.manifest, self._ranges = folder, manifest, ranges

    @classmethod
    def create(cls, path: str | Path | Folder, manifest: Manifest) -> Store:
        """Create a store, or open the one that is there if it was made alike.

        Raises:
            FingerprintError: there is a store made of something else; nothing is changed.
            StoreError: the folder cannot be written.
        """
        folder = path if isinstance(path, Folder) else open_folder(path)
        text, store = manifest.to_json().encode(), cls(folder, manifest)
        # What is there is read first, because a finished store may lie where nothing can be written.
        if folder.has(MANIFEST_NAME) or not folder.write(MANIFEST_NAME, text, replace=False):
            try:
                manifest.require_same(cls.open(folder).manifest, folder.uri)
            except DamageError:
                if store.damaged() == store.ranges():  # no shard says that the file is this store's
                    raise
                folder.write(MANIFEST_NAME, text)
        folder.clean()
        return store

    @classmethod
    def open(cls, path: str | Path | Folder) -> Store:
        """Open a store.

        Raises:
            StoreError: there is none, or its ``index.json`` is damaged.
        """
        folder = path if isinstance(path, Folder) else open_folder(path)
        if not folder.has(MANIFEST_NAME):
            raise StoreError(
                f"{folder.uri} holds no {MANIFEST_NAME}", "the folder of an index", "Check the path, or build the index"
            )
        text = folder.read(MANIFEST_NAME).to_pybytes().decode("utf-8", errors="replace")
        return cls(folder, Manifest.from_json(text, f"{folder.uri}/{MANIFEST_NAME}"))

    @property
    def d(self) -> int:
        """Length of a sketch."""
        return self.manifest.d

    @property
    def rows(self) -> int:
        """Rows a complete store has."""
        return self.manifest.rows

    def snapshot(self, ranges: Sequence[tuple[int, int]] | None = None) -> Store:
        """Return the store with the shards that are there now, or some of them; what others write later is not in it.

        Whoever reads the rows more than once needs this, so that each pass sees the same rows.
        """
        return Store(self.folder, self.manifest, self.ranges() if ranges is None else ranges)

    def ranges(self) -> list[tuple[int, int]]:
        """Return (start, count) of the shards that are there, in order.

        Raises:
            StoreError: a shard that this store cannot have.
        """
        if self._ranges is not None:
            return list(self._ranges)
        found = [parse_shard_name(name) for name in self.folder.names()]
        present = {r for r in found if r is not None}
        foreign = {r for r in present if not self.manifest.has_shard(*r)}
        if foreign:
            raise StoreError(
                f"{self.folder.uri} holds {shard_name(*min(foreign))}",
                f"shards of {self.manifest.shard_rows} of {self.rows} rows",
                "It belongs to another index: move it away",
            )
        return sorted(present)

    def missing(self) -> list[tuple[int, int]]:
        """Return (start, count) of the shards still to be written."""
        present = set(self.ranges())
        return [r for r in self.manifest.shard_ranges() if r not in present]

    @property
    def rows_missing(self) -> int:
        """Rows still to be written."""
        return self.rows - sum(count for _, count in self.ranges())

    def damaged(self) -> list[tuple[int, int]]:
        """Return (start, count) of the shards whose bytes are not those that were written.

        Raises:
            FingerprintError: a shard belongs to another store.
        """
        return [r for r in self.ranges() if not self.is_sound(*r)]

    def unfinished(self) -> list[tuple[int, int]]:
        """Return (start, count) of the shards to be written: those that are missing, and those that are damaged.

        Raises:
            FingerprintError: a shard belongs to another store.
        """
        return sorted([*self.missing(), *self.damaged()])

    def is_sound(self, start: int, count: int) -> bool:
        """Whether a shard is there, and holds the bytes that were written.

        Raises:
            FingerprintError: it belongs to another store.
        """
        try:
            self.shard(start, count)
        except StoreError:
            return False
        return True

    def write(self, start: int, rows: Rows) -> None:
        """Write the shard that begins at row ``start``, durably.

        Raises:
            InputError: the rows are not those of one shard.
            NonFiniteError: a sketch holds a NaN or an infinity.
            StoreError: no room, no permission; earlier shards are unharmed.
        """
        count = len(rows.ids)
        if not self.manifest.has_shard(start, count):
            raise InputError(
                f"{count} rows from row {start}",
                f"one whole shard: {self.manifest.shard_rows} rows from a multiple of that",
                "Take the ranges from missing()",
            )
        self.folder.write(shard_name(start, count), encode_shard(rows, start, self.manifest))

    def shard(self, start: int, count: int, *, whole: bool = False) -> Shard:
        """Open one shard, memory-mapped; ``whole`` says that all of it is about to be used.

        Raises:
            DamageError: its bytes are not those that were written.
            FingerprintError: it belongs to another store.
        """
        name = shard_name(start, count)
        file = f"{self.folder.uri}/{name}"
        data = self.folder.read(name, whole=whole, check=lambda data: require_sound(data, file))
        return open_shard(data, file, start, count, self.manifest)

    def columns(self) -> dict[str, set[str]]:
        """Return the metadata columns, each with the kinds of values that shards hold in it."""
        found: dict[str, set[str]] = {}
        for start, count in self.ranges():
            for name, kind in self.shard(start, count).columns.items():
                found.setdefault(name, set()).add(kind)
        return found

    def left_out(self) -> dict[int, str]:
        """Return why rows have no sketch, by row."""
        shards = (self.shard(start, count) for start, count in self.ranges())
        return {shard.start + at: reason for shard in shards for at, reason in shard.left_out.items()}

    def __iter__(self) -> Iterator[Shard]:
        """Yield the shards in order, each opened when its turn comes."""
        for start, count in self.ranges():
            yield self.shard(start, count, whole=True)

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return id, loss, gradient_norm and metadata of some rows, in the order asked for."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        for shard, positions, places in self.by_shard(rows):
            for position, place in zip(positions, places, strict=True):
                found[position] = shard.record(place)
        return found

    def by_shard(self, rows: Sequence[int]) -> Iterator[tuple[Shard, list[int], list[int]]]:
        """Yield shards, with the positions in ``rows`` of the rows they hold, and the places of these in the shard."""
        found: dict[tuple[int, int], list[int]] = {}
        for position, row in enumerate(rows):
            found.setdefault(self.manifest.shard_at(row), []).append(position)
        for (start, count), positions in sorted(found.items()):
            yield self.shard(start, count), positions, [rows[position] - start for position in positions]

    def __repr__(self) -> str:
        return f"Store({self.folder.uri!r}, rows={self.rows}, d={self.d}, dtype={self.manifest.dtype!r})"
