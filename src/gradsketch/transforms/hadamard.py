"""Walsh–Hadamard transforms, over the whole vector or over blocks of it."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.transforms.base import Transform
from gradsketch.transforms.kronecker import kronecker_

__all__ = ["Hadamard", "LocalHadamard", "check_power_of_two", "hadamard_factors", "hadamard_matrix"]

# H_n = H_16 ⊗ H_16 ⊗ …: products 16 wide cost a CPU least per bit of n, half the time of butterflies
# (benchmarks/transform_speed.py), and their entries ±1/4 lose no precision.
_FACTOR_BITS = 4


class Hadamard(Transform):
    """The orthonormal Walsh–Hadamard transform in Sylvester order: H[i, j] = n^(-1/2) (−1)^popcount(i & j).

    Example:
        >>> Hadamard(2)(torch.tensor([3.0, 1.0]))
        tensor([2.8284, 1.4142])

    Raises:
        InputError: n is not a power of two.
    """

    is_self_adjoint = True

    def __init__(self, n: int) -> None:
        check_power_of_two("n", n)
        self.shape = (n, n)

    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        kronecker_(x, hadamard_factors(self.n, x.dtype, x.device))


class LocalHadamard(Transform):
    """Walsh–Hadamard transforms of consecutive blocks: I ⊗ H_length.

    Raises:
        InputError: length is not a power of two, or n not a multiple of it.
    """

    is_self_adjoint = True

    def __init__(self, n: int, length: int) -> None:
        check_power_of_two("length", length)
        if n < 1 or n % length:
            raise InputError(f"n={n} with length={length}", "a multiple of the length", "Pad the vectors with zeros")
        self.shape, self.length = (n, n), length

    def __repr__(self) -> str:
        return f"LocalHadamard(n={self.n}, length={self.length})"

    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        kronecker_(x.view(-1, self.length), hadamard_factors(self.length, x.dtype, x.device))


def hadamard_factors(n: int, dtype: torch.dtype, device: torch.device) -> list[Float[Tensor, "_ _"]]:
    """Return small Hadamard matrices whose Kronecker product is H_n, n a power of two."""
    bits = n.bit_length() - 1
    first = [1 << bits % _FACTOR_BITS] if bits % _FACTOR_BITS or not bits else []
    return [hadamard_matrix(b, dtype, device) for b in first + [1 << _FACTOR_BITS] * (bits // _FACTOR_BITS)]


@cache
def hadamard_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n n"]:
    """Return H_n, orthonormal and in Sylvester order, built in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    while len(matrix) < n:
        matrix = torch.kron(two, matrix)
    return matrix.mul_(n**-0.5).to(device=device, dtype=dtype)


def check_power_of_two(name: str, value: int) -> None:
    """Raise an error that names the nearest powers of two."""
    if value < 1 or value & (value - 1):
        below = 1 << max(value.bit_length() - 1, 0)
        raise InputError(f"{name}={value}", "a power of two", f"Type {name}={below} or {name}={2 * below}")
