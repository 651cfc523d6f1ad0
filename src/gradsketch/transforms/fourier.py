"""The Fourier transform as an orthonormal map of real vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.transforms.base import Transform
from gradsketch.transforms.precision import one_thread

__all__ = ["Fourier"]


class Fourier(Transform):
    """The unitary Fourier transform of length n/2 on numbers x_0 + i·x_1, x_2 + i·x_3, …, read as n real numbers.

    This convention, and not the half spectrum of a real transform, because it takes half the time and half the memory
    of ``torch.fft.rfft`` (benchmarks/transform_speed.py) and is as orthonormal and as flat. Besides its input the
    transform in place needs about one and a half vectors of working memory.

    Raises:
        InputError: n is odd.
    """

    def __init__(self, n: int) -> None:
        if n < 2 or n % 2:
            raise InputError(f"n={n}", "an even length", f"Pad the vectors with a zero and type n={max(2, n + 1)}")
        self.shape = (n, n)

    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        transform = torch.fft.ifft if adjoint else torch.fft.fft
        with one_thread(x.device):  # float32 results of one long vector depend on their number
            for vector in torch.view_as_complex(x.view(len(x), -1, 2)):
                transform(vector, norm="ortho", out=vector)
