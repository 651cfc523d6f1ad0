"""What (F + λI)⁻¹ takes from all rows of a store, whatever λ is: computed in one pass, and kept beside the store.

The file is written whole or not at all, so that a kill or another process at the same work can do no harm. It is used
only where the store is complete, is the very store it was made from (by fingerprint) and the bytes are sound (CRC-32);
otherwise the rows are read again.

One product over all rows takes nearly all of the time (5.9 s for 20,000 rows of d = 4096, 0.5 s once it is kept) and
does not depend on λ, so F is fitted once an index and a query only factors it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gradsketch.attribution.passes import SHARDS_A_SUM, Each, Part, here, parts_of
from gradsketch.durable import checksum, damaged
from gradsketch.errors import StoreError
from gradsketch.gradients.fingerprints import digest
from gradsketch.random import Stream
from gradsketch.store import Shard, Store
from gradsketch.store.folder import Folder
from gradsketch.store.layout import require_plain
from gradsketch.store.shard import UNREADABLE

__all__ = ["Moments", "RowMatrix", "damaged_moments", "moments_of"]

_FOLDER, _FORMAT, _HEADER = "moments", 3, b"gradsketch"
# Multiplications from which the pass over the rows takes longer than writing its outcome down.
_WORTH_KEEPING = 1 << 34


@dataclass(frozen=True)
class Moments:
    """Second moments of N rows: F = XᵀX / N ("primal"), XXᵀ ("dual"), or F's leading eigenpairs ("low rank").

    ``squared_norm`` is ‖X‖². Matrices are rounded to float32 when they are complete, kept or not, so that a query gives
    the same bits whichever process computed them.
    """

    method: str
    rows: int
    squared_norm: float
    matrices: tuple[Tensor, ...] = ()


class RowMatrix:
    """The usable rows of a store as a matrix X [N, d] that is streamed, never held."""

    def __init__(self, store: Store, unit_length: bool, each: Each = here) -> None:
        self.store, self.unit_length, self.count, self.squared_norm = store, unit_length, 0, 0.0
        self.firsts: dict[int, int] = {}  # which row of X is a shard's first
        digests = []
        for facts in each(partial(_facts_of, store, unit_length), parts_of(store.ranges())):
            for start, digest_of_data, count, squared_norm in facts:
                self.firsts[start] = self.count
                self.count += count
                self.squared_norm += squared_norm
                digests.append(digest_of_data)
        self.digest = digest(digests)  # of the data behind the rows

    def blocks(self) -> Iterator[Float[Tensor, "rows d"]]:
        """Yield X piece by piece, in float32."""
        return _blocks_of(self.store, self.unit_length)

    def second_moment(self, each: Each = here) -> Float64[Tensor, "d d"]:
        """Return XᵀX / N."""
        return self._sum(each, _second_moment_of, (self.store.d, self.store.d)) / self.count

    def sample(self, most: int, each: Each = here) -> Float[Tensor, "rows d"]:
        """Return at most so many rows of X, spread evenly."""
        step = max(1, -(-self.count // most))
        parts = parts_of(self.store.ranges())
        kept = list(each(partial(_sample_of, self.store, self.unit_length, self.firsts, step), parts))
        return torch.cat(kept) if kept else torch.empty(0, self.store.d, dtype=torch.float32, device="cpu")

    def _sum(self, each: Each, of: Callable[..., Tensor], shape: tuple[int, int], *more: Any) -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64, device="cpu")
        parts = parts_of(self.store.ranges(), SHARDS_A_SUM)
        for part in each(partial(of, self.store, self.unit_length, *more), parts):
            total += part
        return total

    def gram(self) -> Float64[Tensor, "n n"]:
        """Return XXᵀ, block by block: two shards are held at a time."""
        out = torch.empty(self.count, self.count, dtype=torch.float64, device="cpu")
        row = 0
        for x in self.blocks():
            column = 0
            for y in self.blocks():
                if column > row:
                    break
                product = x @ y.T
                out[row : row + len(x), column : column + len(y)] = product
                out[column : column + len(y), row : row + len(x)] = product.T
                column += len(y)
            row += len(x)
        return out

    def eigenpairs(self, rank: int, each: Each = here) -> tuple[Float64[Tensor, "d r"], Float64[Tensor, " r"]]:
        """Return F's leading eigenvectors and eigenvalues, approximately, from one pass over the rows.

        Randomised Nyström approximation: Frangella, Tropp and Udell 2023, algorithm 2.1.
        """
        d = self.store.d
        normals = Stream(0, "nystrom").normals(0, d * rank, dtype=torch.float64).view(d, rank)
        test = torch.linalg.qr(normals).Q
        image = self._sum(each, _image_of, (d, rank), test.float(), self.count)
        # A shift of rounding size keeps the small Cholesky positive definite; it is taken off again.
        tiny = 1e-7 * float(image.norm())
        image += tiny * test
        inner = test.T @ image
        factor = torch.linalg.cholesky((inner + inner.T) / 2)
        half = torch.linalg.solve_triangular(factor, image.T, upper=False).T
        vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
        return vectors, (singular.square() - tiny).clamp_min(0)

    def times(self, v: Float64[Tensor, "m d"]) -> Float64[Tensor, "m n"]:
        """Return v Xᵀ."""
        return torch.cat([v @ x.double().T for x in self.blocks()], dim=1)

    def transposed_times(self, a: Float64[Tensor, "m n"]) -> Float64[Tensor, "m d"]:
        """Return a X."""
        out, at = a.new_zeros(len(a), self.store.d), 0
        for x in self.blocks():
            out += a[:, at : at + len(x)] @ x.double()
            at += len(x)
        return out


def _blocks_of(store: Store, unit_length: bool, part: Part | None = None) -> Iterator[Float[Tensor, "rows d"]]:
    return (_block_of(shard, unit_length) for shard in store.snapshot(part))


def _block_of(shard: Shard, unit_length: bool) -> Float[Tensor, "rows d"]:
    """Return a shard's part of X."""
    norm = shard.numbers("gradient_norm")
    usable = torch.isfinite(norm)
    x = shard.decoded(usable)
    return x / norm[usable].clamp_min(torch.finfo(torch.float32).tiny)[:, None] if unit_length else x


