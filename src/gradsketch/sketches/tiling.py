"""Kronecker-structured sketching of one matrix-shaped parameter, by its factors or by its entries."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from gradsketch.random import Stream
from gradsketch.sketches.forms import power_of_two_at_least

__all__ = ["Block", "Tiling"]

# Coordinates of a side that are computed, at most, unless d asks for more. More coordinates mean less noise on
# low-rank gradients, at a cost that grows in proportion.
_COORDINATES = 256
# Up to so many coordinates come from a product with a ±1 matrix, more from a whole fast transform.
_DENSE = 512


class Block(ABC):
    """A sketch of one matrix-shaped parameter that adds its numbers to a sum."""

    @abstractmethod
    def add_matrix(self, out: Float[Tensor, "b d"], x: Float[Tensor, "b rows columns"]) -> None:
        """Add the sketches of matrices given by their entries."""

    @abstractmethod
    def adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b rows columns"]:
        """Apply the adjoint of ``add_matrix``."""

    def add_outer(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]
    ) -> None:
        """Add the sketches of Σ_t left_t right_tᵀ."""
        self.add_matrix(out, left.mT @ right)

    @abstractmethod
    def add_rows(
        self, out: Float[Tensor, "b d"], index: Int64[Tensor, "b t"], right: Float[Tensor, "b t columns"]
    ) -> None:
        """Add the sketches of matrices whose row ``index_t`` gets ``right_t``."""


@dataclass(frozen=True)
class Side:
    """One side's transform: the first ``count`` of the randomly ordered coordinates of √n'·H B x, n' = padded size."""

    size: int
    count: int
    stream: Stream

    @cached_property
    def padded(self) -> int:
        return power_of_two_at_least(self.size)

    @cached_property
    def chosen(self) -> Int64[Tensor, " count"]:
        return self.stream.child("order").permutation(self.padded)[: self.count]

    def transform(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch count"]:
        """Return the chosen coordinates, in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.count <= _DENSE:
            return x @ self.rows(torch.arange(self.size), x)
        return _hadamard(functional.pad(x * self._signs(x), (0, self.padded - self.size)))[..., self.chosen]

    def adjoint(self, y: Float[Tensor, "*batch count"]) -> Float[Tensor, "*batch size"]:
        """Apply the adjoint of ``transform``."""
        if self.count <= _DENSE:
            return y @ self.rows(torch.arange(self.size), y).T
        full = y.new_zeros(*y.shape[:-1], self.padded)
        full[..., self.chosen] = y
        return _hadamard(full)[..., : self.size] * self._signs(y)

    def rows(self, index: Int64[Tensor, "*batch"], like: Tensor) -> Float[Tensor, "*batch count"]:
        """Return the transforms of one-hot vectors."""
        bits = index[..., None] & self.chosen.to(index.device)
        for shift in (16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        signs = self._signs(like)[index.to(like.device)]
        return (1 - 2 * (bits & 1)).to(signs) * signs[..., None]

    def _signs(self, like: Tensor) -> Float[Tensor, " size"]:
        return self.stream.child("signs").signs(0, self.size, dtype=like.dtype, device=like.device)


class Tiling(Block):
    """d coordinates of an isometric image of a matrix X: tiles of X̂ = (H B_r) X (H B_c)ᵀ, scaled by √(r'·c'/d).

    The randomly ordered coordinates of each side are split in groups; round k pairs group j of the rows with group
    j + k of the columns, so that every row and column of X̂ is used equally often, and the tiles are written one after
    the other. A prefix of the tiles is a valid smaller sketch. Where d ≥ r'·c' every entry is kept, spread evenly
    over the d numbers from a random start: an isometry.

    ``of`` is the size the layout was chosen for, d unless this is the prefix of a larger sketch.
    """

    def __init__(self, rows: int, columns: int, d: int, stream: Stream, of: int | None = None) -> None:
        self.rows, self.columns, self.d, self.of = rows, columns, d, of or d
        self.keeps_all = power_of_two_at_least(rows) * power_of_two_at_least(columns) <= self.of
        row_count, column_count = _counts(power_of_two_at_least(rows), power_of_two_at_least(columns), self.of)
        self.tile = _tile(row_count, column_count, self.of)
        tiles = -(-self.of // math.prod(self.tile))
        row_count, column_count = min(row_count, tiles * self.tile[0]), min(column_count, tiles * self.tile[1])
        self.row_side = Side(rows, row_count, stream.child("rows"))
        self.column_side = Side(columns, column_count, stream.child("columns"))
        self.stream = stream

    @cached_property
    def place(self) -> Int64[Tensor, " kept"]:
        """Flat place in the row-major matrix of computed coordinates, for each number of the sketch in tile order."""
        row_count, column_count = self.row_side.count, self.column_side.count
        tile_rows, tile_columns = self.tile
        row_groups, column_groups = row_count // tile_rows, column_count // tile_columns
        groups = max(row_groups, column_groups)
        kept = min(self.of, row_count * column_count)
        tile = torch.arange(-(-kept // (tile_rows * tile_columns)))
        row_group, column_group = tile % row_groups, tile % column_groups
        if row_groups >= column_groups:
            column_group = (tile + tile // groups) % column_groups
        else:
            row_group = (tile + tile // groups) % row_groups
        p = row_group[:, None, None] * tile_rows + torch.arange(tile_rows)[:, None]
        q = column_group[:, None, None] * tile_columns + torch.arange(tile_columns)
        return (p * column_count + q).reshape(-1)[:kept]

    @cached_property
    def target(self) -> Int64[Tensor, " kept"] | None:
        """Where each kept number goes, for a matrix with fewer entries than the sketch has room for."""
        kept = len(self.place)
        if kept == self.of:
            return None
        start = int(self.stream.child("start").integers(0, 1, self.of))
        return (start + torch.arange(kept) * (self.of // kept)) % self.of

    @property
    def scale(self) -> float:
        """Factor that makes the kept coordinates, entries of √(r'·c')·X̂, an unbiased sketch."""
        padded = self.row_side.padded * self.column_side.padded
        return math.sqrt((self.of / padded if self.keeps_all else 1.0) / self.d)

    def add_coordinates(self, out: Float[Tensor, "b d"], image: Float[Tensor, "b row_count column_count"]) -> None:
        """Add the sketch given all computed coordinates of the image."""
        numbers = image.flatten(1)[:, self.place.to(image.device)].mul_(self.scale)
        if self.target is None:
            out += numbers[:, : self.d].to(out.dtype)
            return
        target = self.target.to(out.device)
        inside = target < self.d
        out.index_add_(1, target[inside], numbers[:, inside].to(out.dtype))

    def add_matrix(self, out: Float[Tensor, "b d"], x: Float[Tensor, "b rows columns"]) -> None:
        half = self.column_side.transform(x)
        self.add_coordinates(out, self.row_side.transform(half.mT).mT)

    def add_outer(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]
    ) -> None:
        self.add_coordinates(out, self.row_side.transform(left).mT @ self.column_side.transform(right))

    def add_rows(
        self, out: Float[Tensor, "b d"], index: Int64[Tensor, "b t"], right: Float[Tensor, "b t columns"]
    ) -> None:
        right = self.column_side.transform(right)
        self.add_coordinates(out, self.row_side.rows(index, right).mT @ right)

    def adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b rows columns"]:
        if self.d < self.of:
            w = functional.pad(w, (0, self.of - self.d))
        numbers = w if self.target is None else w[:, self.target.to(w.device)]
        image = w.new_zeros(len(w), self.row_side.count * self.column_side.count)
        image[:, self.place.to(w.device)] = numbers * self.scale
        image = image.view(len(w), self.row_side.count, self.column_side.count)
        return self.row_side.adjoint(self.column_side.adjoint(image).mT).mT


def _counts(padded_rows: int, padded_columns: int, d: int) -> tuple[int, int]:
    """Coordinates to compute on each side: at most ``_COORDINATES``, but enough for d distinct pairs."""
    rows, columns = min(padded_rows, _COORDINATES), min(padded_columns, _COORDINATES)
    while rows * columns < min(d, padded_rows * padded_columns):
        if columns == padded_columns or (rows < padded_rows and rows <= columns):
            rows *= 2
        else:
            columns *= 2
    return rows, columns


def _tile(row_count: int, column_count: int, d: int) -> tuple[int, int]:
    """Tile shape with which one round of tiles gives about d numbers and uses every coordinate equally often."""
    if d >= row_count * column_count:
        return min(row_count, 16), min(column_count, 16)
    columns = power_of_two_at_least(-(-d // row_count))
    rows = power_of_two_at_least(-(-d // column_count))
    return min(rows, row_count), min(columns, column_count)


def _hadamard(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Return √n·H x."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        x = x.reshape(*shape[:-1], -1, 2, half)
        x = torch.stack([x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]], -2)
        half *= 2
    return x.reshape(shape)
