"""Kronecker products of small matrices in JAX, every product in full precision.

Without ``Precision.HIGHEST`` a TPU multiplies float32 as bfloat16, wrong by 1e-3 and silent, and a GPU may use TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

__all__ = ["einsum", "hadamard", "hadamard_matrix", "kronecker"]

# Wider factors than on a CPU with torch: XLA makes a pass over memory for each, and matrix units are at least so wide.
_FACTOR_BITS = 6


def einsum(equation: str, *operands: Any) -> Array:
    """Return ``jnp.einsum`` in full precision."""
    product: Array = jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)
    return product


def kronecker(x: Float[Array, " columns"], factors: Sequence[Float[np.ndarray, "_ _"]]) -> Float[Array, " rows"]:
    """Return (F1 ⊗ … ⊗ FK) x, the last factor first."""
    after = 1
    for factor in reversed(factors):
        rows, columns = factor.shape
        x = einsum("ij,ajb->aib", factor.astype(x.dtype), x.reshape(-1, columns, after)).reshape(-1)
        after *= rows
    return x


def hadamard(x: Float[Array, " n"], length: int) -> Float[Array, " n"]:
    """Return orthonormal Walsh–Hadamard transforms of consecutive blocks; ``length`` is a power of two."""
    bits = length.bit_length() - 1
    count = -(-bits // _FACTOR_BITS)
    sizes = [1 << (bits * (i + 1) // count - bits * i // count) for i in range(count)]
    return kronecker(x, [hadamard_matrix(size) * size**-0.5 for size in sizes])


@cache
def hadamard_matrix(n: int) -> Float[np.ndarray, "n n"]:
    """Return the ±1 Hadamard matrix in Sylvester order."""
    index = np.arange(n)
    matrix: np.ndarray = 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) & 1)
    return matrix
