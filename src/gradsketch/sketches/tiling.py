"""Kronecker-structured sketching of one matrix-shaped parameter, by its factors or by its entries."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.random import Stream
from gradsketch.sketches.forms import power_of_two_at_least
from gradsketch.sketches.side import Side

__all__ = ["Block", "Tiling"]

# Coordinates of a side that are computed, at most, unless d asks for more. More coordinates mean less noise on
# low-rank gradients, at a cost that grows in proportion.
_COORDINATES = 256
# Keeping every pair of the computed coordinates would be one Kronecker product, whose noise is that of one side: three
# times a dense sketch's on a language model's gradients. Half of the pairs are as good as any.
_SPARE = 2


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


class Tiling(Block):
    """d coordinates of an isometric image of a matrix X: tiles of X̂ = (H B_r) X (H B_c)ᵀ, scaled by √(r'·c'/d).

    The computed coordinates of each side are split in groups, and tile j is group j of the rows times group j of the
    columns, so every computed coordinate is used equally often. A prefix of the tiles is a valid smaller sketch. Where
    d ≥ r'·c' every entry is kept, group j of the rows meeting group j + k of the columns in round k, spread evenly over
    the d numbers from a random start: an isometry.

    ``of`` is the size the layout was chosen for, d unless this is the prefix of a larger sketch.
    """

    def __init__(self, rows: int, columns: int, d: int, stream: Stream, layout_d: int | None = None) -> None:
        self.rows, self.columns, self.d, self.layout_d = rows, columns, d, layout_d or d
        self.stream = stream
        padded = power_of_two_at_least(rows), power_of_two_at_least(columns)
        self.keeps_all = math.prod(padded) <= self.layout_d
        counts = _counts(*padded, self.layout_d)
        self.tile = _tile(*counts, self.layout_d)
        # With all kept, the tiles of one round are as many as the groups; otherwise as many as d numbers need.
        self.tiles = -(-self.layout_d // math.prod(self.tile))
        self.row_side = Side(rows, min(counts[0], self.tiles * self.tile[0]), stream.child("rows"))
        self.column_side = Side(columns, min(counts[1], self.tiles * self.tile[1]), stream.child("columns"))
        self.scale = math.sqrt((self.layout_d / math.prod(padded) if self.keeps_all else 1.0) / d)

    def add_matrix(self, out: Float[Tensor, "b d"], x: Float[Tensor, "b rows columns"]) -> None:
        image = self.row_side.transform(self.column_side.transform(x).mT).mT
        self._add(out, image.flatten(1).index_select(1, self._places(x.device)))

    def add_outer(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]
    ) -> None:
        rows, columns, number = self._groups
        grouped = self.row_side.groups(left.reshape(-1, self.rows), rows, number)
        self._add_products(out, grouped, self.column_side.groups(right.reshape(-1, self.columns), columns, number))

    def add_rows(
        self, out: Float[Tensor, "b d"], index: Int64[Tensor, "b t"], right: Float[Tensor, "b t columns"]
    ) -> None:
        rows, columns, number = self._groups
        grouped = self.column_side.groups(right.reshape(-1, self.columns), columns, number)
        self._add_products(out, self.row_side.group_rows(index.reshape(-1), grouped, rows, number), grouped)

    def adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b rows columns"]:
        numbers = (w[:, self._targets] if self.keeps_all else w) * self.scale
        image = w.new_zeros(len(w), self.row_side.count * self.column_side.count)
        image[:, self._places(w.device)[: numbers.shape[1]]] = numbers
        image = image.view(len(w), self.row_side.count, self.column_side.count)
        return self.row_side.adjoint(self.column_side.adjoint(image).mT).mT

    @property
    def _groups(self) -> tuple[int, int, int]:
        """Group sizes of rows and columns, and how many tiles the numbers up to d take; one whole tile for all."""
        if self.keeps_all:
            return self.row_side.count, self.column_side.count, 1
        return *self.tile, -(-self.d // math.prod(self.tile))

    def _add_products(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "k bt r"], right: Float[Tensor, "k bt c"]
    ) -> None:
        """Add Σ_t left_t right_tᵀ of each group and example, its entries tile after tile."""
        b, tiles = len(out), len(left)
        t = left.shape[1] // b
        products = left.reshape(tiles * b, t, -1).mT @ right.reshape(tiles * b, t, -1)
        numbers = products.view(tiles, b, -1).transpose(0, 1).flatten(1)
        self._add(out, numbers.index_select(1, self._places(out.device)) if self.keeps_all else numbers)

    def _add(self, out: Float[Tensor, "b d"], numbers: Float[Tensor, "b kept"]) -> None:
        part = out[:, self._targets] if self.keeps_all else out
        part.add_(numbers[:, : part.shape[1]], alpha=self.scale)

    def _places(self, device: torch.device) -> Int64[Tensor, " kept"]:
        """Return where, in the row-major matrix of computed coordinates, each number of the sketch stands."""
        kept = min(self.layout_d, self.row_side.count * self.column_side.count)
        return _tile_order(self.row_side.count, self.column_side.count, self.tile, device)[:kept]

    @cached_property
    def _targets(self) -> slice:
        """Where entries go that are fewer than the sketch is long: evenly spread, from a random start."""
        kept = self.row_side.count * self.column_side.count
        step = self.layout_d // kept
        start = int(self.stream.child("start").integers(0, 1, self.layout_d - (kept - 1) * step))
        return slice(start, min(self.d, start + kept * step), step)


@cache
def _tile_order(rows: int, columns: int, tile: tuple[int, int], device: torch.device) -> Int64[Tensor, " all"]:
    """Return the entries of a row-major matrix tile by tile: group j of the rows meets group j + k of the columns."""
    row_groups, column_groups = -(-rows // tile[0]), -(-columns // tile[1])
    index = torch.arange(row_groups * column_groups)
    turn = index // max(row_groups, column_groups)
    row_group = (index + turn * (row_groups < column_groups)) % row_groups
    column_group = (index + turn * (row_groups >= column_groups)) % column_groups
    p = row_group[:, None, None] * tile[0] + torch.arange(tile[0])[:, None]
    q = column_group[:, None, None] * tile[1] + torch.arange(tile[1])
    return (p * columns + q).reshape(-1).to(device)


def _counts(padded_rows: int, padded_columns: int, d: int) -> tuple[int, int]:
    """Coordinates to compute on each side: at most ``_COORDINATES``, but enough for ``_SPARE``·d distinct pairs."""
    rows, columns = min(padded_rows, _COORDINATES), min(padded_columns, _COORDINATES)
    while rows * columns < min(_SPARE * d, padded_rows * padded_columns):
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
