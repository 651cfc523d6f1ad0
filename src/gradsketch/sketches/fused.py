"""Sketches of products on a CPU in one pass over the factors, with nothing in between in memory (kernels/tiles.c).

The coordinates of eight tokens are made at a time, in cache, by additions alone; the products of a chunk of tokens then
come from there, and are added to the sketch. Torch needs passes of multiplications over coordinates that lie in memory.
Vectors have no products: those of many parameters go in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional

from gradsketch.kernels.native import compiled
from gradsketch.kernels.trust import is_plain, relative_error, trusted
from gradsketch.random import Stream
from gradsketch.sketches.side import Side
from gradsketch.sketches.sums import Sums
from gradsketch.transforms.precision import outside_autocast

__all__ = ["FusedTiles", "FusedVectors", "VectorMap"]

# Vectors [b, t, size], or the places of ones [b, t].
Factor = Num[Tensor, "b t ..."]

_LANES = 8
_WIDE = 16  # columns of a tile from which on they lie in the lanes
_PIECE = 512  # tokens after which sums are written down, so that long rows are shared by threads
_HELD = 1 << 16  # coordinates of a chunk of tokens, which stay in cache
_CHUNK = 64
_TRIAL = Stream(0, "tiles", "trial")


class FusedTiles:
    """Adds the sums of ``number`` tiles of products of two sides' groups of coordinates to sketches.

    The longer dim of a tile, or the tiles themselves, lie in the lanes of a vector, so that sides may change places.
    ``order`` tells which product each entry of the sums is, if not the products in their order.
    """

    def __init__(
        self, rows: Side, columns: Side, groups: tuple[int, int, int], sums: Sums, order: Tensor | None
    ) -> None:
        height, width, number = groups
        self._rows, self._columns, self._groups, self._sums, self._order = rows, columns, groups, sums, order
        self._takes_outer = max(height, width) >= _WIDE or number % _LANES == 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._rows, self._columns, self._groups, self._sums, self._order)  # addresses stay here

    @cached_property
    def _of_outer(self) -> _Plan:
        height, width, number = self._groups
        turned, in_lanes = height > width, max(height, width) < _WIDE
        left, right = _Table(self._rows, height, number, in_lanes), _Table(self._columns, width, number, in_lanes)
        return _Plan(*((right, left) if turned else (left, right)), self._sums_table, turned, in_lanes)

    @cached_property
    def _of_rows(self) -> _Plan:
        _, width, number = self._groups
        columns = _Table(self._columns, width, number, in_lanes=False)
        return _Plan(_RowsTable(self._rows, self._groups), columns, self._sums_table, turned=False, in_lanes=False)

    @cached_property
    def _sums_table(self) -> _SumsTable:
        return _SumsTable(self._sums, self._order, self._sums.scale)

    def serves(self, out: Float[Tensor, "b d"], left: Factor, right: Factor) -> bool:
        """Whether there is a kernel for these tensors, after a trial at the first use of such a layout."""
        one_hot = left.ndim == 2
        if not (one_hot or self._takes_outer) or not _takes(out) or compiled("tiles") is None:
            return False
        fit = _fits(left, self._rows.size) and _fits(right, self._columns.size)
        if not fit or left.shape[:2] != right.shape[:2]:
            return False
        sides = tuple(_layout(side) for side in (self._rows, self._columns))
        variant = *sides, self._groups, _added(self._sums), one_hot
        return trusted("tiles", out.new_empty(0), variant, lambda: self._error(one_hot))

    def add(self, out: Float[Tensor, "b d"], left: Factor, right: Factor, piece: int = _PIECE) -> None:
        """Add the sketches of each example, of tensors that it serves; ``piece`` tokens are summed up at a time."""
        library = compiled("tiles")
        assert library is not None
        (b, t), plan = left.shape[:2], self._of_rows if left.ndim == 2 else self._of_outer
        tile, number = self._groups[:2], self._groups[2]
        if plan.turned:
            left, right, tile = right, left, tile[::-1]
        left, right = _rows(left), _rows(right)
        factors = _factor(left), _factor(right)
        work = _Work(
            *plan.sides(),
            *map(ctypes.addressof, (*factors, plan.sums.shape)),
            t,
            min(t, piece),
            plan.chunk,
            *tile,
            number,
            plan.in_lanes,
            plan.turned,
            out.data_ptr(),
            out.stride(0),
        )
        if library.add_tiles(ctypes.byref(work), ctypes.c_int64(b), ctypes.c_int(torch.get_num_threads())):
            raise MemoryError(f"no memory for {number} tiles of {tile}")

    def _error(self, one_hot: bool) -> float:
        """Return the relative error for vectors of signs, or rows of the matrix, against the sides' own arithmetic."""
        b, t, (height, width, number) = 2, 11, self._groups
        right = _TRIAL.signs(0, b * t * self._columns.size).view(b * t, -1)
        index = _TRIAL.integers(0, b * t, self._rows.size)
        left = _TRIAL.child("rows").signs(0, b * t * self._rows.size).view(b * t, -1)
        left = functional.one_hot(index, self._rows.size).float() if one_hot else left
        wanted = right.new_zeros(b, self._sums.d)
        with outside_autocast(right.device):
            rows, columns = self._rows.groups(left, height, number), self._columns.groups(right, width, number)
            sides = rows.unflatten(1, (b, t)), columns.unflatten(1, (b, t))
            products = torch.einsum("kbtr,kbtc->bkrc", *sides).flatten(1)
            self._sums.add(wanted, products if self._order is None else products[:, self._order.long()])
        factors = index.view(b, t) if one_hot else left.view(b, t, -1), right.view(b, t, -1)
        return max(self._error_of(wanted, factors, piece) for piece in (_PIECE, _LANES))  # in one piece, and in two

    def _error_of(self, wanted: Float[Tensor, "b d"], factors: tuple[Factor, Factor], piece: int) -> float:
        found = torch.zeros_like(wanted)
        self.add(found, *factors, piece)
        return relative_error(found, wanted)


