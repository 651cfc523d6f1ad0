"""What each of two ranks does with a model that tensor parallelism splits; run with the variables torchrun sets."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, is_said_elsewhere
from gradsketch.store import Store
from launch import as_rank

IDS = torch.randint(0, 40, (6, 8), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        b, t, _ = h.shape
        q, k, v = (part(h).view(b, t, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    """``how``: what is done with the tokens before they come to the MLP, or with its widest layer."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norms, self.how = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)]), how
        self.scale = nn.Parameter(torch.tensor(1.5)) if how == "scaled" else None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.attention(self.norms[0](h))
        if self.how == "checkpointed":
            return h + checkpoint(self.mlp, h, use_reentrant=False)
        if self.how == "sorted":  # so that data decides whose row is whose
            flat = h.flatten(0, 1)
            order = flat[:, 0].detach().argsort()
            return h + torch.zeros_like(flat).index_copy(0, order, self.mlp(flat[order])).view_as(h)
        if self.how == "dropped":
            return h + self.mlp(nn.functional.dropout(h, 0.5))
        return h + self.mlp(h)

    def mlp(self, h: torch.Tensor) -> torch.Tensor:
        wide = gelu(self.up(self.norms[1](h)))
        return self.down(wide if self.scale is None else wide * self.scale)


