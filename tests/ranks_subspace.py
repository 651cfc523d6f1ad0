"""A Subspace over a model that FSDP2 shares out between two ranks; run as a module with the variables torchrun sets."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
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
from torch.utils.checkpoint import checkpoint

import gradsketch as gs
from dimension.test_subspace import Allocations
from launch import as_rank
from ranks import IDS, Net, as_found, losses, net, refused
from ranks_curvature import error, rank, sharded


class Uneven(Net):
    """A layer of one row, of which one rank has no share, and one of three."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(16, 1), nn.Linear(1, 3)

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.wide(torch.tanh(self.narrow(self.words(ids)))).sum(-1, keepdim=True)
        return super().forward(ids) * (1 + scale)


def own(parts: int = 1) -> tuple[Tensor, ...]:
    """Return this rank's half of the rows, in parts."""
    return IDS.chunk(2)[rank()].chunk(parts)


def mean_loss(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:])


def opened(model: nn.Module, kind: str = "BlockSum", d: int = 24, include: str = "*") -> gs.Subspace:
    parameters = gs.Parameters(model, include)
    made: Any = getattr(gs, kind)
    n = parameters.n
    return gs.Subspace(model, parameters, made(parameters if kind == "BlockSum" else n, min(d, n)))


def trajectory(subspace: gs.Subspace, parts: tuple[Tensor, ...], steps: int = 4, clip: float = 0.5) -> Tensor:
    """Return w after each step of Adam, with gradients accumulated over parts and clipped; and the gradients before."""
    optimiser, found = torch.optim.Adam(subspace.parameters(), lr=0.02), []
    for _ in range(steps):
        optimiser.zero_grad()
        for ids in parts:
            (mean_loss(subspace, ids) / len(parts)).backward()
        assert subspace.w.grad is not None
        gradient = subspace.w.grad.clone()
        nn.utils.clip_grad_norm_(subspace.parameters(), clip)
        optimiser.step()
        found.append(torch.stack([subspace.w.detach(), gradient]))
    return torch.stack(found)


def training_is_that_of_one_process() -> None:
    for make, root, kind, include, parts in (
        (Net, True, "BlockSum", "*", 1),
        (Uneven, True, "AFFD", "*", 2),
        (partial(Net, checkpoints=True), True, "SJLT", "*", 1),
        (Uneven, False, "AFJL", "*", 1),
        (Net, True, "BlockSum", "blocks.1.*", 1),
        (Uneven, True, "AFFD", "narrow.*", 1),  # of which one rank holds nothing
    ):
        whole, model = net(make).double(), sharded(make, root=root)
        alone, before = opened(whole, kind, include=include), as_found(model) if root else []
        model(IDS)  # leaves the last layers gathered
        together = opened(model, kind, include=include)
        with torch.inference_mode():
            together(IDS)
        wanted = trajectory(alone, IDS.chunk(parts))
        found = trajectory(together, own(parts))
        assert error(found, wanted) < 1e-13
        assert wanted[-1, 0].abs().min() > 1e-3
        assert error(together(IDS), alone(IDS)) < 1e-12
        assert error(model(IDS), whole(IDS)) < 1e-12
        with torch.inference_mode():
            assert error(together(IDS), alone(IDS)) < 1e-12
        together.close()
        assert not root or as_found(model) == before
        base = net(make).double()
        assert error(model(IDS), base(IDS)) < 1e-12


class Reentrant(Net):
    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=True)
        return self.head(h)


def graphs_layers_and_casts_are_at_their_point() -> None:
    """Two graphs of two points in one backward pass, a layer alone, and weights that are written to, loaded or cast."""
    pairs = []
    for model, ids in ((net(Reentrant).double(), IDS.chunk(1)), (sharded(Reentrant), own())):
        unshard = getattr(model, "unshard", lambda: None)
        model(IDS)  # or FSDP2 would look at its shards when it is asked to
        subspace = opened(model, "AFFD")
        first = mean_loss(subspace, *ids)
        with torch.no_grad():
            subspace.w.add_(0.1)
        (first + 2 * mean_loss(subspace, *ids)).backward()
        gradient, layer = subspace.w.grad.clone(), subspace.model.blocks[0].up
        with torch.no_grad():
            subspace.w.mul_(3.0)
            alone = layer(torch.ones(1, 16, dtype=torch.float64))
            for parameter in subspace.model.parameters():
                parameter.mul_(2.0)
        unshard()
        doubled = subspace(IDS)
        subspace.load_state_dict(subspace.state_dict())
        subspace.to("cpu", torch.float32).to(torch.float64)
        pairs.append((gradient, alone, doubled, subspace(IDS)))
    for found, wanted in zip(pairs[1], pairs[0], strict=True):
        assert error(found, wanted) < 1e-13


