"""A classifier of a tenth of a second, on points that this module draws: to try things on, with torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsketch.as_found import seeded
from gradsketch.demo.training import train_model
from gradsketch.gradients.tasks import Classification

__all__ = ["Clouds", "three_clouds"]

ROWS, CLASSES, WIDTH, HIDDEN = 60, 3, 16, 32


@dataclass(frozen=True)
class Clouds:
    """A trained model, its task, and the rows it was trained on: pairs of a point and the number of its cloud."""

    model: nn.Module
    task: Classification
    rows: list[tuple[Tensor, int]]


def three_clouds() -> Clouds:
    """Return a small network that has learned to tell three clouds of points in 16 dimensions apart.

    There are 60 rows; row i is of cloud i % 3. The network has 643 parameters. It needs nothing but torch.

    Example:
        >>> from gradsketch.demo.clouds import three_clouds
        >>> point, label = three_clouds().rows[4]
        >>> point.shape, label
        (torch.Size([16]), 1)
    """
    with seeded(0):
        centres = 2 * torch.randn(CLASSES, WIDTH, device="cpu", dtype=torch.float32)
        noise = torch.randn(ROWS, WIDTH, device="cpu", dtype=torch.float32)
        rows = [(centres[i % CLASSES] + noise[i], i % CLASSES) for i in range(ROWS)]
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
        train_model(model, task := Classification(), rows, rate=3e-3, epochs=5, batch=10)
    return Clouds(model.eval(), task, rows)