@dataclass(frozen=True)
class VectorMap:
    """A sketch of vectors: the first of a side's coordinates, times a sign, make up its numbers."""

    side: Side
    sign: float
    sums: Sums

    def error(self) -> float:
        """Return the kernel's relative error for vectors of signs, against the side's own arithmetic."""
        b = 3
        x = _TRIAL.signs(0, b * self.side.size).view(b, -1)
        wanted, found = x.new_zeros(2, b, self.sums.d)
        with outside_autocast(x.device):
            self.sums.add(wanted, self.sign * self.side.transform(x))
        FusedVectors([self]).add(found, [x])
        return relative_error(found, wanted)


class FusedVectors:
    """Adds the sketches of vectors, one for each map, to the same numbers."""

    def __init__(self, maps: Sequence[VectorMap]) -> None:
        self._maps = maps
        tables = [_Table(m.side, m.sums.kept, 1, in_lanes=False) for m in maps]
        sums = [_SumsTable(m.sums, None, m.sums.scale * m.sign) for m in maps]
        self._tables = tables, sums
        self._longest = max((m.side.count for m in maps), default=0)
        self._vectors = (_Vector * len(maps))(
            *(
                _Vector(ctypes.addressof(table.shape), ctypes.addressof(own.shape))
                for table, own in zip(tables, sums, strict=True)
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._maps,)

    def serves(self, out: Float[Tensor, "b d"], vectors: Sequence[Float[Tensor, "b _"]]) -> bool:
        """Whether there is a kernel for these tensors, after a trial at the first use of such a side."""
        if not _takes(out) or compiled("tiles") is None:
            return False
        return all(
            _fits(x[:, None], m.side.size) and trusted("vectors", out.new_empty(0), _variant(m), m.error)
            for m, x in zip(self._maps, vectors, strict=True)
        )

    def add(self, out: Float[Tensor, "b d"], vectors: Sequence[Float[Tensor, "b _"]]) -> None:
        """Add the sketches of each example, of vectors that it serves."""
        library = compiled("tiles")
        assert library is not None
        vectors = [_rows(x[:, None])[:, 0] for x in vectors]
        for place, x in zip(self._vectors, vectors, strict=True):
            place.factor.data, place.factor.token = x.data_ptr(), x.stride(0)
        sizes = map(ctypes.c_int64, (len(vectors), self._longest, len(out)))
        target = ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.stride(0))
        if library.add_vectors(self._vectors, *sizes, *target, ctypes.c_int(torch.get_num_threads())):
            raise MemoryError(f"no memory for {self._longest} coordinates")


class _Table:
    """A side as the kernel takes it: where it takes entries, with which signs, and where its first groups stand.

    See ``side_t`` there.
    """

    def __init__(self, side: Side, group: int, number: int, in_lanes: bool) -> None:
        place, sign, pick = side.plan()
        pick = pick[: group * number]
        pick = pick.view(number, group).T.flatten() if in_lanes else pick
        self._held = place.to(torch.int32), pick.to(torch.int32).contiguous(), sign
        self.shape = _Side(
            side.size, side.count, len(pick), side.size > side.count, *(t.data_ptr() for t in self._held)
        )