def a_step_on_one_rank_is_noticed() -> None:
    """Also one that is taken past the version counter, or between two halves of a step."""
    subspace = opened(model := sharded())
    trajectory(subspace, own())
    subspace(IDS)
    if rank() == 1:
        subspace.w.data.add_(1.0)
    refused("a w that differs between ranks", lambda: subspace(IDS))
    if rank() == 1:
        subspace.w.data.sub_(1.0)
    with torch.no_grad():
        subspace.w.copy_(torch.ones(24))
    subspace(IDS)
    subspace.close()
    other = sharded(root=False)
    if rank() == 1:
        other.head.weight.data += 1
    refused("other values on each rank", lambda: opened(other))
    model.register_buffer("statistics", torch.full((2,), float(rank())))
    refused("'statistics', which has other values", lambda: opened(model))


def ranks_that_go_different_ways_all_end() -> None:
    subspace = opened(sharded())

    def skips(inside: nn.Module) -> None:
        mean_loss(inside if rank() == 0 else inside.model.head, IDS if rank() == 0 else torch.zeros(8, 12, 16).double())

    def stops_early(inside: nn.Module) -> None:
        loss = mean_loss(inside, IDS)
        if rank() == 0:
            loss.backward()
        else:
            mean_loss(inside, IDS)

    def evaluates_longer(inside: nn.Module) -> None:
        with torch.no_grad():
            _ = [inside(IDS) for _ in range(2 - rank())]
        mean_loss(inside, IDS).backward()

    for way in (skips, stops_early, evaluates_longer):
        refused("ranks that went different ways", partial(way, subspace))
    subspace.w.grad = None
    wanted = trajectory(opened(net().double()), IDS.chunk(1))
    assert error(trajectory(subspace, own()), wanted) < 1e-12  # and all can go on
    subspace.close()


def fails_at_once(*_: Any) -> None:
    raise ZeroDivisionError("no such word")


def a_failure_on_one_rank_ends_all() -> None:
    class Fails(Net):
        def forward(self, ids: Tensor) -> Tensor:
            h = super().forward(ids)
            if rank() == 1 and self.training:
                raise ZeroDivisionError("no such word")
            return h

    model = sharded(Fails)
    model.train()
    subspace = opened(model)
    with pytest.raises(Exception, match="no such word"):
        subspace(IDS)
    subspace.close()
    for place in ("before", "after"):
        with pytest.raises(Exception, match="the disk is gone"), opened(sharded()) as subspace:  # noqa: PT012
            for step in range(3):
                loss = mean_loss(subspace, IDS) if place == "after" else None
                if rank() == 1 and step == 1:
                    raise OSError("the disk is gone")
                (mean_loss(subspace, IDS) if loss is None else loss).backward()
    for inside in (True, False):  # while the other is in its backward pass
        subspace = opened(model := sharded())
        with pytest.raises(Exception, match="no such word"), subspace if inside else nullcontext():  # noqa: PT012
            loss = mean_loss(subspace, IDS)
            if rank() == 1:
                model.register_forward_pre_hook(fails_at_once, prepend=True)
                subspace(IDS)
            loss.backward()
        subspace.close()
    phi = gs.BlockSum(gs.Parameters(model := sharded()), 24)
    refused("matches no parameter", lambda: gs.Subspace(model, "none.*" if rank() else "*", phi))
    other = gs.BlockSum(gs.Parameters(model), 24, seed=rank())
    refused("another sketch on each rank", lambda: gs.Subspace(model, "*", other))


def it_is_saved_loaded_and_merged_as_in_one_process(folder: Path) -> None:
    """By rank 0 for all; the state dict needs no other rank."""
    alone, together = opened(net().double(), "AFFD"), opened(sharded(), "AFFD")
    for subspace, parts in ((alone, IDS.chunk(1)), (together, own())):
        trajectory(subspace, parts)
    wanted = alone(IDS)
    together.save_pretrained(folder / "together")
    if rank() == 0:
        alone.save_pretrained(folder / "alone")
        assert together.state_dict().keys() == alone.state_dict().keys()
        assert together.fingerprints == alone.fingerprints
    dist.barrier()
    for name in ("together", "alone"):
        for model in (net().double(), sharded()):
            again = gs.Subspace.from_pretrained(model, folder / name)
            assert error(again(IDS), wanted) < 1e-12
            again.close()
    refused("without subspace.json", lambda: gs.Subspace.from_pretrained(sharded(), folder / f"none-{rank()}"))
    model = together.merge()
    for (name, one), other in zip(alone.merge().named_parameters(), model.parameters(), strict=True):
        assert error(other.full_tensor(), one) < 1e-12, name
        assert other.requires_grad
    assert error(model(IDS), wanted) < 1e-12
    model(IDS).sum().backward()  # FSDP2 trains it as before
    assert all(p.grad is not None for p in model.parameters())
    partly = opened(sharded(root=False))
    trajectory(partly, own())
    assert error(partly.merge()(IDS), opened_and_trained()(IDS)) < 1e-12
    refused("a closed Subspace", lambda: partly(IDS))


