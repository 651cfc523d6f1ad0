"""Kronecker-structured sketching of one matrix-shaped parameter, by its factors or by its entries."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.random import Stream
from gradsketch.sketches.fused import FusedTiles, FusedVectors, VectorMap
from gradsketch.sketches.layout import Layout
from gradsketch.sketches.side import Side
from gradsketch.sketches.sums import Sums

__all__ = ["Block", "Coordinates", "Tiling"]

# Transformed numbers held at once, in examples as a whole: what a batch takes beside a model stays within bounds.
_AT_ONCE, _AT_ONCE_GPU = 1 << 19, 1 << 28


@runtime_checkable
class Coordinates(Protocol):
    """Gives coordinates of vectors in groups, as a side does."""

    def groups(self, x: Float[Tensor, "m size"], group: int, number: int) -> Float[Tensor, "number m group"]:
        """Return the first ``number`` groups of ``group`` coordinates of each vector."""


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
    """d sums of products of coordinates of X̂ = (H B_r) X (H B_c)ᵀ, r'·c' entries, chosen by :class:`Layout`.

    The P entries that are kept are added to the d numbers with random signs, in rounds of d. A prefix of the numbers is
    a valid smaller sketch. Where there are fewer entries than numbers, all are kept and spread evenly
    over the numbers from a random start: an isometry.

    ``layout_d`` is the size the layout was chosen for, d unless this is the prefix of a larger sketch.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        d: int,
        stream: Stream,
        layout_d: int | None = None,
        coordinates: int | None = None,
    ) -> None:
        self.rows, self.columns, self.d, self.layout_d = rows, columns, d, layout_d or d
        self.stream = stream
        self.layout = Layout.of(rows, columns, self.layout_d, coordinates)
        self.row_side = Side(rows, self.layout.counts[0], stream.child("rows"), self.layout.tile[0])
        self.column_side = Side(columns, self.layout.counts[1], stream.child("columns"), self.layout.tile[1])
        self._row_coordinates: Coordinates = self.row_side
        self._column_coordinates: Coordinates = self.column_side
        scale = math.sqrt(self.layout_d / (d * self.layout.products))
        self.sums = Sums(self.layout.products, d, self.layout_d, scale, stream)

    def with_sides(self, rows: Coordinates, columns: Coordinates) -> Tiling:
        """Return it for outer products whose sides' coordinates come from others."""
        other = copy.copy(self)
        other._row_coordinates, other._column_coordinates = rows, columns
        return other

    def add_matrix(self, out: Float[Tensor, "b d"], x: Float[Tensor, "b rows columns"]) -> None:
        if self.of_vectors is not None and self._fused_vectors.serves(out, [x.flatten(1)]):
            self._fused_vectors.add(out, [x.flatten(1)])
            return
        image = self.row_side.transform(self.column_side.transform(x).mT).mT.flatten(1)
        self.sums.add(out, image if self._as_they_stand else image.index_select(1, self._places(x.device)))

    def add_outer(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]
    ) -> None:
        own = self._row_coordinates is self.row_side and self._column_coordinates is self.column_side
        if own and self._fused.serves(out, left, right):
            self._fused.add(out, left, right)
            return
        rows, columns, number = self._groups
        for part in self._parts(left):
            grouped = self._row_coordinates.groups(left[part].reshape(-1, self.rows), rows, number)
            other = self._column_coordinates.groups(right[part].reshape(-1, self.columns), columns, number)
            self._add_products(out[part], grouped, other)

    def add_rows(
        self, out: Float[Tensor, "b d"], index: Int64[Tensor, "b t"], right: Float[Tensor, "b t columns"]
    ) -> None:
        if self._fused.serves(out, index, right):
            self._fused.add(out, index, right)
            return
        rows, columns, number = self._groups
        for part in self._parts(right):
            grouped = self.column_side.groups(right[part].reshape(-1, self.columns), columns, number)
            chosen = self.row_side.group_rows(index[part].reshape(-1), grouped, rows, number)
            self._add_products(out[part], chosen, grouped)

    def is_fused(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "b t rows"], right: Float[Tensor, "b t columns"]
    ) -> bool:
        """Whether outer products of these factors are added in one pass."""
        return self._fused.serves(out, left, right)

    @cached_property
    def _fused(self) -> FusedTiles:
        order = self._places(torch.device("cpu")) if self._in_other_order else None
        return FusedTiles(self.row_side, self.column_side, self._groups, self.sums, order)

    @cached_property
    def of_vectors(self) -> VectorMap | None:
        """The map of vectors that this is if one side is a single number: the other's coordinates times a sign."""
        if 1 not in (self.rows, self.columns):
            return None
        one, side = sorted((self.row_side, self.column_side), key=lambda side: side.size)
        return VectorMap(side, float(one.plan()[1]), self.sums)

    @cached_property
    def _fused_vectors(self) -> FusedVectors:
        assert self.of_vectors is not None
        return FusedVectors([self.of_vectors])

    def adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b rows columns"]:
        numbers = self.sums.adjoint(w * self.sums.scale)
        image = w.new_zeros(len(w), self.row_side.count * self.column_side.count)
        if self._as_they_stand:
            image.copy_(numbers)
        else:
            image[:, self._places(w.device)] = numbers
        image = image.view(len(w), self.row_side.count, self.column_side.count)
        return self.row_side.adjoint(self.column_side.adjoint(image).mT).mT

    @property
    def _as_they_stand(self) -> bool:
        """Whether entries are taken row by row: all of them, in sums whose order is random anyway."""
        return self.layout.keeps_all and self.sums.adds

    @property
    def _in_other_order(self) -> bool:
        """Whether products of whole sides come row by row, and entries are numbers tile by tile."""
        return self.layout.keeps_all and not self.sums.adds

    @property
    def _groups(self) -> tuple[int, int, int]:
        """Group sizes of rows and columns, and how many tiles the numbers up to d take; one whole tile for all."""
        if self.layout.keeps_all:
            return self.row_side.count, self.column_side.count, 1
        kept = self.layout.products if self.sums.adds else self.d
        return *self.layout.tile, -(-kept // math.prod(self.layout.tile))

    def _parts(self, factor: Float[Tensor, "b t _"]) -> Iterator[slice]:
        """Cut a batch by examples, so that the transformed factors of a part stay within bounds."""
        limit = _AT_ONCE if factor.device.type == "cpu" else _AT_ONCE_GPU
        b, t = factor.shape[:2]
        step = max(1, limit // max(1, t * (self.row_side.count + self.column_side.count)))
        return (slice(start, start + step) for start in range(0, b, step))

    def _add_products(
        self, out: Float[Tensor, "b d"], left: Float[Tensor, "k bt r"], right: Float[Tensor, "k bt c"]
    ) -> None:
        """Add Σ_t left_t right_tᵀ of each group and example, its entries tile after tile."""
        b, tiles = len(out), len(left)
        t = left.shape[1] // b
        products = left.reshape(tiles * b, t, -1).mT @ right.reshape(tiles * b, t, -1)
        entries = products.view(tiles, b, -1).transpose(0, 1).flatten(1)
        self.sums.add(out, entries.index_select(1, self._places(out.device)) if self._in_other_order else entries)

    def _places(self, device: torch.device) -> Int64[Tensor, " kept"]:
        """Return where, in the row-major matrix of computed coordinates, each entry stands."""
        order = _tile_order(self.row_side.count, self.column_side.count, self.layout.tile, device)
        return order[: self.layout.products]


@cache
def _tile_order(rows: int, columns: int, tile: tuple[int, int], device: torch.device) -> Int64[Tensor, " all"]:
    """Return the entries of a row-major matrix tile by tile: group j of the rows meets group j + k of the columns."""
    row_groups, column_groups = -(-rows // tile[0]), -(-columns // tile[1])
    index = torch.arange(row_groups * column_groups, device="cpu")
    turn = index // max(row_groups, column_groups)
    row_group = (index + turn * (row_groups < column_groups)) % row_groups
    column_group = (index + turn * (row_groups >= column_groups)) % column_groups
    p = row_group[:, None, None] * tile[0] + torch.arange(tile[0], device="cpu")[:, None]
    q = column_group[:, None, None] * tile[1] + torch.arange(tile[1], device="cpu")
    return (p * columns + q).reshape(-1).to(device)
