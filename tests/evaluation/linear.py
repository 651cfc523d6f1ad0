"""Ridge regression: training is exact and instant, so the truth about removing rows is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradsketch.random import Stream

RIDGE = 1.0


class Regression:
    """40 training rows, 6 queries, 5 features; ``train`` and ``measure`` as the evaluations take them."""

    def __init__(self, seed: int = 0, rows: int = 40, queries: int = 6, features: int = 5) -> None:
        stream = Stream(seed, "regression")
        self.x = stream.normals(0, rows * features, dtype=torch.float64).view(rows, features)
        self.q = stream.normals(10**6, queries * features, dtype=torch.float64).view(queries, features)
        truth = stream.normals(2 * 10**6, features, dtype=torch.float64)
        self.y = self.x @ truth + stream.normals(3 * 10**6, rows, dtype=torch.float64)
        self.t = self.q @ truth + 2.0
        self.trained = 0

    def train(self, rows: list[int]) -> nn.Module:
        self.trained += 1
        model = nn.Linear(self.x.shape[1], 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(self._solve(self.x[rows], self.y[rows]))
        return model

    def measure(self, model: nn.Module) -> Tensor:
        return (model(self.q)[:, 0] - self.t).square()

    def influences(self) -> Tensor:
        """Return for every query and row the rise of the query's loss when the row goes, to first order [q, n]."""
        weight = self._solve(self.x, self.y)
        residuals = self.y - self.x @ weight
        hessian = self.x.T @ self.x + RIDGE * torch.eye(self.x.shape[1], dtype=torch.float64)
        shift = -torch.linalg.solve(hessian, (self.x * residuals[:, None]).T)  # weight without a row, minus weight
        return 2 * (self.q @ weight - self.t)[:, None] * (self.q @ shift)

    def _solve(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
