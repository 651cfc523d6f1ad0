"""A Subspace over a model that FSDP2 shares out between two ranks; run as a module with the variables torchrun sets."""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy

import gradsketch as gs
from gradsketch.errors import GradsketchWarning
from ranks import IDS, Net, as_found, losses, net, refused
from ranks_curvature import error, rank, sharded


class Uneven(Net):
    """A layer of one row, of which one rank has no share, and one of three."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(16, 1), nn.Linear(1, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.wide(torch.tanh(self.narrow(self.words(ids)))).sum(-1, keepdim=True)


def own(parts: int = 1) -> tuple[Tensor, ...]:
    """Return this rank's half of the rows, in parts."""
    return IDS.chunk(2)[rank()].chunk(parts)


def mean_loss(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:])


def opened(model: nn.Module, kind: str = "BlockSum", d: int = 24, include: str = "*") -> gs.Subspace:
    parameters = gs.Parameters(model, include)
    made: Any = getattr(gs, kind)
    return gs.Subspace(model, parameters, made(parameters if kind == "BlockSum" else parameters.n, d))


def trajectory(subspace: gs.Subspace, parts: tuple[Tensor, ...], steps: int = 4, clip: float = 0.5) -> Tensor:
    """Return w after each step of Adam, with gradients accumulated over parts, and clipped."""
    optimiser, ws = torch.optim.Adam(subspace.parameters(), lr=0.02), []
    for _ in range(steps):
        optimiser.zero_grad()
        for ids in parts:
            (mean_loss(subspace, ids) / len(parts)).backward()
        nn.utils.clip_grad_norm_(subspace.parameters(), clip)
        optimiser.step()
        ws.append(subspace.w.detach().clone())
    return torch.stack(ws)


def training_is_that_of_one_process() -> None:
    for make, root, kind, include, parts in (
        (Net, True, "BlockSum", "*", 1),
        (Uneven, True, "AFFD", "*", 2),
        (partial(Net, checkpoints=True), True, "SJLT", "*", 1),
        (Uneven, False, "AFJL", "*", 1),
        (Net, True, "BlockSum", "blocks.1.*", 1),
    ):
        whole, model = net(make).double(), sharded(make, root=root)
        alone, before = opened(whole, kind, include=include), as_found(model) if root else []
        model(IDS)  # leaves the last layers gathered
        together = opened(model, kind, include=include)
        wanted = trajectory(alone, IDS.chunk(parts))
        found = trajectory(together, own(parts))
        assert error(found, wanted) < 1e-12
        assert wanted[-1].abs().min() > 1e-3
        assert error(together(IDS), alone(IDS)) < 1e-12
        assert error(model(IDS), whole(IDS)) < 1e-12
        with torch.inference_mode():
            assert error(together(IDS), alone(IDS)) < 1e-12
        assert not root or as_found_but_trainable(model) == as_found_but_trainable(before)
        together.close()
        assert not root or as_found(model) == before
        base = net(make).double()
        assert error(model(IDS), base(IDS)) < 1e-12


def as_found_but_trainable(model: Any) -> list[Any]:
    found = as_found(model) if isinstance(model, nn.Module) else model
    return [row[2:] for row in found if isinstance(row, tuple)]


def main() -> None:
    warnings.simplefilter("error", GradsketchWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training_is_that_of_one_process()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
