"""Explicit matrices as linear maps, with spectra that are known and awkward."""

import torch
from torch import Tensor

from gradsketch.linear_map import LinearMap


class Matrix(LinearMap):
    """x ↦ A x for an explicit A; counts its products."""

    def __init__(self, matrix: Tensor, is_self_adjoint: bool = True) -> None:
        self.matrix, self.shape, self.is_self_adjoint = matrix, (matrix.shape[0], matrix.shape[1]), is_self_adjoint
        self.dtype, self.device = matrix.dtype, matrix.device
        self.products = 0

    def __repr__(self) -> str:
        return f"Matrix{self.shape}"

    def _apply(self, x: Tensor) -> Tensor:
        self.products += len(x)
        return x @ self.matrix.T

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        return w @ self.matrix


def rotated(eigenvalues: Tensor, seed: int = 0) -> Matrix:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    matrix = (basis * eigenvalues.double()) @ basis.T
    return Matrix(((matrix + matrix.T) / 2).to(eigenvalues.dtype))


def spectra(n: int = 400) -> dict[str, Tensor]:
    """Return float64 eigenvalues by name: ten leaders, or as many as the name says, above a bulk of order one."""
    bulk = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaders = torch.tensor([100.0, 80, 60, 40, 30, 25, 20, 16, 13, 11], dtype=torch.float64)
    edge = torch.linspace(26, 14, n // 20, dtype=torch.float64)
    return {
        "one-sided": torch.cat([leaders, bulk[10:].abs()]),
        "two-sided": torch.cat([leaders[::2], -leaders[1::2], bulk[10:]]),
        "clustered": torch.cat([50 + 1e-3 * torch.arange(10, dtype=torch.float64), bulk[10:]]),
        "dense edge": torch.cat([edge, -edge, bulk[2 * len(edge) :]]),
        "power law": 100 / torch.arange(1, n + 1, dtype=torch.float64),
        "degenerate": torch.cat([torch.tensor([50.0] * 3 + [40.0] * 2 + [-30.0] * 3), bulk[8:] / 10]).double(),
    }