class Net(nn.Module):
    """A language model, with positions or without."""

    def __init__(self, how: str = "", *, positions: bool = True) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(40, 16), nn.ModuleList([Block(how), Block()])
        self.positions = nn.Embedding(8, 16) if positions else None
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 40, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.words(ids)
        h = h if self.positions is None else h + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Own(nn.Module):
    """Multiplies with its DTensors itself: whole, in parts, or in parts that torch does not know of.

    Or in parts whose sum has a backward pass that adds up once too often.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.words, self.head, self.how = nn.Embedding(40, 16), nn.Linear(16, 40), how

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h, weight = self.words(ids), self.head.weight
        if not isinstance(weight, DTensor):
            return h @ weight.T
        if self.how == "whole":
            return h @ weight.full_tensor().T
        if self.how == "parts":
            return (DTensor.from_local(h, weight.device_mesh, [Replicate()]) @ weight.t()).full_tensor()
        if self.how == "doubled":
            return all_reduce(h.chunk(dist.get_world_size(), dim=2)[dist.get_rank()] @ weight.to_local().T)
        return DTensor.from_local(h @ weight.to_local().T, weight.device_mesh, [Shard(2)]).full_tensor()


def losses(model: Callable[..., Any], batch: Any) -> torch.Tensor:
    logits = model(batch["input_ids"])
    logits = getattr(logits, "logits", logits)
    return cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").sum(1)


def losses_in_parts(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(batch["input_ids"])
    ids = DTensor.from_local(batch["input_ids"], logits.device_mesh, [Replicate()])
    with loss_parallel():
        each = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


def made(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(*args, **options).double().eval()


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def by_rows() -> Any:
    return RowwiseParallel(input_layouts=Replicate())


def gathering() -> Any:
    return ColwiseParallel(output_layouts=Replicate())


def layers(plan: dict[str, Any]) -> dict[str, Any]:
    return {f"blocks.{i}.{name}": style for i in (0, 1) for name, style in plan.items()}


MLP = {"up": ColwiseParallel(), "down": RowwiseParallel()}
ATTENTION = {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"attention.o": RowwiseParallel()}


def every_layer() -> dict[str, Any]:
    return {"words": by_rows(), "positions": by_rows(), "head": gathering()} | layers(MLP | ATTENTION)


def sequences() -> dict[str, Any]:
    """Norms, too, work on a part of the positions each."""
    inside = {
        "norms.0": SequenceParallel(),
        "norms.1": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    outside = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return outside | layers(ATTENTION | inside)


def split(plan: dict[str, Any] | None = None, *args: Any, **options: Any) -> Any:
    return parallelize_module(made(Net, *args, **options), mesh(), every_layer() if plan is None else plan)


def sketch(model: nn.Module, include: str = "*") -> gs.BlockSum:
    return sketch_of(tuple(gs.Parameters(model, include).shapes.items()))


@cache
def sketch_of(shapes: tuple[tuple[str, torch.Size], ...]) -> gs.BlockSum:
    """Made once, because that takes longer than anything that is done with it here."""
    return gs.BlockSum(dict(shapes), 64)


def refused(words: str, make: Callable[[], object], kind: type[Exception] = gs.InputError) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        make()


def as_found(model: nn.Module) -> list[Any]:
    return [
        (type(p).__name__, p.requires_grad, p.grad is None, p.tolist() if not hasattr(p, "to_local") else p.placements)
        for p in model.parameters()
    ] + [len(hooks) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]


def check(whole: nn.Module, model: nn.Module, of: Any = losses) -> None:
    """Hold the sketches of a split model against those of one process."""
    wanted = gs.sketch_gradients(whole, losses, BATCH, sketch(whole))
    sketcher, before = gs.GradientSketcher(model, of, sketch(model)), as_found(model)
    for _ in range(2):
        torch.testing.assert_close(sketcher(BATCH).values, wanted, rtol=1e-12, atol=1e-12)
    assert as_found(model) == before
    assert sketcher.audits.audited == 1
    assert 0 < sketcher.audits.largest_error < 1e-12 or type(model).__module__.startswith("transformers")
    assert not sketcher.slow
    parameters = gs.Parameters(model), gs.Parameters(whole)
    assert parameters[0].fingerprint(content=True) == parameters[1].fingerprint(content=True)
    assert torch.equal(parameters[0].flatten(), parameters[1].flatten())


def sketches() -> None:
    for plan in (
        layers({"up": gathering(), "down": RowwiseParallel(input_layouts=Replicate())}),
        layers(MLP),
        layers(ATTENTION),
        {"words": gathering(), "positions": by_rows()},
        every_layer(),
    ):
        check(made(Net), split(plan))
    check(made(Net, positions=False), split(sequences(), positions=False))
    for how in ("checkpointed", "sorted"):
        check(made(Net, how), split(None, how))
    check(made(Net), split({"head": ColwiseParallel(use_local_output=False)}), losses_in_parts)
    dropped()
    for how in ("whole", "parts"):
        model = made(Own, how)
        parallelize_module(model, mesh(), {"head": ColwiseParallel()})
        check_own(made(Own, how), model)
    whole, model = made(Own, "unknown"), parallelize_module(made(Own, "unknown"), mesh(), {"head": ColwiseParallel()})
    with formed_alone():
        check_own(whole, model, "head.weight")
    check_own(made(Net), split(), method="loop")
    tied = split()
    tied.head.weight = tied.words.weight
    whole = made(Net)
    whole.head.weight = whole.words.weight
    check(whole, tied)
    check(made(Net), parallelize_module(made(Net), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))["tp"],
          every_layer()))  # fmt: skip
    others_that_take_contributions()


def dropped() -> None:
    """Ranks that draw the same random numbers, after which two passes are two draws."""
    drawn = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss draws random numbers", GradsketchWarning)
        for model in (made(Net, "dropped"), split(None, "dropped")):
            torch.manual_seed(2)
            drawn.append(gs.sketch_gradients(model, losses, BATCH, sketch(model)))
    torch.testing.assert_close(*drawn, rtol=1e-12, atol=1e-12)


@contextmanager
def formed_alone() -> Iterator[None]:
    """Some gradients are formed one example after another."""
    with pytest.warns(GradsketchWarning, match="one example after another"):
        yield


def check_own(whole: nn.Module, model: nn.Module, include: str = "*weight", method: str = "auto") -> None:
    """The head's bias is not used."""
    wanted = gs.sketch_gradients(whole, losses, BATCH, sketch(whole, include))
    found = gs.sketch_gradients(model, losses, BATCH, sketch(model, include), method=method)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def others_that_take_contributions() -> None:
    """Inner products, sketches of whole gradients, and a metric."""
    whole, model = made(Net), split()
    parameters = gs.Parameters(whole), gs.Parameters(model)
    dense = gs.AFFD(parameters[0].n, 64)
    metrics = [gs.kfac(each, losses, BATCH, labels="empirical") for each in (whole, model)]
    for function in (
        lambda i, each: gs.gradient_gram(each, losses, BATCH),
        lambda i, each: gs.sketch_gradients(each, losses, BATCH, dense, parameters=parameters[i]),
        lambda i, each: gs.sketch_gradients(each, losses, BATCH, sketch(each), precondition=metrics[i]),
    ):
        torch.testing.assert_close(function(1, model), function(0, whole), rtol=1e-9, atol=1e-9)


