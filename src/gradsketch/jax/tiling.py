"""The tiled sketch of one matrix (:mod:`gradsketch.sketches.tiling`) in JAX.

What is random comes as tables of a few thousand small integers, drawn by torch, and as keys of streams. Tables are
arrays and everything else is static, so that layers stacked for a scan can scan their tables along. No value is looked
up by a random index: entries of Hadamard matrices are parities of bits, permutations are products with one-hot vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from gradsketch.jax.random import as_key, flip_packed, is_negative_at, packed_signs
from gradsketch.jax.transforms import einsum
from gradsketch.sketches.side import Side
from gradsketch.sketches.sums import sums_stream
from gradsketch.sketches.tiling import Tiling

__all__ = ["SideShape", "Tables", "TilingShape", "matrix_numbers", "outer_numbers", "row_numbers", "tables_of"]

# Arrays of one matrix, or stacked for several of one shape.
Tables = dict[str, Any]


@dataclass(frozen=True)
class SideShape:
    """``count`` coordinates of vectors of length ``size``, from blocks of ``length``."""

    size: int
    count: int
    length: int


@dataclass(frozen=True)
class TilingShape:
    """What is the same for all matrices of one shape: ``number`` tiles give the first ``kept`` of all products."""

    rows: SideShape
    columns: SideShape
    tile: tuple[int, int]
    products: int
    keeps_all: bool
    folds: bool
    d: int
    layout_d: int
    scale: float


def tables_of(tiling: Tiling) -> tuple[TilingShape, Tables]:
    """Return what is static of a tiling, and its tables."""
    layout = tiling.layout
    shape = TilingShape(
        _side_shape(tiling.row_side),
        _side_shape(tiling.column_side),
        layout.tile,
        layout.products,
        layout.keeps_all,
        tiling.sums.adds,
        tiling.d,
        tiling.layout_d,
        tiling.sums.scale,
    )
    tables = {
        "rows": _side_tables(tiling.row_side),
        "columns": _side_tables(tiling.column_side),
        "sums": packed_signs(sums_stream(tiling.stream.seed), layout.products if tiling.sums.adds else 1),
        "starts": np.array(tiling.sums.starts, np.int32),
    }
    return shape, tables


def _side_shape(side: Side) -> SideShape:
    return SideShape(side.size, side.count, side.length)


def _side_tables(side: Side) -> Tables:
    bits = {"order": side.order, "within": side.within, "places": side.places}
    return {
        **{name: table.numpy().astype(np.uint16) for name, table in bits.items()},
        "rotations": side.rotations.numpy().astype(np.int32),
        "signs": packed_signs(side.stream.child("signs"), side.count),
        "fold": packed_signs(side.stream.child("fold"), side.size),
        "fold_key": as_key(side.stream.child("fold")),
    }


def outer_numbers(
    shape: TilingShape, tables: Tables, left: Float[Array, "t rows"], right: Float[Array, "t columns"]
) -> Float[Array, " d"]:
    """Return the sketch of Σ_t left_t right_tᵀ."""
    rows, columns, _ = _groups(shape)
    grouped = _coordinates(shape.rows, tables["rows"], left, rows)
    other = _coordinates(shape.columns, tables["columns"], right, columns)
    return _numbers_of_products(shape, tables, grouped, other)


def row_numbers(
    shape: TilingShape, tables: Tables, index: Int[Array, " t"], right: Float[Array, "t columns"]
) -> Float[Array, " d"]:
    """Return the sketch of the matrix whose row ``index_t`` gets ``right_t``."""
    rows, columns, _ = _groups(shape)
    other = _coordinates(shape.columns, tables["columns"], right, columns)
    chosen = _coordinates_of_one(shape.rows, tables["rows"], index, rows, other.dtype)
    return _numbers_of_products(shape, tables, chosen, other)


def matrix_numbers(shape: TilingShape, tables: Tables, x: Float[Array, "rows columns"]) -> Float[Array, " d"]:
    """Return the sketch of a matrix given by its entries."""
    across = _coordinates(shape.columns, tables["columns"], x, shape.columns.count)
    image = _coordinates(shape.rows, tables["rows"], across.T, shape.rows.count).T
    return _sums(shape, tables, image.reshape(-1) if shape.keeps_all and shape.folds else _tiles(shape, image))


def _groups(shape: TilingShape) -> tuple[int, int, int]:
    """Return how many coordinates of the rows and of the columns are needed, and the number of tiles; 1 for all."""
    if shape.keeps_all:
        return shape.rows.count, shape.columns.count, 1
    kept = shape.products if shape.folds else shape.d
    number = -(-kept // math.prod(shape.tile))
    return number * shape.tile[0], number * shape.tile[1], number


def _numbers_of_products(
    shape: TilingShape, tables: Tables, left: Float[Array, "t r"], right: Float[Array, "t c"]
) -> Float[Array, " d"]:
    number, t = _groups(shape)[2], len(left)
    products = einsum("tkr,tkc->krc", left.reshape(t, number, -1), right.reshape(t, number, -1))
    reorder = shape.keeps_all and not shape.folds
    return _sums(
        shape, tables, _tiles(shape, products.reshape(products.shape[1:])) if reorder else products.reshape(-1)
    )


def _sums(shape: TilingShape, tables: Tables, numbers: Float[Array, " kept"]) -> Float[Array, " d"]:
    """Add entries up with random signs, in rounds that begin at random numbers; or spread them evenly."""
    size, products, starts = shape.layout_d, shape.products, tables["starts"]
    numbers = numbers[:products]
    if not shape.folds:
        step = size // products
        numbers = jnp.pad(numbers, (0, products - len(numbers)))
        spread = jnp.pad(numbers[:, None], ((0, 0), (0, step - 1))).reshape(-1)
        total = _rolled(jnp.pad(spread, (0, size - products * step)), starts[0])
    else:
        rounds = len(starts)
        signed = jnp.pad(flip_packed(numbers, tables["sums"]), (0, rounds * size - products))
        parts = [_rolled(signed[i * size : (i + 1) * size], starts[i]) for i in range(rounds)]
        total = sum(parts[1:], parts[0])
    return total[: shape.d] * shape.scale


def _tiles(shape: TilingShape, image: Float[Array, "rows columns"]) -> Float[Array, " all"]:
    """Return the entries tile after tile: group j of the rows meets group j + k of the columns in round k."""
    tile_rows, tile_columns = shape.tile
    groups = image.reshape(shape.rows.count // tile_rows, tile_rows, shape.columns.count // tile_columns, tile_columns)
    if groups.shape[0] >= groups.shape[2]:
        return _diagonals(groups).transpose(2, 0, 1, 3, 4).reshape(-1)
    return _diagonals(groups.transpose(2, 3, 0, 1)).transpose(2, 0, 1, 4, 3).reshape(-1)


def _diagonals(groups: Float[Array, "long r short c"]) -> Float[Array, "several short short r c"]:
    """Return out[a, i, k] = groups[a·short + i, :, (i + k) mod short, :].

    Rows that are one longer than they were begin one further on each time: a diagonal without an index.
    """
    long, rows, short, columns = groups.shape
    square = groups.reshape(long // short, short, rows, short, columns).transpose(0, 2, 4, 1, 3)
    twice = jnp.concatenate([square, square], axis=-1).reshape(*square.shape[:3], -1)
    skewed = jnp.pad(twice, ((0, 0), (0, 0), (0, 0), (0, short)))
    return skewed.reshape(*square.shape[:4], 2 * short + 1)[..., :short].transpose(0, 3, 4, 1, 2)


def _coordinates(side: SideShape, tables: Tables, x: Float[Array, "m size"], number: int) -> Float[Array, "m number"]:
    """Return the first coordinates of vectors."""
    x = _fold(side, tables, x)
    used = -(-x.shape[1] // side.length)
    blocks = jnp.pad(x, ((0, 0), (0, used * side.length - x.shape[1]))).reshape(len(x), used, side.length)
    signs = flip_packed(jnp.ones(used * side.length, x.dtype), tables["signs"])
    parities = _parity(tables["places"][:used, :, None], tables["within"])
    first = jnp.where(parities, -1, 1) * signs.reshape(used, side.length, 1)
    inside = einsum("mup,upq->muq", blocks, first.astype(x.dtype))
    rows = -(-number // side.length)
    across = jnp.where(_parity(tables["order"][:rows, None], np.arange(used, dtype=np.uint16)), -1, 1).astype(x.dtype)
    return einsum("ru,muq->mrq", across, inside).reshape(len(x), -1)[:, :number]


def _coordinates_of_one(
    side: SideShape, tables: Tables, index: Int[Array, " m"], number: int, dtype: Any
) -> Float[Array, "m number"]:
    """Return ``_coordinates`` of one-hot vectors."""
    index, place = index.astype(jnp.int32), index.astype(jnp.int32)
    negative = jnp.zeros(len(index), bool)
    if side.size > side.count:
        rotations = tables["rotations"]
        hot = (index // side.count)[:, None] == np.arange(len(rotations), dtype=np.int32)
        place = (index + jnp.where(hot, rotations, 0).sum(-1, dtype=jnp.int32)) % side.count
        negative = is_negative_at(tables["fold_key"], index)
    block, inside = place // side.length, place % side.length
    in_block = (block[:, None] == np.arange(side.count // side.length, dtype=np.int32)).astype(jnp.float32)
    # A place's row of the first stage, and its sign as its sign.
    rows = jnp.asarray(tables["places"], jnp.float32).reshape(-1) + 1
    signed = flip_packed(rows, tables["signs"]).reshape(-1, side.length)
    here = inside[:, None] == np.arange(side.length, dtype=np.int32)
    found = jnp.where(here, einsum("mu,up->mp", in_block, signed), 0).sum(-1)
    row = (jnp.abs(found) - 1).astype(jnp.uint16)
    first = _parity(row[:, None], tables["within"]) ^ ((found < 0) ^ negative)[:, None]
    across = _parity(tables["order"][: -(-number // side.length)], block[:, None].astype(jnp.uint16))
    coordinates = across[:, :, None] ^ first[:, None, :]
    return jnp.where(coordinates.reshape(len(index), -1)[:, :number], -1, 1).astype(dtype)


def _fold(side: SideShape, tables: Tables, x: Float[Array, "m size"]) -> Float[Array, "m at_most_count"]:
    if side.size <= side.count:
        return x
    stretches = len(tables["rotations"])
    signed = jnp.pad(flip_packed(x, tables["fold"]), ((0, 0), (0, stretches * side.count - side.size)))

    parts = [
        _rolled(signed[:, i * side.count : (i + 1) * side.count], tables["rotations"][i]) for i in range(stretches)
    ]
    return sum(parts[1:], parts[0])


def _rolled(x: Float[Array, "*m size"], shift: Any) -> Float[Array, "*m size"]:
    """Rotate the last dim to the right by less than its length, without an index: in a batch that is a look-up."""
    if not isinstance(shift, Array):
        return jnp.roll(x, int(shift), axis=-1)
    for bit in range((x.shape[-1] - 1).bit_length()):
        x = jnp.where((shift >> bit) & 1 != 0, jnp.roll(x, 1 << bit, axis=-1), x)
    return x


def _parity(a: Any, b: Any) -> Array:
    """Return whether a Hadamard matrix is negative at row a and column b."""
    return (lax.population_count(jnp.asarray(a) & jnp.asarray(b)) & 1) != 0


def stacked(tables: Sequence[Tables]) -> Tables:
    """Return the tables of several matrices of one shape, stacked."""
    first = tables[0]
    return {
        name: stacked([t[name] for t in tables])
        if isinstance(first[name], dict)
        else np.stack([t[name] for t in tables])
        for name in first
    }
