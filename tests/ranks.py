"""What each of two ranks does with a model that FSDP2 shares out; run as a module with the variables torchrun sets."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gradsketch as gs
from launch import as_rank

IDS = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.scale * self.down(torch.tanh(self.up(self.norm(h))))


class Net(nn.Module):
    """A language model whose head is its table of words."""

    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(50, 16), nn.ModuleList([Block(), Block()])
        self.head, self.checkpoints = nn.Linear(16, 50, bias=False), checkpoints
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.words(ids)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpoints else block(h)
        return self.head(h)


class Own(torch.autograd.Function):
    """A product with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h, weight)
        return h @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        h, weight = ctx.saved_tensors
        return gradient @ weight, torch.einsum("bto,bti->oi", gradient, h)


class Odd(Net):
    """Uses a parameter in a way that no rule knows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return Own.apply(self.words(ids), self.words.weight)


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(batch["ids"])
    return cross_entropy(logits[:, :-1].transpose(1, 2), batch["ids"][:, 1:], reduction="none").sum(1)


def coupled(model: nn.Module, batch: Any) -> torch.Tensor:
    each = losses(model, batch)
    return each / each.detach().sum()


def net(make: Callable[[], nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return make().eval()


def sharded(make: Callable[[], nn.Module] = Net, **options: Any) -> Any:
    model, mesh = net(make), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def refused(words: str, make: Callable[[], object]) -> None:
    with pytest.raises(gs.InputError, match=re.escape(words)):
        make()


def as_found(model: nn.Module) -> list[Any]:
    return [
        (type(p).__name__, p.requires_grad, p.grad is None, p.to_local().clone().tolist()) for p in model.parameters()
    ] + [len(m._forward_pre_hooks) for m in model.modules()]


def sketches_are_those_of_one_process() -> None:
    """Each rank sketches rows of its own, of which there are not as many."""
    batch = {"ids": IDS[:5] if dist.get_rank() == 0 else IDS[5:]}
    for make, include, reshard in (
        (Net, "*", True),
        (Net, "*", False),
        (Net, "blocks.1.*", True),
        (partial(Net, checkpoints=True), "*", True),
    ):
        whole, model = net(make), sharded(make, reshard_after_forward=reshard)
        wanted = gs.sketch_gradients(whole, losses, batch, gs.BlockSum(gs.Parameters(whole, include), 64))
        parameters = gs.Parameters(model, include)
        assert parameters.fingerprint(content=True) == gs.Parameters(whole, include).fingerprint(content=True)
        assert torch.equal(parameters.flatten(), gs.Parameters(whole, include).flatten())
        sketcher, before = gs.GradientSketcher(model, losses, gs.BlockSum(parameters, 64)), as_found(model)
        assert torch.equal(sketcher(batch).values, wanted)
        assert as_found(model) == before
        model(IDS)  # leaves the last layers gathered
        assert torch.equal(sketcher(batch).values, wanted)
        assert sketcher.audits.audited == 1
        assert 0 < sketcher.audits.largest_error < 1e-5
        assert not sketcher.slow


def a_row_that_is_not_finite_holds_nobody_up() -> None:
    def infinite(model: nn.Module, batch: Any) -> torch.Tensor:
        each = losses(model, batch)
        return torch.where(torch.arange(len(each)) == 4 * dist.get_rank(), torch.inf, 1.0) * each

    wanted = gs.sketch_gradients(whole := net(), losses, {"ids": IDS}, gs.BlockSum(gs.Parameters(whole), 64))
    model = sharded()
    sketcher = gs.GradientSketcher(model, infinite, gs.BlockSum(gs.Parameters(model), 64), on_non_finite="skip")
    for _ in range(2):
        found = sketcher({"ids": IDS})
        assert list(found.skipped) == [4 * dist.get_rank()]
        kept = [row for row in range(8) if row not in found.skipped]
        assert torch.equal(found.values[kept], wanted[kept])


def tied_weights_may_be_gathered_apart() -> None:
    """As of a model of transformers that is shared out before it is tied; once it has run, FSDP2 unties it again."""
    wanted = gs.sketch_gradients(whole := net(), losses, {"ids": IDS}, gs.BlockSum(gs.Parameters(whole), 64))
    for has_run in (False, True):
        untied = net()
        untied.head.weight = nn.Parameter(2 * untied.words.weight.detach())
        model = fully_shard(untied, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        if has_run:
            model(IDS).sum().backward()
        model.head.weight = model.words.weight
        phi = gs.BlockSum(gs.Parameters(model), 64)
        if has_run:
            refused(
                "tied to a parameter of other values", partial(gs.sketch_gradients, model, losses, {"ids": IDS}, phi)
            )
        else:
            assert torch.equal(gs.sketch_gradients(model, losses, {"ids": IDS}, phi), wanted)


def a_wrong_contribution_is_noticed() -> None:
    """Audits see projections only, and still refuse what is not the gradient."""
    from gradsketch.gradients.per_example.contributions import Outer

    plain = Outer.sketch, Outer.weighted
    try:
        Outer.weighted = lambda self, *given: plain[1](self, *given).roll(1, 0)
        refused("the audit found an error", lambda: gs.sketch_gradients(
            model := sharded(), losses, {"ids": IDS}, gs.BlockSum(gs.Parameters(model), 64)
        ))  # fmt: skip
    finally:
        Outer.sketch, Outer.weighted = plain


def a_wrong_row_is_noticed() -> None:
    """Each rank holds the rows it made against the whole gradients that pass by."""
    model = sharded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gs.BlockSum, "add_outer", lambda *_: None)
        refused(
            "rows that differ",
            lambda: gs.sketch_gradients(model, losses, {"ids": IDS}, gs.BlockSum(gs.Parameters(model), 64)),
        )


def what_does_not_go_in_step_is_refused() -> None:
    batch, model, one = {"ids": IDS}, sharded(), net()
    fully_shard(one.blocks[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    wanted = gs.sketch_gradients(whole := net(), losses, batch, gs.BlockSum(gs.Parameters(whole), 64))
    assert torch.equal(gs.sketch_gradients(one, losses, batch, gs.BlockSum(gs.Parameters(one), 64)), wanted)
    phi = gs.BlockSum(gs.Parameters(model), 64)
    for method in ("loop", "vmap", "implicit"):
        refused(
            "of which ranks hold parts",
            lambda method=method: gs.sketch_gradients(model, losses, batch, phi, method=method),
        )
    dense = gs.AFFD(gs.Parameters(model).n, 64)
    refused(
        "whole gradients", lambda: gs.sketch_gradients(model, losses, batch, dense, parameters=gs.Parameters(model))
    )
    refused("together", lambda: gs.sketch_gradients(model, coupled, batch, phi))
    odd = sharded(Odd)
    refused("words.weight", lambda: gs.sketch_gradients(odd, losses, batch, gs.BlockSum(gs.Parameters(odd), 64)))


def shards(index: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in index.glob("checkpoint-0/*.arrow")}


def an_index_is_that_of_one_process(folder: Path) -> None:
    """Three shards for two ranks, then one that is missing: those that have none keep up."""
    data, options = {"ids": IDS}, {"d": 64, "shard_rows": 3, "batch_tokens": 24, "progress": False}
    alone, together = folder / f"alone-{dist.get_rank()}", folder / "together"
    built = gs.build_index(alone, net(), losses, data, **options)
    model = sharded()
    index = gs.build_index(together, model, losses, data, **options)
    assert index.rows == index.rows_there == 8
    assert shards(together) == shards(alone)
    dist.barrier()
    if dist.get_rank() == 0:
        sorted((together / "checkpoint-0").glob("*.arrow"))[1].unlink()
    dist.barrier()
    gs.build_index(together, model, losses, data, **options)
    assert shards(together) == shards(alone)
    wanted = built.query(net(), {"ids": IDS[:2]}, k=3)
    for asked in (model, net()):
        hits = gs.Index.open(together, task=gs.Function(losses)).query(asked, {"ids": IDS[:2]}, k=3)
        assert [[hit.row for hit in found.proponents] for found in hits.queries] == [
            [hit.row for hit in found.proponents] for found in wanted.queries
        ]
    refused("checkpoints of a model", lambda: gs.build_index(
        folder / "no", model, losses, data, checkpoints=[net().state_dict()], progress=False
    ))  # fmt: skip
    refused("token contributions of a model", lambda: built.explain(model, wanted))
    for name, asked in (("kfac-alone", net()), ("kfac-together", model)):
        alone = "" if name == "kfac-together" else f"-{dist.get_rank()}"
        gs.build_index(folder / f"{name}{alone}", asked, losses, data, precondition="empirical-kfac", **options)
    assert shards(folder / "kfac-together") == shards(folder / f"kfac-alone-{dist.get_rank()}")


def main() -> None:
    sketches_are_those_of_one_process()
    a_row_that_is_not_finite_holds_nobody_up()
    tied_weights_may_be_gathered_apart()
    a_wrong_contribution_is_noticed()
    a_wrong_row_is_noticed()
    what_does_not_go_in_step_is_refused()
    an_index_is_that_of_one_process(Path(sys.argv[1]))


if __name__ == "__main__":
    as_rank(main)
