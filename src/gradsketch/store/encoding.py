"""Sketches as stored numbers: float32, bfloat16, float16, int8, int4 or signs, each row with one float32 scale.

A row is ``stored * scale``. Gradients span many orders of magnitude, so float16 rows are divided by a power of two
that brings their largest entry into (1/2, 1] (exact, and nothing underflows that matters); int8 rows by a 127th of
their largest entry. float32 and bfloat16 keep the exponent themselves and have scale 1.

int4 and sign pack several numbers into a byte. They serve numbers that are nearly normal, and some entries of a sketch
are not: a bias adds its gradient to few of them. So a row is first turned by signs and Hadamard transforms of up to
4096 numbers, which keep inner products, and a query is turned alike instead of every row being turned back. int4 rounds
to fifteen steps up to three times a row's root mean square. The scale of such a row makes its product with the sketch
it stands for the sketch's squared norm, so that products with other vectors are not biased towards zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from gradsketch.errors import NonFiniteError
from gradsketch.random import Stream
from gradsketch.transforms.hadamard import LocalHadamard

__all__ = [
    "DTYPES",
    "decode",
    "encode",
    "row_bytes",
    "stored_count",
    "stored_type",
    "stored_width",
    "turned",
    "unpacked",
]

_PLAIN = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_PACKED = {"int4": 2, "sign": 8}  # numbers in a byte
DTYPES = (*_PLAIN, *_PACKED)
# Packed rows are turned in blocks of so many numbers; the rest in smaller ones, the last of them padded with zeros.
_BLOCK, _SMALLEST_BLOCK = 4096, 64
# int4: of every 64 numbers the first half stands in the low halves of 32 bytes, so that both are unpacked as runs.
_RUN = 32
_LARGEST = 2.0**126  # of a row's norm
_LARGEST_INT4, _CLIPPED_AT = 7, 3.0  # root mean squares


def stored_type(dtype: str) -> torch.dtype:
    """Return the torch dtype of what is stored under this name."""
    return _PLAIN.get(dtype, torch.uint8)


def stored_count(width: int, d: int, dtype: str) -> int:
    """Return how many numbers stand for the first ``width`` of a sketch of length ``d``, or for a few more of them."""
    if dtype not in _PACKED:
        return width
    start, stop, length = next(block for block in _blocks(d) if block[1] >= width)
    return min(stop, start - (start - width) // length * length)


def stored_width(d: int, dtype: str) -> int:
    """Return how many entries of ``stored_type`` a sketch of length ``d`` takes."""
    return stored_count(d, d, dtype) // _PACKED.get(dtype, 1)


def row_bytes(d: int, dtype: str) -> int:
    """Return the bytes of a stored sketch of length ``d``."""
    return stored_width(d, dtype) * stored_type(dtype).itemsize


def encode(
    sketches: Float[Tensor, "rows d"], dtype: str
) -> tuple[Shaped[Tensor, "rows width"], Float[Tensor, " rows"]]:
    """Return stored numbers and the scale of each row, on the CPU.

    Relative to a row's largest entry the rounding error is at most 2^-12 (float16), 2^-9 (bfloat16, relative to each
    entry), 1/254 (int8).

    Raises:
        NonFiniteError: a sketch holds a NaN or an infinity, or its norm is near the end of float32.
    """
    sketches = sketches.detach().to("cpu", torch.float32)
    largest = sketches.abs().amax(dim=-1) if sketches.numel() else sketches.new_zeros(len(sketches))
    # So that scale, norm and rounded numbers are finite too.
    bad = (~(largest <= _LARGEST / max(1, sketches.shape[1]) ** 0.5)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"the sketch of row {bad[0]} of a batch of {len(sketches)} holds a NaN, an infinity, or numbers whose norm "
            "is beyond float32",
            "finite sketches only",
            "Find the example whose loss or gradient is not finite, or leave it out",
        )
    if dtype in _PACKED:
        return _packed(turned(sketches / _nonzero(largest)[:, None], dtype), largest, dtype)
    scale = torch.ones(len(sketches), dtype=torch.float32, device="cpu")
    if dtype in ("float16", "int8"):
        scale = _nonzero(largest / 127 if dtype == "int8" else torch.exp2(torch.ceil(torch.log2(largest))))
    stored = sketches / scale[:, None]
    return (stored.round() if dtype == "int8" else stored).to(_PLAIN[dtype]), scale


def decode(
    stored: Shaped[Tensor, "rows width"], scale: Float[Tensor, " rows"], d: int, dtype: str
) -> Float[Tensor, "rows d"]:
    """Return float32 sketches."""
    numbers = unpacked(stored, stored_count(d, d, dtype), dtype)
    if dtype in _PACKED:
        numbers = (_transformed(numbers, d) * _signs(numbers.shape[1]).to(numbers.device))[:, :d]
    return numbers * scale[:, None].to(torch.float32)


def turned(x: Float[Tensor, "rows d"], dtype: str) -> Float[Tensor, "rows count"]:
    """Return vectors as ``unpacked`` gives those that are stored, so that inner products are those of the sketches."""
    if dtype not in _PACKED:
        return x
    count = stored_count(x.shape[1], x.shape[1], dtype)
    padded = torch.nn.functional.pad(x, (0, count - x.shape[1])) * _signs(count).to(x.device)
    return _transformed(padded, x.shape[1])


def unpacked(
    stored: Shaped[Tensor, "rows width"], count: int, dtype: str, out: Float[Tensor, "rows count"] | None = None
) -> Float[Tensor, "rows count"]:
    """Return the first numbers of each row, ``stored_count`` of some d, in float32 without their scale.

    They are written to ``out`` where it is given. Of int4 and signs they are those of turned sketches.
    """
    out = torch.empty(len(stored), count, device=stored.device, dtype=torch.float32) if out is None else out
    if dtype == "int4":
        return _unpack_int4(stored, count, out)
    return _unpack_signs(stored, count, out) if dtype == "sign" else out.copy_(stored[:, :count])


def _blocks(d: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, length): numbers ``start … stop-1`` of a sketch are turned in blocks of so many."""
    start, length = 0, _BLOCK
    while start < d:
        fitting = (d - start) // length if length > _SMALLEST_BLOCK else -(-(d - start) // length)
        stop = start + fitting * length
        if stop > start:
            yield start, stop, length
        start, length = stop, length // 2


