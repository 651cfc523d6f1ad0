"""Sketches small enough to write down, for tests that ask nothing of a sketch but linearity."""

import torch
from torch import Tensor

from gradsketch.sketches.base import Sketch


class Gaussian(Sketch):
    """A stored Gaussian matrix."""

    def __init__(self, n: int, d: int, *, seed: int = 0) -> None:
        super().__init__(n, d, seed=seed)
        self.matrix = torch.randn(d, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / d**0.5

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T.to(x.dtype)

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        return w @ self.matrix.to(w.dtype)


class Identity(Sketch):
    """Every direction: d = n."""

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Tensor) -> Tensor:
        return x

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        return w
