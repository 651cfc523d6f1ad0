"""What the kernels compute, in float64 on the CPU and in as few lines as possible."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gradsketch.kernels.plan import BLOCK
from gradsketch.random import Stream
from gradsketch.transforms.hadamard import Hadamard

__all__ = ["folded", "repeated"]


def folded(x: Float[Tensor, "b n"], width: int, first: Stream, second: Stream | None) -> Float[Tensor, "b width"]:
    """Return the sum over stretches of ``width`` of second · (I ⊗ H) · first · x, or of first · x if there is none."""
    multiple = max(BLOCK, width)
    y = functional.pad(x.cpu().double(), (0, -x.shape[-1] % multiple)) * _signs(first, x.shape[-1], multiple)
    if second is not None:
        y = Hadamard(BLOCK)(y.view(-1, BLOCK)).view_as(y) * _signs(second, x.shape[-1], multiple)
    return y.view(len(x), -1, width).sum(1)


def repeated(u: Float[Tensor, "b width"], n: int, first: Stream, second: Stream | None) -> Float[Tensor, "b n"]:
    """Apply the adjoint of ``folded``."""
    multiple = max(BLOCK, u.shape[-1])
    y = u.cpu().double().repeat(1, -(-n // multiple) * multiple // u.shape[-1])
    if second is not None:
        y = Hadamard(BLOCK)((y * _signs(second, n, multiple)).view(-1, BLOCK)).view_as(y)
    return (y * _signs(first, n, multiple))[:, :n]


def _signs(stream: Stream, n: int, multiple: int) -> Tensor:
    return stream.signs(0, -(-n // multiple) * multiple, dtype=torch.float64)