def _transformed(x: Float[Tensor, "rows count"], d: int) -> Float[Tensor, "rows count"]:
    """Return blockwise Hadamard transforms, which are their own inverse."""
    if not len(x):
        return x
    parts = [
        LocalHadamard(stop - start, length).apply_(x[:, start:stop].contiguous()) for start, stop, length in _blocks(d)
    ]
    return torch.cat(parts, dim=1)


@cache
def _signs(count: int) -> Float[Tensor, " count"]:
    return Stream(0, "store", "turn").signs(0, count)


def _nonzero(scale: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return 1 for rows of zeros, and for rows so small that the scale itself would underflow."""
    return torch.where(
        scale < torch.finfo(torch.float32).tiny, torch.ones((), dtype=torch.float32, device="cpu"), scale
    )


def _packed(
    x: Float[Tensor, "rows count"], largest: Float[Tensor, " rows"], dtype: str
) -> tuple[UInt8[Tensor, "rows width"], Float[Tensor, " rows"]]:
    """Pack turned rows that were divided by their largest entry; scale them so that <row, stored> = ‖row‖²."""
    stored = _pack_int4(x) if dtype == "int4" else _pack_signs(x)
    product = (unpacked(stored, x.shape[1], dtype).double() * x.double()).sum(dim=1)
    scale = x.double().square().sum(dim=1) / product * largest.double()
    return stored, torch.where(product > 0, scale, 0.0).float()


def _pack_int4(x: Float[Tensor, "rows count"]) -> UInt8[Tensor, "rows width"]:
    step = _nonzero(x.square().mean(dim=1).sqrt()) * (_CLIPPED_AT / _LARGEST_INT4)
    codes = (x / step[:, None]).round().clamp(-_LARGEST_INT4, _LARGEST_INT4) + _LARGEST_INT4
    low, high = codes.to(torch.uint8).view(len(x), x.shape[1] // (2 * _RUN), 2, _RUN).unbind(dim=2)
    return (low | high << 4).flatten(1)


def _unpack_int4(
    stored: UInt8[Tensor, "rows width"], count: int, out: Float[Tensor, "rows count"]
) -> Float[Tensor, "rows count"]:
    runs = stored[:, : count // 2].reshape(len(stored), count // (2 * _RUN), _RUN)
    pairs = out.view(len(stored), count // (2 * _RUN), 2, _RUN)
    pairs[:, :, 0].copy_(runs & 15)
    pairs[:, :, 1].copy_(runs >> 4)
    return out.sub_(_LARGEST_INT4)


def _pack_signs(x: Float[Tensor, "rows count"]) -> UInt8[Tensor, "rows width"]:
    bits = (x >= 0).to(torch.uint8).view(len(x), x.shape[1] // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(dim=2, dtype=torch.uint8)


def _unpack_signs(
    stored: UInt8[Tensor, "rows width"], count: int, out: Float[Tensor, "rows count"]
) -> Float[Tensor, "rows count"]:
    octets = torch.embedding(_signs_of_bytes().to(out.device), stored[:, : count // 8].int())
    return out.copy_(octets.view(len(stored), count))


@cache
def _signs_of_bytes() -> Float[Tensor, "256 8"]:
    """Return the eight signs that each byte stands for: one look-up in place of eight shifts."""
    bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
    return (2 * bits - 1).float()
