"""What each of two processes does in a test; run as a module with the variables that torchrun sets."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import gradsketch as gs
from dimension.test_daily_use import X, Y, at, net, opened, train
from launch import as_rank


def refused(words: str, make: Callable[[], object]) -> None:
    with pytest.raises(gs.InputError, match=re.escape(words)):
        make()


def trained(*, steps: int = 4, parts: int = 1, **options: bool) -> torch.Tensor:
    """Train with this process's half of the data, the Subspace inside DistributedDataParallel."""
    subspace = opened()
    model = DistributedDataParallel(subspace, **options)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(steps):
        optimiser.zero_grad()
        pieces = list(zip(X[mine].chunk(parts), Y[mine].chunk(parts), strict=True))
        for x, y in pieces[:-1]:
            with model.no_sync():
                (cross_entropy(model(x), y) / parts).backward()
        x, y = pieces[-1]
        (cross_entropy(model(x), y) / parts).backward()
        optimiser.step()
    return subspace.w.detach()


def main() -> None:
    alone = opened()
    train(alone, torch.optim.Adam(alone.parameters(), lr=0.02))
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}, {"parts": 2}):
        torch.testing.assert_close(trained(**options), alone.w.detach(), rtol=1e-3, atol=1e-5)
    refused("DistributedDataParallel(Subspace(model", lambda: opened(DistributedDataParallel(net())))
    mesh = init_device_mesh("cpu", (2,))
    shard = "FSDP, which shares out"
    for inside in (lambda s: s, lambda s: s.model, lambda s: s.model[0]):
        subspace = opened()
        fully_shard(inside(subspace), mesh=mesh)
        refused(shard, lambda opened=subspace: opened(X))
    sharded = net()
    torch.distributed.tensor.parallel.parallelize_module(
        sharded[0], mesh, torch.distributed.tensor.parallel.ColwiseParallel()
    )
    refused("is sharded over processes", lambda: opened(sharded))
    merged = opened(moved=0.3)
    wanted = at(merged.w)(X)
    torch.testing.assert_close(fully_shard(merged.merge(), mesh=mesh)(X), wanted)


if __name__ == "__main__":
    as_rank(main)