def refusals() -> None:
    model = split()
    phi = sketch(model)
    for method in ("vmap", "implicit"):
        refused("ranks hold parts", lambda method=method: gs.sketch_gradients(model, losses, BATCH, phi, method=method))
    refused("curvature of a model that tensor", lambda: gs.hessian(model, losses, BATCH))
    refused("curvature of a model that tensor", lambda: gs.loss_gradient(model, losses, BATCH))
    refused("sharded over processes", lambda: gs.Subspace(model, gs.Parameters(model), gs.AFFD(phi.n, 64)))
    rank = dist.get_rank()
    refused("other shapes on each rank", lambda: gs.sketch_gradients(model, losses, {"input_ids": IDS[rank:]}, phi))
    refused("the loss of example 0 of", lambda: gs.sketch_gradients(model, losses, {"input_ids": IDS + rank}, phi))
    parts_of_gradients_are_refused()
    a_wrong_contribution_is_noticed()
    apart = split({"words": by_rows()})
    parallelize_module(apart, init_device_mesh("cpu", (2,), mesh_dim_names=("other",)), {"head": gathering()})
    refused("split over 2 meshes", lambda: gs.sketch_gradients(apart, losses, BATCH, sketch(apart)))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    shared = parallelize_module(made(Net), both["tp"], every_layer())
    fully_shard(shared, mesh=both["dp"])
    refused("FSDP2 shares out and tensor", lambda: gs.sketch_gradients(shared, losses, BATCH, sketch(shared)))
    beside = split()
    fully_shard(beside.norm, mesh=mesh())
    refused("FSDP2 shares out and tensor", lambda: gs.sketch_gradients(beside, losses, BATCH, sketch(beside)))


def parts_of_gradients_are_refused() -> None:
    """Each rank has its own gradient of a parameter that it holds whole, and none knows the sum."""
    scaled = split(None, "scaled")
    refused("blocks.0.scale that differ", lambda: gs.sketch_gradients(scaled, losses, BATCH, sketch(scaled)))
    plain = split({n: s for n, s in sequences().items() if "norm" not in n}, positions=False)
    refused("that differ by", lambda: gs.sketch_gradients(plain, losses, BATCH, sketch(plain)))
    model = parallelize_module(made(Own, "unknown"), mesh(), {"head": ColwiseParallel()})
    refused(
        "words.weight that differ", lambda: gs.sketch_gradients(model, losses, BATCH, sketch(model, "words.weight"))
    )
    model = parallelize_module(made(Own, "doubled"), mesh(), {"head": RowwiseParallel()})
    with formed_alone():
        refused("off by", lambda: gs.sketch_gradients(model, losses, BATCH, sketch(model, "head.weight")))
    dropping = split(None, "dropped")
    torch.manual_seed(dist.get_rank())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss draws random numbers", GradsketchWarning)
        refused("random numbers that differ", lambda: gs.sketch_gradients(dropping, losses, BATCH, sketch(dropping)))
    torch.manual_seed(1)


def a_wrong_contribution_is_noticed() -> None:
    """What an audit finds wrong is formed one example after another."""
    from gradsketch.gradients.per_example.contributions import Outer

    plain, model, whole = Outer.weighted, split(), made(Net)
    wanted = gs.sketch_gradients(whole, losses, BATCH, sketch(whole))
    sketcher = gs.GradientSketcher(model, losses, sketch(model))
    try:
        Outer.weighted = lambda self, *given: plain(self, *given).roll(1, 0)
        with pytest.warns(GradsketchWarning, match="the audit found an error"):
            found = sketcher(BATCH).values
    finally:
        Outer.weighted = plain
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert "head.weight" in sketcher.slow


