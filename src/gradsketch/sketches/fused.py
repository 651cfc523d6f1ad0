"""Tiles of products on a CPU in one pass over the factors, with nothing in between in memory (kernels/tiles.c).

The coordinates of eight tokens are made at a time, in cache, by additions alone; the products of a chunk of tokens then
come from there. Torch needs two passes of multiplications over coordinates that lie in memory.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional

from gradsketch.errors import GradsketchWarning
from gradsketch.kernels.native import compiled
from gradsketch.random import Stream
from gradsketch.sketches.side import Side

__all__ = ["Fused", "is_sound"]

# Vectors [b, t, size], or the places of ones [b, t].
Factor = Num[Tensor, "b t ..."]

_LANES = 8
_WIDE = 16  # columns of a tile from which on they lie in the lanes
_PIECE = 512  # tokens after which sums are written down, so that long rows are shared by threads
_HELD = 1 << 16  # coordinates of a chunk of tokens, which stay in cache
_CHUNK = 64


class Fused:
    """The sums of ``number`` tiles of products of two sides' groups of coordinates, as [tile, row, column].

    The longer dim of a tile, or the tiles themselves, lie in the lanes of a vector, so that sides may change places.
    """

    def __init__(self, rows: Side, columns: Side, groups: tuple[int, int, int]) -> None:
        height, width, number = groups
        self._rows, self._columns = rows.size, columns.size
        self.is_turned = height > width
        self._tile = (width, height) if self.is_turned else (height, width)
        self._number, self._in_lanes = number, max(height, width) < _WIDE
        self.applies = not self._in_lanes or number % _LANES == 0
        self._sides = (columns, rows) if self.is_turned else (rows, columns)

    @cached_property
    def _tables(self) -> tuple[_Table, _Table]:
        first, second = (
            _Table.of(s, g, self._number, self._in_lanes) for s, g in zip(self._sides, self._tile, strict=True)
        )
        return first, second

    def serves(self, left: Factor, right: Factor) -> bool:
        """Whether there is a kernel for these tensors."""
        fit = self.applies and _fits(left, self._rows) and _fits(right, self._columns)
        return fit and left.shape[:2] == right.shape[:2] and is_sound()

    def __call__(self, left: Factor, right: Factor) -> Float[Tensor, "b products"]:
        """Return the products of each example of tensors that it serves."""
        return self.products(*((right, left) if self.is_turned else (left, right)))

    def products(self, left: Factor, right: Factor) -> Float[Tensor, "b products"]:
        """Run the kernel."""
        library = compiled("tiles")
        assert library is not None
        (b, t), tile = left.shape[:2], self._number * self._tile[0] * self._tile[1]
        first, second = self._tables
        left, right = _rows(left), _rows(right)
        length = min(t, _PIECE)
        pieces = -(-t // length)
        out = torch.empty(b * pieces, tile)
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
        out = out.view(b, pieces, -1).sum(1) if pieces > 1 else out
        return out.view(b, self._number, *self._tile).mT.flatten(1) if self.is_turned else out


@cache
def is_sound() -> bool:
    """Whether there is a kernel, and it does what the sides say; if it does not, a warning says so once."""
    if compiled("tiles") is None:
        return False
    wrong = [case for case in _CASES if not _agrees(*case)]
    if wrong:
        warnings.warn(
            f"the kernel that was compiled for this CPU is wrong for {wrong[0]}: torch does its work, slower. "
            "Please report the compiler and the CPU",
            GradsketchWarning,
            stacklevel=2,
        )
    return not wrong


# Rows and columns of a matrix, coordinates of both sides, groups: every branch of the kernel.
_CASES = (
    ((30, 21), (32, 32), (2, 4, 8)),
    ((100, 17), (64, 32), (1, 1, 16)),
    ((40, 70), (16, 128), (4, 32, 4)),
    ((70, 9), (128, 16), (32, 4, 4)),
    ((5, 50), (8, 64), (8, 64, 1)),
    ((1, 24), (1, 32), (1, 32, 1)),
)


def _agrees(shape: tuple[int, int], counts: tuple[int, int], groups: tuple[int, int, int]) -> bool:
    rows, columns = (
        Side(size, count, Stream(0, "check", str(size)), group)
        for size, count, group in zip(shape, counts, groups[:2], strict=True)
    )
    b, t = 2, 11
    numbers = Stream(0, "check").normals(0, b * t * sum(shape)).view(b * t, -1)
    left, right = numbers.split(shape, dim=1)
    fused = Fused(rows, columns, groups)
    number, found = groups[2], []
    for factor in (left.view(b, t, -1), torch.arange(b * t).view(b, t) % shape[0]):
        one = left if factor.ndim == 3 else functional.one_hot(factor.flatten(), shape[0]).float()
        sides = rows.groups(one, groups[0], number), columns.groups(right, groups[1], number)
        wanted = torch.einsum("kbtr,kbtc->bkrc", *(side.unflatten(1, (b, t)) for side in sides)).flatten(1)
        ordered = (right.view(b, t, -1), factor) if fused.is_turned else (factor, right.view(b, t, -1))
        found.append(torch.allclose(fused.products(*ordered), wanted, rtol=1e-4, atol=1e-4 * float(wanted.std())))
    return all(found)


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
    """Whether a factor's numbers lie in this process's memory as float32 or less, and no derivative is wanted."""
    if type(factor) not in (Tensor, torch.nn.Parameter) or factor.device.type != "cpu" or not factor.numel():
        return False
    if factor.ndim == 2:
        return factor.dtype == torch.int64 and int(factor.min()) >= 0 and int(factor.max()) < size
    exact = factor.dtype in (torch.float32, torch.bfloat16, torch.float16) and factor.shape[2] == size
    return exact and not (factor.requires_grad and torch.is_grad_enabled()) and not torch.compiler.is_compiling()


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
