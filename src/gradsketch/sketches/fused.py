"""Tiles of products on a CPU in one pass over the factors, with nothing in between in memory (kernels/tiles.c).

The coordinates of eight tokens are made at a time, in cache, by additions alone; the products of a chunk of tokens then
come from there. Torch needs two passes of multiplications over coordinates that lie in memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional

from gradsketch.kernels.native import compiled
from gradsketch.kernels.trust import is_plain, trusted
from gradsketch.random import Stream
from gradsketch.sketches.side import Side

__all__ = ["Fused"]

# Vectors [b, t, size], or the places of ones [b, t].
Factor = Num[Tensor, "b t ..."]

_LANES = 8
_WIDE = 16  # columns of a tile from which on they lie in the lanes
_PIECE = 512  # tokens after which sums are written down, so that long rows are shared by threads
_HELD = 1 << 16  # coordinates of a chunk of tokens, which stay in cache
_CHUNK = 64
_TRIAL = Stream(0, "tiles", "trial")


class Fused:
    """The sums of ``number`` tiles of products of two sides' groups of coordinates, as [tile, row, column].

    The longer dim of a tile, or the tiles themselves, lie in the lanes of a vector, so that sides may change places.
    """

    def __init__(self, rows: Side, columns: Side, groups: tuple[int, int, int]) -> None:
        height, width, number = groups
        self._rows, self._columns, self._groups = rows, columns, groups
        self._turned = height > width
        self._tile = (width, height) if self._turned else (height, width)
        self._number, self._in_lanes = number, max(height, width) < _WIDE
        self._applies = not self._in_lanes or number % _LANES == 0

    @cached_property
    def _tables(self) -> tuple[_Table, _Table]:
        sides = (self._columns, self._rows) if self._turned else (self._rows, self._columns)
        first, second = (_Table.of(s, g, self._number, self._in_lanes) for s, g in zip(sides, self._tile, strict=True))
        return first, second

    def serves(self, left: Factor, right: Factor) -> bool:
        """Whether there is a kernel for these tensors, after a trial at the first use of such a layout."""
        fit = self._applies and _fits(left, self._rows.size) and _fits(right, self._columns.size)
        if not fit or left.shape[:2] != right.shape[:2] or compiled("tiles") is None:
            return False
        one_hot = left.ndim == 2
        layout = (*((s.size, s.count, s.length) for s in (self._rows, self._columns)), self._groups, one_hot)
        return trusted("tiles", torch.empty(0, dtype=torch.float32, device="cpu"), layout, lambda: self._error(one_hot))

    def __call__(self, left: Factor, right: Factor) -> Float[Tensor, "b products"]:
        """Return the products of each example of tensors that it serves."""
        products = self._products(*((right, left) if self._turned else (left, right)))
        if not self._turned:
            return products
        return products.view(len(products), self._number, *self._tile).mT.flatten(1)

    def _error(self, one_hot: bool) -> float:
        """Return the relative error for vectors of signs, or rows of the matrix, against the sides' own arithmetic."""
        b, t, (height, width, number) = 2, 11, self._groups
        right = _TRIAL.signs(0, b * t * self._columns.size).view(b * t, -1)
        index = _TRIAL.integers(0, b * t, self._rows.size)
        left = _TRIAL.child("rows").signs(0, b * t * self._rows.size).view(b * t, -1)
        left = functional.one_hot(index, self._rows.size).float() if one_hot else left
        with torch.autocast("cpu", enabled=False):
            rows, columns = self._rows.groups(left, height, number), self._columns.groups(right, width, number)
            sides = rows.unflatten(1, (b, t)), columns.unflatten(1, (b, t))
            wanted = torch.einsum("kbtr,kbtc->bkrc", *sides).flatten(1)
        found = self(index.view(b, t) if one_hot else left.view(b, t, -1), right.view(b, t, -1))
        return float((found - wanted).norm() / wanted.norm())

    def _products(self, left: Factor, right: Factor) -> Float[Tensor, "b products"]:
        library = compiled("tiles")
        assert library is not None
        (b, t), tile = left.shape[:2], self._number * self._tile[0] * self._tile[1]
        first, second = self._tables
        left, right = _rows(left), _rows(right)
        length = min(t, _PIECE)
        pieces = -(-t // length)
        out = torch.empty(b * pieces, tile, dtype=torch.float32, device="cpu")
        chunk = min(_CHUNK, max(_LANES, _HELD // (len(first.pick) + len(second.pick)) // _LANES * _LANES))
        factors = _factor(left), _factor(right)
        sides = first.as_c(), second.as_c()
        work = _Work(
            *map(ctypes.addressof, sides),
            *map(ctypes.addressof, factors),
            t,
            length,
            chunk,
            *self._tile,
            self._number,
            self._in_lanes,
            out.data_ptr(),
        )
        if library.tile_products(ctypes.byref(work), ctypes.c_int64(b * pieces), ctypes.c_int(torch.get_num_threads())):
            raise MemoryError(f"no memory for {self._number} tiles of {self._tile}")
        return out.view(b, pieces, -1).sum(1) if pieces > 1 else out


@dataclass(frozen=True)
class _Table:
    """A side as the kernel takes it; see ``side_t`` there."""

    size: int
    count: int
    place: Tensor
    pick: Tensor
    sign: Tensor

    @classmethod
    def of(cls, side: Side, group: int, number: int, in_lanes: bool) -> _Table:
        """Write out where a side takes entries, with which signs, and where its first groups of coordinates stand."""
        place, sign, pick = side.plan()
        pick = pick[: group * number]
        pick = pick.view(number, group).T.flatten() if in_lanes else pick
        return cls(side.size, side.count, place.to(torch.int32), pick.to(torch.int32).contiguous(), sign)

    def as_c(self) -> _Side:
        shape = self.size, self.count, len(self.pick), self.size > self.count
        return _Side(*shape, *(t.data_ptr() for t in (self.place, self.pick, self.sign)))


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "count", "needed", "adds")),
        *((name, ctypes.c_void_p) for name in ("place", "pick", "sign")),
    )


class _Vectors(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "index")),
        *((name, ctypes.c_int64) for name in ("example", "token")),
    )


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "l", "r")),
        *((n, ctypes.c_int64) for n in ("tokens", "length", "chunk", "rows", "columns", "tiles", "in_lanes")),
        ("out", ctypes.c_void_p),
    )


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


def _factor(factor: Tensor) -> _Vectors:
    place = factor.data_ptr()
    pointers = (None, place) if factor.ndim == 2 else (place, None)
    return _Vectors(*pointers, factor.stride(0), factor.stride(1))
