"""Krylov vectors on disk, in one byte a number: too coarse to compute with, enough to keep new vectors orthogonal.

Rounding adds to the product of a stored vector with another their lengths times some 0.007/√n, where numbers are of
one size. Packed to half a byte it would be twenty times as much, and copies of eigenvalues come back.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.durable import checksum, damaged, failed
from gradsketch.errors import InputError, StoreError
from gradsketch.linear_map import LinearMap
from gradsketch.space import Space
from gradsketch.spectra.krylov import SketchedBasis
from gradsketch.store.encoding import encode
from gradsketch.transforms.precision import full_precision

__all__ = ["OrthogonalizedBasis", "StoredVectors", "check_scratch", "kept_file"]

# Numbers that share a scale: gradients of different tensors differ by orders of magnitude.
_BLOCK = 256
_SCALE_BYTES = 4
# Numbers of each row that are read at a time: so many that a read costs more than the call.
_PIECE, _PIECE_GPU = 1 << 20, 1 << 22
# Rows are taken in groups of so many bytes, which the system still has in memory when they are read a second time.
_GROUP_BYTES = 1 << 30


def check_scratch(folder: str | Path, vectors: int, space: Space) -> None:
    """Refuse a folder that cannot hold so many vectors.

    Raises:
        InputError: it is no folder, or the disk has less room.
    """
    if not Path(folder).is_dir():
        raise InputError(f"scratch={str(folder)!r}", "a folder that exists", f"Type mkdir -p {folder}")
    wanted, free = vectors * (space.most + _SCALE_BYTES * space.most // _BLOCK), shutil.disk_usage(folder).free
    if wanted > free:
        raise InputError(
            f"{free / 1e9:.1f} GB free in {folder} for up to {vectors} vectors of n = {space.n:,}",
            f"{wanted / 1e9:.1f} GB",
            "Lower steps=, name a folder on a larger disk, or leave scratch out",
        )


def _bytes(numbers: Tensor) -> memoryview:
    """Return the memory of a tensor."""
    flat: Any = numbers.view(-1).view(torch.int8).numpy()
    return memoryview(flat)


def _nameless(folder: str | Path) -> io.FileIO:
    return tempfile.TemporaryFile(buffering=0, dir=folder)


def _opened(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")


def kept_file(folder: str | Path, run: str | Path) -> Path:
    """Return where the vectors of a run lie that is kept in a file of its own, and may be taken up."""
    run = Path(run).resolve()
    return Path(folder) / f"{run.name}-{checksum(str(run).encode()):08x}.krylov"


class StoredVectors:
    """A file of vectors that grows by a vector at a time: of each its numbers, then the scales of their blocks.

    Without a path the file has no name either: the system takes it away with the process, however that ends.
    """

    def __init__(self, folder: str | Path, length: int, group: int, path: Path | None = None) -> None:
        self._blocks = -(-length // _BLOCK)
        self._width = self._blocks * _BLOCK
        self._group = group
        self._checksums: list[int] = []
        self.place = str(path or folder)
        try:
            # Unbuffered, for what is written is read again at once.
            self._file = _nameless(folder) if path is None else _opened(path)
        except OSError as error:
            raise failed("open", self.place, error) from error

    def __len__(self) -> int:
        return len(self._checksums)

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return len(self) * self._vector_bytes

    @property
    def _vector_bytes(self) -> int:
        return self._width + _SCALE_BYTES * self._blocks

    def append(self, vector: Float[Tensor, " m"]) -> None:
        """Write a vector.

        Raises:
            StoreError: the disk is full, or does not write.
        """
        scales, total = [], 0
        try:
            self._file.seek(self.bytes)
            for piece in vector.split(_PIECE_GPU):
                blocks = torch.nn.functional.pad(piece, (0, -len(piece) % _BLOCK)).view(-1, _BLOCK)
                numbers, scale = encode(blocks, "int8")
                total = self._write(numbers, total)
                scales.append(scale)
            self._checksums.append(self._write(torch.cat(scales), total))
        except OSError as error:
            raise failed("write", self.place, error) from error

    def _write(self, numbers: Tensor, total: int) -> int:
        """Write numbers, and return the checksum of all that was written."""
        data = rest = _bytes(numbers)
        while rest:
            rest = rest[self._file.write(rest) :]
        return checksum(data, total)

    def remove_from(self, w: Float[Tensor, " m"], space: Space) -> float:
        """Remove from w, in place, its components along the stored vectors, and return how long they were together.

        One group of vectors is removed after the other.
        """
        removed = 0.0
        count = len(self)
        groups = [range(first, min(first + self._group, count)) for first in range(0, count, self._group)]
        # In turn forwards and backwards: what was read last is still in memory.
        backwards = count % 2 == 0
        with full_precision(w.device):
            for rows in reversed(groups) if backwards else groups:
                overlaps = w.new_zeros(len(rows), dtype=torch.float64)
                for piece, vectors in self._pieces(rows, w):
                    overlaps += vectors.mv(piece)
                overlaps = space.ranks.sums(overlaps)
                removed += float(overlaps.square().sum())
                for piece, vectors in self._pieces(rows, w):
                    piece.addmv_(vectors.T, overlaps.to(w.dtype), alpha=-1.0)
        return math.sqrt(removed)

    def _pieces(self, rows: range, w: Float[Tensor, " m"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of w, and the numbers of the stored vectors there, in memory that the next ones take."""
        size = min(_PIECE if w.device.type == "cpu" else _PIECE_GPU, self._width)
        scales = torch.empty(len(rows), self._blocks, dtype=torch.float32, device="cpu")
        for target, row in zip(scales, rows, strict=True):
            self._read(target, row * self._vector_bytes + self._width)
        bytes_ = torch.empty(len(rows), size, dtype=torch.int8, device="cpu")
        numbers = torch.empty(len(rows), size // _BLOCK, _BLOCK, dtype=w.dtype, device=w.device)
        for start in range(0, len(w), size):
            piece = w[start : start + size]
            blocks = -(-len(piece) // _BLOCK)
            for target, row in zip(bytes_, rows, strict=True):
                self._read(target[: blocks * _BLOCK], row * self._vector_bytes + start)
            vectors = numbers[:, :blocks].copy_(bytes_[:, : blocks * _BLOCK].view(len(rows), blocks, _BLOCK))
            vectors.mul_(scales[:, start // _BLOCK :][:, :blocks, None].to(w))
            yield piece, vectors.flatten(1)[:, : len(piece)]

    def _read(self, target: Tensor, at: int) -> None:
        data = _bytes(target)
        try:
            self._file.seek(at)
            while data:
                count = self._file.readinto(data)
                if not count:
                    raise damaged(self.place, "it ends too soon")
                data = data[count:]
        except OSError as error:
            raise failed("read", self.place, error) from error

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` needs besides the file."""
        return {"checksums": list(self._checksums)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the vectors that the file holds since an earlier run.

        Raises:
            StoreError: they are not there, or are not those that were written.
        """
        self._checksums = list(state["checksums"])
        if self._file.seek(0, os.SEEK_END) < self.bytes:
            raise StoreError(
                f"{self.place} does not hold the {len(self)} vectors of the run",
                "the folder that the run was begun with",
                "Name that folder with scratch=, or delete the run's file to start again",
            )
        for place, wanted in enumerate(self._checksums):
            if self._checksum(place * self._vector_bytes) != wanted:
                raise damaged(self.place, f"vector {place} is not what was written")

    def _checksum(self, at: int) -> int:
        total = 0
        for start in range(0, self._vector_bytes, _PIECE_GPU):
            numbers = torch.empty(min(_PIECE_GPU, self._vector_bytes - start), dtype=torch.int8, device="cpu")
            self._read(numbers, at + start)
            total = checksum(_bytes(numbers), total)
        return total


class OrthogonalizedBasis(SketchedBasis):
    """Sketches of the Krylov vectors, and the vectors themselves in a file, to which new ones are made orthogonal.

    So hardly a product is spent on copies; the sketches tell those that there are. What is removed from a product is
    missing in T = QᵀHQ, so the longest such piece counts as an error of every eigenvalue: a bound, and a wide one.
    """

    def __init__(self, sketch: LinearMap, space: Space, folder: str | Path, path: Path | None = None) -> None:
        super().__init__(sketch, space)
        # As many on every rank, for they add up the products of a group.
        self.stored = StoredVectors(folder, space.size, max(1, _GROUP_BYTES // space.most), path)
        self._removed = 0.0

    @property
    def noise(self) -> float:
        return self._removed

    @property
    def disk_bytes(self) -> int:
        return self.stored.bytes

    def append(self, q: Float[Tensor, " n"]) -> None:
        super().append(q)
        self.stored.append(q)

    def orthogonalize(self, w: Float[Tensor, " n"]) -> None:
        self._removed = max(self._removed, self.stored.remove_from(w, self.space))

    def state(self) -> dict[str, Any]:
        return {**self.stored.state(), "removed": self._removed}

    def restore(self, state: dict[str, Any]) -> None:
        self.stored.restore(state)
        self._removed = state["removed"]