def failures() -> None:
    """A rank that fails ends the others, wherever it does."""
    here = dist.get_rank() == 1
    for turn in (1, 2, 3):
        calls = []

        def failing(model: nn.Module, batch: Any, turn: int = turn, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            if here and len(calls) == turn:
                raise OSError("out of luck")
            return losses(model, batch)

        model = split()
        with pytest.raises((OSError, RuntimeError, gs.InputError), match="out of luck") as raised:
            gs.sketch_gradients(model, failing, BATCH, sketch(model))
        assert str(raised.value).startswith("on rank 1: ") != here
        assert is_said_elsewhere(raised.value) != here
    inside = split()
    inside.blocks[1].norms[1].register_forward_hook(partial(_fail, here))
    with pytest.raises((OSError, RuntimeError), match="out of luck"):
        gs.sketch_gradients(inside, losses, BATCH, sketch(inside))
    while_sketching(here)
    of_all()
    a_share_that_is_lost(here)
    check(made(Net), split())  # nobody is left behind


def of_all() -> None:
    """One rank says what all of them found."""
    model = split()
    with pytest.raises(ValueError, match="no luck at all") as raised:
        gs.sketch_gradients(model, _unlucky, BATCH, sketch(model))
    assert is_said_elsewhere(raised.value) == (dist.get_rank() == 1)


def _unlucky(*_: Any) -> torch.Tensor:
    raise ValueError("no luck at all")


def a_share_that_is_lost(here: bool) -> None:
    """Every rank sketches some of the parameters: what one of them loses is missing from the sum."""
    model = split()
    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(gs.BlockSum, "add_outer", lambda *_: None)
        refused("rows that differ", lambda: gs.sketch_gradients(model, losses, BATCH, sketch(model)))


def _fail(here: bool, *_: Any) -> None:
    if here:
        raise OSError("out of luck")


def while_sketching(here: bool) -> None:
    model = split()
    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(gs.BlockSum, "add_outer", lambda *_: _fail(here))
        with pytest.raises((OSError, RuntimeError), match="out of luck"):
            gs.sketch_gradients(model, losses, BATCH, sketch(model))


def indexes(folder: Path) -> None:
    """Three shards of one team, then one that is missing; the first rank alone writes."""
    rank, options = dist.get_rank(), {"d": 64, "shard_rows": 2, "batch_tokens": 16, "dtype": "float32"}
    build = partial(gs.build_index, task=losses, data=BATCH, progress=False, **options)
    model, alone = split(), build(folder / f"alone-{rank}", made(Net))
    plain = Store.write
    try:
        if rank == 1:
            Store.write = lambda *_: _fail(True)
        index = build(folder / "together", model)
        dist.barrier()
        if rank == 0:
            sorted((folder / "together" / "checkpoint-0").glob("*.arrow"))[1].unlink()
        dist.barrier()
        index = build(folder / "together", model)
        if rank == 0:
            Store.write = lambda *_: _fail(True)
        with pytest.raises((OSError, RuntimeError), match="out of luck"):
            build(folder / "full", model)
    finally:
        Store.write = plain
    assert index.rows == index.rows_there == len(IDS)
    asked = {"input_ids": IDS[:2]}
    wanted = _hits(alone.query(made(Net), asked, k=3))
    for each in (model, made(Net)):
        torch.testing.assert_close(_hits(index.query(each, asked, k=3)), wanted)
    refused("checkpoints of a model", lambda: build(folder / "no", model, checkpoints=[made(Net).state_dict()]))
    refused("token contributions of a model", lambda: alone.explain(model, index.query(model, asked, k=3)))
    refused("exact scores of a model", lambda: index.query(model, asked, k=3, rerank=4, data=BATCH))
    metric = {"precondition": "empirical-kfac"}
    whole = build(folder / f"kfac-alone-{rank}", made(Net), **metric).query(made(Net), asked, k=3)
    found = build(folder / "kfac-together", model, **metric).query(model, asked, k=3)
    torch.testing.assert_close(_hits(found), _hits(whole))


def _hits(answers: Any) -> list[tuple[int, float]]:
    return [(hit.row, hit.score) for found in answers.queries for hit in found.proponents]


def of_transformers(folder: Path) -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )
    from transformers.distributed import DistributedConfig

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"vocab_size": 40, "num_key_value_heads": 2}
    for kind, config in (
        (LlamaForCausalLM, LlamaConfig(**small, tie_word_embeddings=True)),
        (Qwen3ForCausalLM, Qwen3Config(**small, head_dim=8)),  # norms of queries and keys, of which each rank has some
    ):
        if dist.get_rank() == 0:
            made(kind, config).save_pretrained(folder / kind.__name__)
        dist.barrier()
        load = partial(kind.from_pretrained, folder / kind.__name__, dtype=torch.float64)
        check(load().eval(), load(distributed_config=DistributedConfig(tp_plan="auto")).eval())
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0)
    plan = {"transformer.wte": by_rows(), "transformer.wpe": by_rows(), "lm_head": gathering()}
    model = parallelize_module(made(GPT2LMHeadModel, config), mesh(), plan)
    model.tie_weights()
    check(made(GPT2LMHeadModel, config), model)


def main(part: str, folder: Path) -> None:
    match part:
        case "sketches":
            sketches()
        case "refusals":
            refusals()
        case "failures":
            failures()
        case "indexes":
            indexes(folder)
        case "transformers":
            of_transformers(folder)


if __name__ == "__main__":
    as_rank(partial(main, sys.argv[1], Path(sys.argv[2])))
