"""Kronecker products of random orthogonal matrices, and of Hadamard matrices with permuted rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.random import Stream
from gradsketch.transforms.base import Transform
from gradsketch.transforms.hadamard import check_power_of_two, hadamard_matrix
from gradsketch.transforms.kronecker import FactorList, balanced_sizes, kronecker_
from gradsketch.transforms.precision import one_thread

__all__ = ["Haar", "PermutedHadamard", "haar_rows"]

# Products up to 64 wide round alike however many rows there are and however many threads share them.
_LARGEST_FACTOR = 64


class Haar(Transform):
    """Q1 ⊗ … ⊗ QK with each Qi drawn uniformly from the orthogonal matrices of its size, 64 at most.

    Raises:
        InputError: n is not a power of two.
    """

    def __init__(self, n: int, stream: Stream) -> None:
        check_power_of_two("n", n)
        self.shape, sizes = (n, n), balanced_sizes(n, largest=_LARGEST_FACTOR)
        self._factors = FactorList([haar_rows(stream.child(str(i)), b, b) for i, b in enumerate(sizes)])

    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        kronecker_(x, self._factors.like(x, adjoint=adjoint))


class PermutedHadamard(Transform):
    """(Π1 H) ⊗ … ⊗ (ΠK H): a Walsh–Hadamard transform with a random permutation inside each Kronecker factor.

    Raises:
        InputError: n is not a power of two.
    """

    def __init__(self, n: int, stream: Stream) -> None:
        check_power_of_two("n", n)
        self.shape, sizes = (n, n), balanced_sizes(n, largest=_LARGEST_FACTOR)
        cpu = torch.device("cpu")
        self._factors = FactorList(
            [hadamard_matrix(b, torch.float64, cpu)[stream.child(str(i)).permutation(b)] for i, b in enumerate(sizes)]
        )

    def _transform_(self, x: Float[Tensor, "b n"], *, adjoint: bool) -> None:
        kronecker_(x, self._factors.like(x, adjoint=adjoint))


def haar_rows(stream: Stream, rows: int, size: int) -> Float[Tensor, "rows size"]:
    """Return the first rows of a Haar-random orthogonal matrix, float64.

    Gram–Schmidt on independent normals (Mezzadri 2007): the QR decomposition whose R has a positive diagonal. The
    normals do not depend on ``rows``, so neither do the rows that are returned.
    """
    normals = stream.normals(0, rows * size, dtype=torch.float64).view(rows, size)
    with one_thread(normals.device):
        q, r = torch.linalg.qr(normals.T)
    rows_of_q: Tensor = q * r.diagonal().sign()
    return rows_of_q.T.contiguous()