class _RowsTable:
    """A side of one-hot vectors as the kernel takes it, for tiles of these groups; see ``rows_t`` there."""

    def __init__(self, side: Side, groups: tuple[int, int, int]) -> None:
        height, width, number = groups
        place, sign, _ = side.plan()
        stack = max(1, height // side.length)
        tile = torch.arange(number, device="cpu").repeat_interleave(width)
        blocks = (tile * height // side.length) + torch.arange(stack, device="cpu")[:, None]
        flips = side.second_stage[blocks].movedim(2, 0).to(torch.float32)
        flips = functional.pad(flips, (0, max(0, _LANES - flips.shape[2]))).contiguous()
        self._held = place.to(torch.int32), side.within.to(torch.int32), sign, flips
        self.shape = _OneHot(side.length, stack, *(t.data_ptr() for t in self._held))


@dataclass(frozen=True)
class _Plan:
    """How the kernel goes about products: which side comes first, and what lies in the lanes of a vector."""

    first: _Table | _RowsTable
    second: _Table
    sums: _SumsTable
    turned: bool
    in_lanes: bool

    def sides(self) -> tuple[int | None, int, int | None]:
        """Return where a first side, the second and a first side of one-hot vectors are."""
        first, second = ctypes.addressof(self.first.shape), ctypes.addressof(self.second.shape)
        return (None, second, first) if isinstance(self.first, _RowsTable) else (first, second, None)

    @property
    def chunk(self) -> int:
        """How many tokens' coordinates are held at once."""
        held: int = self.second.shape.needed + (self.first.shape.needed if isinstance(self.first, _Table) else 0)
        return min(_CHUNK, max(_LANES, _HELD // held // _LANES * _LANES))


class _SumsTable:
    """How entries are added up, as the kernel takes it; see ``sums_t`` there."""

    def __init__(self, sums: Sums, order: Tensor | None, scale: float) -> None:
        signs = sums.signs(torch.empty(0, dtype=torch.float32, device="cpu"))
        order = None if order is None else order.to(torch.int32)
        runs = (_Run * len(sums.runs))(*(_Run(*run) for run in sums.runs))
        self._held = signs, order, runs
        pointers = (None if t is None else t.data_ptr() for t in (order, signs))
        self.shape = _Sums(ctypes.addressof(runs), len(runs), sums.step, *pointers, scale)


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "count", "needed", "adds")),
        *((name, ctypes.c_void_p) for name in ("place", "pick", "sign")),
    )


class _OneHot(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("length", "stack")),
        *((name, ctypes.c_void_p) for name in ("place", "within", "sign", "flips")),
    )


class _Run(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("first", "begin", "end"))


class _Sums(ctypes.Structure):
    _fields_ = (
        ("runs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "step")),
        *((name, ctypes.c_void_p) for name in ("order", "sign")),
        ("scale", ctypes.c_float),
    )


class _Factor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "index")),
        *((name, ctypes.c_int64) for name in ("example", "token")),
    )


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "one_hot", "l", "r", "sums")),
        *((n, ctypes.c_int64) for n in ("tokens", "length", "chunk", "rows", "columns", "tiles", "in_lanes", "turned")),
        ("out", ctypes.c_void_p),
        ("row", ctypes.c_int64),
    )


class _Vector(ctypes.Structure):
    _fields_ = (("side", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("factor", _Factor))


def _layout(side: Side) -> tuple[int, int, int]:
    return side.size, side.count, side.length


def _variant(vectors: VectorMap) -> Hashable:
    return _layout(vectors.side), _added(vectors.sums)


def _added(sums: Sums) -> tuple[int, int, int]:
    return sums.kept, sums.layout_d, sums.d


def _takes(out: Tensor) -> bool:
    """Whether sketches lie in this process's memory as float32."""
    return out.device.type == "cpu" and out.dtype == torch.float32 and is_plain(out) and out.stride(1) == 1


def _fits(factor: Factor, size: int) -> bool:
    """Whether a factor's numbers lie in this process's memory as float32 or less."""
    if factor.device.type != "cpu" or not is_plain(factor) or not factor.numel():
        return False
    if factor.ndim == 2:
        return factor.dtype == torch.int64 and int(factor.min()) >= 0 and int(factor.max()) < size
    return factor.dtype in (torch.float32, torch.bfloat16, torch.float16) and factor.shape[2] == size


def _rows(factor: Tensor) -> Tensor:
    """Return a factor as the kernel takes it: indexes, or float32 numbers whose vectors lie in one stretch."""
    if factor.ndim == 2:
        return factor
    factor = factor.to(torch.float32)
    return factor if factor.stride(2) == 1 or factor.shape[2] == 1 else factor.contiguous()


def _factor(factor: Tensor) -> _Factor:
    place = factor.data_ptr()
    pointers = (None, place) if factor.ndim == 2 else (place, None)
    return _Factor(*pointers, factor.stride(0), factor.stride(1))
