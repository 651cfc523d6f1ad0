"""Sketches as stored numbers: float16, bfloat16, float32 or int8, each row with one float32 scale.

A row is ``stored * scale``. Gradients span many orders of magnitude, so float16 rows are divided by a power of two
that brings their largest entry into (1/2, 1] (exact, and nothing underflows that matters); int8 rows by a 127th of
their largest entry. float32 and bfloat16 keep the exponent themselves and have scale 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gradsketch.errors import NonFiniteError

__all__ = ["bytes_per_entry", "decode", "encode", "torch_dtype"]

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype with this name."""
    return _TORCH[dtype]


def bytes_per_entry(dtype: str) -> int:
    """Return the size of one stored number."""
    return _TORCH[dtype].itemsize


def encode(sketches: Float[Tensor, "rows d"], dtype: str) -> tuple[Shaped[Tensor, "rows d"], Float[Tensor, " rows"]]:
    """Return stored numbers and the scale of each row, on the CPU.

    Relative to a row's largest entry the rounding error is at most 2^-12 (float16), 2^-9 (bfloat16, relative to each
    entry), 1/254 (int8).

    Raises:
        NonFiniteError: a sketch holds a NaN or an infinity.
    """
    sketches = sketches.detach().to("cpu", torch.float32)
    largest = sketches.abs().amax(dim=-1) if sketches.numel() else sketches.new_zeros(len(sketches))
    bad = (~torch.isfinite(largest)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"the sketch of row {bad[0]} of a batch of {len(sketches)} holds a NaN or an infinity",
            "finite sketches only",
            "Find the example whose loss or gradient is not finite, or leave it out",
        )
    scale = torch.ones(len(sketches))
    if dtype in ("float16", "int8"):
        scale = largest / 127 if dtype == "int8" else torch.exp2(torch.ceil(torch.log2(largest)))
        # Zero rows, and rows so small that the scale itself would underflow.
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones(()), scale)
    stored = sketches / scale[:, None]
    return (stored.round() if dtype == "int8" else stored).to(_TORCH[dtype]), scale


def decode(stored: Shaped[Tensor, "rows d"], scale: Float[Tensor, " rows"]) -> Float[Tensor, "rows d"]:
    """Return float32 sketches."""
    return stored.to(torch.float32) * scale[:, None].to(torch.float32)
