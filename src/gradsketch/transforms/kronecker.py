"""Kronecker products of small matrices, applied to long vectors in one or two passes over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.transforms.pieces import piece_length
from gradsketch.transforms.precision import equal_threads, full_precision

__all__ = ["FactorList", "apply_factors", "balanced_sizes", "equal_powers", "kronecker_"]

Factors = Sequence[Float[Tensor, "_ _"]]
# Intel's library takes other steps, which round otherwise, for single rows and for what is left of such a number.
_ROWS = 64


class FactorList:
    """Matrices drawn once in float64 on the CPU, and their copies wherever they are needed."""

    def __init__(self, matrices: Factors) -> None:
        self._matrices = tuple(matrices)
        self._copies: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_copies": {}}

    def like(self, x: Tensor, *, adjoint: bool = False) -> list[Float[Tensor, "_ _"]]:
        """Return the matrices, or their transposes, in the dtype and on the device of a tensor."""
        key = x.dtype, x.device
        if key not in self._copies:
            self._copies[key] = tuple(m.to(x) for m in self._matrices)
        return [m.T if adjoint else m for m in self._copies[key]]


def apply_factors(
    source: Tensor, factors: Factors, buffers: tuple[Tensor, Tensor], *, inner: int = 1, out: Tensor | None = None
) -> Tensor:
    """Return (F1 ⊗ … ⊗ FK ⊗ I_inner) applied to every contiguous stretch of ``source``, flattened.

    Writes the products to the buffers in turn, beginning with the first, so ``source`` may lie in the second; the last
    product goes to ``out`` where given, which may be ``source`` itself if there are two factors or more.
    """
    current, size = source, source.numel()
    with full_precision(source.device), equal_threads(source.device):
        for step, factor in enumerate(reversed(factors)):
            rows, columns = factor.shape
            size = size // columns * rows
            last = out is not None and step == len(factors) - 1
            target = out if last and out is not None else buffers[step % 2].view(-1)[:size]
            if inner == 1:
                _rows_times(current.view(-1, columns), factor, target.view(-1, rows))
            else:
                stacked = current.view(-1, columns, inner)
                torch.bmm(factor.expand(len(stacked), -1, -1), stacked, out=target.view(-1, rows, inner))
            current, inner = target, inner * rows
    return current


def _rows_times(x: Float[Tensor, "m c"], factor: Float[Tensor, "r c"], out: Float[Tensor, "m r"]) -> None:
    """Write x Fᵀ to ``out``, each row with the same bits however many there are."""
    columns = factor.T.contiguous()
    if x.device.type != "cpu" or not len(x) % _ROWS:
        torch.mm(x, columns, out=out)
    else:
        whole = x.new_zeros(-(-len(x) // _ROWS) * _ROWS, x.shape[1])
        whole[: len(x)] = x
        out.copy_((whole @ columns)[: len(x)])


def kronecker_(x: Float[Tensor, "b n"], factors: Factors) -> None:
    """Replace each vector by (F1 ⊗ … ⊗ FK) times it, square factors, in place.

    The trailing factors act on contiguous rows that fit in cache; the leading ones on panels of columns copied there.
    """
    limit = piece_length(x.device)
    length, split = 1, len(factors)
    while split > 0 and length * len(factors[split - 1]) <= limit:
        split -= 1
        length *= len(factors[split])
    buffers = x.new_empty(min(limit, x.numel())), x.new_empty(min(limit, x.numel()))
    rows = x.view(-1, length)
    step = max(1, limit // length)
    for part in rows.split(step):
        _in_place(part, factors[split:], buffers)
    if split:
        panels = x.view(len(x), -1, length)
        width = limit // panels.shape[1]
        for vector in panels:
            for panel in vector.split(width, dim=1):
                _columns(panel, factors[:split], buffers)


def _in_place(x: Tensor, factors: Factors, buffers: tuple[Tensor, Tensor]) -> None:
    if len(factors) == 1:
        x.view(-1).copy_(apply_factors(x, factors, buffers))
    else:
        apply_factors(x, factors, buffers, out=x)


def _columns(panel: Float[Tensor, "rows columns"], factors: Factors, buffers: tuple[Tensor, Tensor]) -> None:
    first, second = buffers
    copied = second[: panel.numel()].view_as(panel).copy_(panel)
    panel.copy_(apply_factors(copied, factors, (first, second), inner=panel.shape[1]).view_as(panel))


def balanced_sizes(n: int, *, largest: int) -> tuple[int, ...]:
    """Return the fewest powers of two, at most ``largest`` and as equal as possible, whose product is n."""
    return equal_powers(n, max(1, -(-(n.bit_length() - 1) // (largest.bit_length() - 1))))


def equal_powers(n: int, count: int) -> tuple[int, ...]:
    """Return ``count`` powers of two, as equal as possible, whose product is n, a power of two."""
    bits = n.bit_length() - 1
    return tuple(1 << (bits * (i + 1) // count - bits * i // count) for i in range(count))