def _facts_of(store: Store, unit_length: bool, part: Part) -> list[tuple[int, str, int, float]]:
    """Return of each shard its first row, the hash of its data, its usable rows, and the square of their norm."""
    found = []
    for start, count in part:
        shard = store.shard(start, count)
        norms = shard.numbers("gradient_norm").double()
        norms = norms[torch.isfinite(norms)]
        squared = float((norms > 0).sum() if unit_length else norms.square().sum())
        found.append((start, shard.digest, len(norms), squared))
    return found


def _second_moment_of(store: Store, unit_length: bool, part: Part) -> Float64[Tensor, "d d"]:
    total = torch.zeros(store.d, store.d, dtype=torch.float64, device="cpu")
    for x in _blocks_of(store, unit_length, part):
        total += x.T @ x
    return total


def _image_of(
    store: Store, unit_length: bool, test: Float[Tensor, "d r"], count: int, part: Part
) -> Float64[Tensor, "d r"]:
    """Return a part's share of F times some vectors, of ``count`` rows in all."""
    total = torch.zeros(test.shape, dtype=torch.float64, device="cpu")
    for x in _blocks_of(store, unit_length, part):
        total += (x.T @ (x @ test)).double() / count
    return total


def _sample_of(
    store: Store, unit_length: bool, firsts: Mapping[int, int], step: int, part: Part
) -> Float[Tensor, "rows d"]:
    """Return every so many rows of X that a part holds."""
    blocks = ((firsts[shard.start], _block_of(shard, unit_length)) for shard in store.snapshot(part))
    return torch.cat([x[(-first) % step :: step] for first, x in blocks])


