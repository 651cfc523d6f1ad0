"""The Fourier transform as an orthonormal map of real vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float, Int64
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.transforms.base import Transform
from gradsketch.transforms.pieces import piece_length
from gradsketch.transforms.precision import one_thread

__all__ = ["Fourier"]


class Fourier(Transform):
    """The unitary Fourier transform of length n/2 on numbers x_0 + i·x_1, x_2 + i·x_3, …, read as n real numbers.

    This convention, and not the half spectrum of a real transform, because it is as orthonormal and as flat and can be
    made in place: lengths that are powers of two need cache-sized memory only, others about one and a half vectors.
    ``torch.fft.rfft`` needs several (benchmarks/transform_speed.py).

    Source of the steps in place: D. Bailey, "FFTs in external or hierarchical memory", J. Supercomputing 1990.

    Raises:
        InputError: n is odd.
    """

    def __init__(self, n: int) -> None:
        if n < 2 or n % 2:
            raise InputError(f"n={n}", "an even length", f"Pad the vectors with a zero and type n={max(2, n + 1)}")
        self.shape = (n, n)

    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        transform = torch.fft.ifft if adjoint else torch.fft.fft
        length, fits = self.n // 2, self.n <= piece_length(x.device)
        with one_thread(x.device):  # float32 results of one long vector depend on their number
            for vector in torch.view_as_complex(x.view(len(x), -1, 2)):
                if fits or length & (length - 1):
                    transform(vector, norm="ortho", out=vector)
                else:
                    _long_fourier_(vector, adjoint)


def _long_fourier_(x: Complex[Tensor, " m"], inverse: bool) -> None:
    """Overwrite a vector whose length m is a power of two by its transform, some columns or rows at a time.

    As a tensor [R, s, R], s = 1 or 2, with row k1 and output index k1 + R·(h + s·k2): transform along the first dim,
    multiply entry (k1, c) by exp(−2πi·k1·c/m), transform the rows of length s·R and leave them in the order (h, k2),
    exchange k1 and k2. Strided parts are copied before use: reads a power of two apart evict one another.
    """
    transform = torch.fft.ifft if inverse else torch.fft.fft
    side, held = 1 << (len(x).bit_length() - 1) // 2, piece_length(x.device) // 2
    columns, rows = x.view(side, -1), x.view(side, -1, side)
    width = held // side
    rising = _roots(x, side, torch.arange(width, device="cpu"), inverse)
    for number, panel in enumerate(columns.split(width, dim=1)):
        mixed = transform(panel.contiguous(), dim=0, norm="ortho")
        mixed *= _roots(x, side, torch.tensor([number * width], device="cpu"), inverse)
        panel.copy_(mixed.mul_(rising))
    for some in rows.split(held // columns.shape[1]):
        some.copy_(transform(some.flatten(1), norm="ortho").view(len(some), side, -1).mT)
    for h in range(rows.shape[1]):
        _transpose_(rows[:, h], width)


def _roots(
    x: Complex[Tensor, " m"], rows: int, columns: Int64[Tensor, " c"], inverse: bool
) -> Complex[Tensor, "rows c"]:
    """Return exp(∓2πi·k·c/m) for the rows k and some columns c, like x, from angles in float64."""
    angle = (
        torch.outer(torch.arange(rows, device="cpu"), columns)
        .to(torch.float64)
        .mul_((2 if inverse else -2) * math.pi / len(x))
    )
    return torch.polar(torch.ones_like(angle), angle).to(x)


def _transpose_(square: Complex[Tensor, "r r"], width: int) -> None:
    """Transpose in place, ``width`` rows and columns at a time."""
    for first in range(0, len(square), width):
        last = first + width
        corner = square[first:last, first:last]
        corner.copy_(corner.clone().T)
        right, below = square[first:last, last:], square[last:, first:last]
        kept = right.clone()
        right.copy_(below.contiguous().T)
        below.copy_(kept.T)