def opened_and_trained() -> nn.Module:
    subspace = opened(net().double())
    trajectory(subspace, IDS.chunk(1))
    return subspace


def what_cannot_be_right_is_refused() -> None:
    cast = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refused("fully_shard casts", lambda: opened(cast))
    columns = sharded(shard_placement_fn=lambda p: torch.distributed.tensor.Shard(p.ndim - 1))
    refused("shared out as", lambda: opened(columns))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    refused("shared out as", lambda: opened(fully_shard(net().double(), mesh=mesh)))
    refused("which acts on whole vectors", lambda: opened(sharded(), "Dense"))
    compiled = sharded()
    compiled.blocks[0].compile(backend="eager")
    refused("a compiled model", lambda: opened(compiled))
    other = gs.Parameters(net().double())
    refused("does not hold", lambda: gs.Subspace(sharded(), other, gs.BlockSum(other, 8)))
    around = torch.compile(opened(sharded()), backend="eager")
    with pytest.raises(Exception, match="a compiled model"):
        around(IDS)
    subspace = opened(sharded())
    subspace.model.blocks[0].compile(backend="eager")
    with pytest.raises(Exception, match="a compiled model"):
        subspace(IDS)
    subspace = opened(net().double())
    fully_shard(subspace.model.blocks[0], mesh=init_device_mesh("cpu", (2,)))
    refused("FSDP, which shares out", lambda: subspace(IDS))
    subspace = opened(model := sharded())
    refused("open in a Subspace", lambda: gs.hessian(model, losses, {"ids": IDS}))
    refused("open in a Subspace", lambda: gs.hessian(subspace, losses, {"ids": IDS}))
    phi = gs.BlockSum(gs.Parameters(subspace), 8)
    refused("open in a Subspace", lambda: gs.sketch_gradients(subspace, losses, {"ids": IDS}, phi))
    refused("open in another Subspace", lambda: gs.Subspace(model, subspace.selection, subspace.sketch))
    refused("create_graph=True", lambda: torch.autograd.grad(mean_loss(subspace, IDS), subspace.w, create_graph=True))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(subspace.w, subspace.w)
        refused("forward-mode", lambda: torch.func.functional_call(subspace, {"w": dual}, (IDS,)))
    fully_shard(subspace)
    refused("while it was open", lambda: subspace(IDS))
    task, rows = gs.Classification(), [(torch.ones(2), 0)]
    refused("a search of dimensions", lambda: gs.fine_tune(sharded(), task, rows, lambda _: 0.0, steps=1))


def a_rank_holds_its_share() -> None:
    """Beside a layer that is gathered, and what gloo and the sketch of a layer take."""
    width, layers, ranks = 256, 16, dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for layer in (*model, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    subspace = opened(model, "AFJL", d=8)
    optimiser = torch.optim.SGD([subspace.w], lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        subspace(torch.ones(1, width)).sum().backward()
        optimiser.step()

    step()  # what is drawn and made once
    with Allocations() as allocations:
        _ = [step() for _ in range(2)]
    n, layer = subspace.selection.n, width * width
    shares = 3 * n / ranks  # of theta0, of theta0 + the lift, and of the gradient; one process takes 2 n and theta0
    assert shares < allocations.peak / 4 < shares + 6 * layer < 2 * n
    subspace.close()


def main() -> None:
    training_is_that_of_one_process()
    graphs_layers_and_casts_are_at_their_point()
    a_step_on_one_rank_is_noticed()
    ranks_that_go_different_ways_all_end()
    a_failure_on_one_rank_ends_all()
    it_is_saved_loaded_and_merged_as_in_one_process(Path(sys.argv[1]))
    what_cannot_be_right_is_refused()
    a_rank_holds_its_share()


if __name__ == "__main__":
    as_rank(main)
