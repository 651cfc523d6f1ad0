"""What storing sketches in few bits costs: Pearson r of questions in float32 with rows as an index would hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gradsketch.evaluation.quality import sketch_quality
from gradsketch.store.encoding import decode, encode, row_bytes
from gradsketch.table import aligned

__all__ = ["DTYPES", "Stored", "cheapest", "stored_qualities", "stored_table"]

# From the finest to the cheapest. bfloat16 takes the bytes of float16, and float32 twice as many, for no better r.
DTYPES = ("float16", "int8", "int4", "sign")


@dataclass(frozen=True)
class Stored:
    """Rows of ``d`` numbers stored as ``dtype``: the ``bytes`` of a sketch, and Pearson's r.

    ``pearson_interval`` covers 95 % around ``pearson``.
    """

    d: int
    dtype: str
    bytes: int
    pearson: float
    pearson_interval: tuple[float, float]


def stored_qualities(exact: Float[Tensor, "b b"], sketches: Sequence[Float[Tensor, "b _"]]) -> tuple[Stored, ...]:
    """Return how well rows of every given size and store dtype keep inner products with questions in float32.

    Raises:
        InputError: fewer than three examples with a gradient.
    """
    return tuple(_stored(exact, part, dtype) for part in sketches for dtype in DTYPES)


def cheapest(stored: Sequence[Stored], wanted: float) -> Stored | None:
    """Return the fewest bytes whose interval for r lies above ``wanted``; of equal bytes the larger r."""
    enough = [each for each in stored if each.pearson_interval[0] >= wanted]
    return min(enough, key=lambda each: (each.bytes, -each.pearson), default=None)


def stored_table(stored: Sequence[Stored]) -> list[str]:
    """Return Pearson r as lines of text: a row for each size, a column for each store dtype."""
    found = {(each.d, each.dtype): each for each in stored}
    sizes = sorted({each.d for each in stored})
    cells = [[f"{d:,}", *(f"{found[d, dtype].pearson:.4f}" for dtype in DTYPES)] for d in sizes]
    return aligned(["d", *(f"r as {dtype}" for dtype in DTYPES)], cells)


def _stored(exact: Float[Tensor, "b b"], sketches: Float[Tensor, "b d"], dtype: str) -> Stored:
    d = sketches.shape[1]
    quality = sketch_quality(exact, sketches, decode(*encode(sketches.float(), dtype), d, dtype))
    return Stored(d, dtype, row_bytes(d, dtype), quality.pearson, quality.pearson_interval)