def moments_of(rows: RowMatrix, *, exact_size: int, rank: int, each: Each = here) -> Moments:
    """Return the second moments of the rows: what is kept beside the store, or one pass over it.

    Exact, in the smaller of the two spaces, where that is at most ``exact_size``; else ``rank`` eigenpairs.
    """
    store, size = rows.store, min(rows.count, rows.store.d)
    method = "low rank" if size > exact_size else "dual" if rows.count < store.d else "primal"
    rank = min(rank, size)
    width = rank if method == "low rank" else size
    worth = rows.count * store.d * width >= _WORTH_KEEPING and not store.rows_missing
    facts = {
        "format": _FORMAT,
        "fingerprint": store.manifest.fingerprint,
        "data": rows.digest,
        "unit_length": rows.unit_length,
        "method": method,
        "rows": rows.count,
        "width": width,
    }
    kept = _read(store, facts) if worth else None
    if kept is None:
        kept = tuple(matrix.float() for matrix in _computed(rows, method, rank, each))
        if worth:
            _write(store, facts, kept)
    return Moments(method, rows.count, rows.squared_norm, kept)


def _computed(rows: RowMatrix, method: str, rank: int, each: Each) -> tuple[Tensor, ...]:
    if method == "low rank":
        return rows.eigenpairs(rank, each)
    # A Gram matrix is of fewer rows than numbers a row, which are soon read.
    return (rows.gram() if method == "dual" else rows.second_moment(each),)


def _name(facts: Mapping[str, Any]) -> str:
    return f"{'unit' if facts['unit_length'] else 'plain'}-{facts['method'].replace(' ', '-')}.arrow"


def _write(store: Store, facts: Mapping[str, Any], matrices: tuple[Tensor, ...]) -> None:
    """Keep matrices for later queries; where the folder cannot be written, they are computed again."""
    values = np.concatenate([matrix.reshape(-1).numpy() for matrix in matrices])
    header = {"facts": dict(facts), "shapes": [list(m.shape) for m in matrices], "crc32": checksum(values.data)}
    schema = pa.schema([pa.field("value", pa.float32())], metadata={_HEADER: json.dumps(header).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(values)], schema=schema))
    folder = store.folder.child(_FOLDER)
    with suppress(StoreError):
        folder.clean()
        folder.write(_name(facts), sink.getvalue())


def _read(store: Store, facts: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
    """Return matrices that were kept, or None where there are none of these very facts, or not every byte is sound."""
    folder = store.folder.child(_FOLDER)
    try:
        if not folder.has(_name(facts)):
            return None
        header, matrices = _opened(folder, _name(facts))
    except StoreError:
        return None
    return matrices if header["facts"] == facts else None


def _opened(folder: Folder, name: str) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Return what a file says of itself, and its matrices.

    Raises:
        StoreError: it cannot be read, or not every byte is sound.
    """
    data = folder.read(name, whole=True)
    try:
        require_plain(data)
        reader = pa.ipc.open_file(data)
        header = json.loads(reader.schema.metadata[_HEADER])
        batch = reader.get_batch(0)
        batch.validate(full=True)
        values = batch.column("value").to_numpy()
        sound = isinstance(header["facts"], dict) and checksum(values.data) == header["crc32"]
        parts = torch.from_numpy(values.copy()).split([math.prod(shape) for shape in header["shapes"]])
        matrices = tuple(part.view(shape) for part, shape in zip(parts, header["shapes"], strict=True))
    except UNREADABLE as error:
        raise damaged(f"{folder.uri}/{name}", f"{type(error).__name__}: {error}") from error
    if not sound:
        raise damaged(f"{folder.uri}/{name}", "its checksum does not match")
    return header, matrices


def damaged_moments(store: Store) -> list[str]:
    """Return the files of kept moments that are damaged; a query makes such a file anew."""
    folder, found = store.folder.child(_FOLDER), []
    for name in folder.names():
        try:
            header, _ = _opened(folder, name)
            sound = header["facts"].get("fingerprint") == store.manifest.fingerprint
        except StoreError:
            sound = False
        found += [] if sound else [f"{folder.uri}/{name}"]
    return found
