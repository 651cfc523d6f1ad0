"""A sketch store: one folder, one ``index.json``, and one immutable shard per range of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradsketch.errors import InputError, StoreError
from gradsketch.store.encoding import bytes_per_entry
from gradsketch.store.folder import Folder, open_folder
from gradsketch.store.manifest import MANIFEST_NAME, Manifest, parse_shard_name, shard_name
from gradsketch.store.shard import Rows, Shard, encode_shard, open_shard

__all__ = ["Store", "default_shard_rows"]

_SHARD_BYTES = 16 << 20
_SHARDS_AT_LEAST = 20
_ROWS_AT_LEAST = 64


def default_shard_rows(rows: int, d: int, dtype: str) -> int:
    """Return rows a shard: 16 MB of sketches, or a twentieth of all rows if that is less (but at least 64).

    A run that is killed loses at most the shard it was working on.
    """
    by_bytes = max(1, _SHARD_BYTES // (d * bytes_per_entry(dtype)))
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

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def create(cls, path: str | Path | Folder, manifest: Manifest) -> Store:
        """Create a store, or open the one that is there if it was made alike.

        Raises:
            FingerprintError: there is a store made of something else; nothing is changed.
            StoreError: the folder cannot be written.
        """
        folder = path if isinstance(path, Folder) else open_folder(path)
        if not folder.write(MANIFEST_NAME, manifest.to_json().encode(), replace=False):
            store = cls.open(folder)
            manifest.require_same(store.manifest, folder.uri)
        folder.clean()
        return cls(folder, manifest)

    @classmethod
    def open(cls, path: str | Path | Folder) -> Store:
        """Open a store.

        Raises:
            StoreError: there is none, or its ``index.json`` is damaged.
        """
        folder = path if isinstance(path, Folder) else open_folder(path)
        if MANIFEST_NAME not in folder.names():
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

    def ranges(self) -> list[tuple[int, int]]:
        """Return (start, count) of the shards that are there, in order.

        Raises:
            StoreError: a shard that this store cannot have.
        """
        found = [parse_shard_name(name) for name in self.folder.names()]
        present = {r for r in found if r is not None}
        foreign = present.difference(self.manifest.shard_ranges())
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

    def write(self, start: int, rows: Rows) -> None:
        """Write the shard that begins at row ``start``, durably.

        Raises:
            InputError: the rows are not those of one shard.
            NonFiniteError: a sketch holds a NaN or an infinity.
            StoreError: no room, no permission; earlier shards are unharmed.
        """
        count = len(rows.ids)
        if (start, count) not in set(self.manifest.shard_ranges()):
            raise InputError(
                f"{count} rows from row {start}",
                f"one whole shard: {self.manifest.shard_rows} rows from a multiple of that",
                "Take the ranges from missing()",
            )
        self.folder.write(shard_name(start, count), encode_shard(rows, start, self.manifest))

    def shard(self, start: int, count: int, *, whole: bool = False) -> Shard:
        """Open one shard, memory-mapped; ``whole`` says that all of it is about to be used."""
        name = shard_name(start, count)
        return open_shard(self.folder.read(name, whole=whole), f"{self.folder.uri}/{name}", start, count, self.manifest)

    def __iter__(self) -> Iterator[Shard]:
        """Yield the shards in order, each opened when its turn comes."""
        for start, count in self.ranges():
            yield self.shard(start, count, whole=True)

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return id, loss, gradient_norm and metadata of some rows, in the order asked for."""
        found: dict[int, dict[str, Any]] = {}
        size = self.manifest.shard_rows
        for start in sorted({row // size * size for row in rows}):
            shard = self.shard(start, min(size, self.rows - start))
            found |= {row: shard.record(row - start) for row in rows if start <= row < start + shard.count}
        return [found[row] for row in rows]

    def __repr__(self) -> str:
        return f"Store({self.folder.uri!r}, rows={self.rows}, d={self.d}, dtype={self.manifest.dtype!r})"
