"""Dense: independent entries, drawn again whenever they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.forms import power_of_two_at_least
from gradsketch.sketches.recipe import register
from gradsketch.transforms.precision import full_precision, one_thread

__all__ = ["Dense"]

# One draw fills a block of this many rows and columns (fewer columns where n is smaller).
_ROWS, _COLUMNS = 64, 4096
# Vectors multiplied at a time. Batches are padded to it: products of one fixed shape round alike for every batch.
_VECTORS = 16


@register
class Dense(Sketch):
    """A d × n matrix of independent entries, Gaussian or ±1, over √d: the yardstick for all others.

    Never stored: blocks of 64 × 4096 entries are drawn, used for the whole batch and dropped, so the cost is that of
    n·d random numbers a call, shared by the vectors of the batch. Sizes nest as prefixes.

    Example:
        >>> phi = gs.Dense(1000, 10, distribution="rademacher")
        >>> phi.dense().abs().unique() * 10**0.5
        tensor([1.], dtype=torch.float64)

    Raises:
        InputError: n, d or the distribution is not one of those allowed.
    """

    nesting = "prefix"

    def __init__(
        self, n: int, d: int, *, seed: int = 0, distribution: Literal["gaussian", "rademacher"] = "gaussian"
    ) -> None:
        super().__init__(n, d, seed=seed)
        self.distribution = self._choice("distribution", distribution, ("gaussian", "rademacher"))
        self._width = min(_COLUMNS, power_of_two_at_least(n))

    def options(self) -> dict[str, str | int | float | bool]:
        return {"distribution": self.distribution}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        out = x.new_zeros(_padded(len(x)), self.d, dtype=widened(x.dtype))
        for block in self._blocks(out):
            part = out.new_zeros(len(out), self._width)
            part[: len(x), : block.columns.stop - block.columns.start] = x[:, block.columns]
            with one_thread(out.device):
                for vectors, sums in zip(part.split(_VECTORS), out[:, block.rows].split(_VECTORS), strict=True):
                    sums += vectors @ block.entries.T
        return out[: len(x)].mul_(self.d**-0.5)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        out = w.new_zeros(_padded(len(w)), self.n, dtype=widened(w.dtype))
        scaled = out.new_zeros(len(out), self.d)
        scaled[: len(w)] = w
        scaled.mul_(self.d**-0.5)
        for block in self._blocks(out):
            columns = block.entries.T.contiguous()
            length = block.columns.stop - block.columns.start
            with one_thread(out.device):
                for vectors, sums in zip(
                    scaled[:, block.rows].split(_VECTORS), out[:, block.columns].split(_VECTORS), strict=True
                ):
                    sums += (vectors @ columns.T)[:, :length]
        return out[: len(w)]

    def _blocks(self, like: Tensor) -> Iterator[_Block]:
        """Yield every block of the unscaled matrix, drawn on the device and in the dtype of ``like``."""
        across = -(-self.n // self._width)
        draw = self.stream.normals if self.distribution == "gaussian" else self.stream.signs
        with full_precision(like.device):
            for top in range(0, self.d, _ROWS):
                rows = slice(top, min(top + _ROWS, self.d))
                for left in range(0, self.n, self._width):
                    index = (top // _ROWS * across + left // self._width) * _ROWS * self._width
                    count = (rows.stop - rows.start) * self._width
                    entries = draw(index, count, dtype=like.dtype, device=like.device).view(-1, self._width)
                    yield _Block(rows, slice(left, min(left + self._width, self.n)), entries)


@dataclass(frozen=True)
class _Block:
    """Some rows and columns of the matrix; entries beyond column n are there, to be left out."""

    rows: slice
    columns: slice
    entries: Float[Tensor, "rows width"]


def _padded(b: int) -> int:
    return -(-b // _VECTORS) * _VECTORS
