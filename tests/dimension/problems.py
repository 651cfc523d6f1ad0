"""Problems whose intrinsic dimension is known."""

import torch
from torch import Tensor, nn

import gradsketch as gs


class Hidden(nn.Module):
    """A loss that sees n parameters only through k orthonormal directions: solvable to the end in k dimensions.

    In d < k random directions the share (k − d)/k of the loss remains on average.
    """

    def __init__(self, n: int, k: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.theta = nn.Parameter(0.1 * torch.randn(n, generator=generator))
        self.register_buffer("directions", torch.linalg.qr(torch.randn(n, k, generator=generator))[0].T.contiguous())
        self.register_buffer("goal", torch.randn(k, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss once for every entry of x."""
        return (self.directions @ self.theta - self.goal).square().sum().expand(len(x))


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


ONE = torch.ones(1, 1)
LOSS = gs.Loss(losses, ONE)
