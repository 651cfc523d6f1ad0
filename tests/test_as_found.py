"""The user's model is left exactly as found: every keeper, and the work that uses it."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradsketch as gs
from attribution import toys
from gradsketch import as_found
from gradsketch.as_found import (
    Buffers,
    Gradients,
    Modes,
    RandomState,
    Trainability,
    Weights,
    buffers_aside,
    evaluating,
    seeded,
)
from gradsketch.dimension.metrics import evaluated
from gradsketch.errors import GradsketchWarning


class Counting(nn.Module):
    """Its forward pass adds to one buffer and replaces another, which an attribute describes; as dynamic RoPE does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first.eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.ones(2), persistent=False)
        self.made_for = 2
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.shape[1] > self.made_for:
            self.made_for = x.shape[1]
            self.register_buffer("steps", torch.full((x.shape[1],), 0.5, dtype=x.dtype), persistent=False)
        return self.last(torch.tanh(self.first(x)) * self.steps.mean())


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BATCH = X, torch.arange(6) % 3


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def state(model: nn.Module) -> Any:
    """Everything of the model that could change: identities and numbers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t._version, t.detach().clone(), t.requires_grad, id(t.grad)) for name, t in tensors.items()},
        [
            (type(module), {k: id(v) for k, v in vars(module).items()}, len(module._forward_hooks))
            for module in model.modules()
        ],
    )


def sketched(model: nn.Module) -> None:
    gs.sketch_gradients(model, losses, BATCH, gs.BlockSum(gs.Parameters(model), 16))


WORK: dict[str, Callable[[nn.Module], Any]] = {
    "sketches": sketched,
    "gram": lambda model: gs.gradient_gram(model, losses, BATCH),
    "hessian": lambda model: gs.hessian(model, losses, BATCH)(torch.ones(gs.Parameters(model).n)),
    "differences": lambda model: gs.hessian(model, losses, BATCH, mode="central-difference")(
        torch.ones(gs.Parameters(model).n)
    ),
    "gradient": lambda model: gs.loss_gradient(model, losses, BATCH),
    "fisher": lambda model: gs.fisher(model, losses, BATCH)(torch.ones(gs.Parameters(model).n)),
    "gauss-newton": lambda model: gs.gauss_newton(model, losses, BATCH)(torch.ones(gs.Parameters(model).n)),
    "metric": lambda model: evaluated(lambda m: float(losses(m, BATCH).mean()), model, "here"),
}


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("work", WORK)
def test_what_a_forward_pass_writes_is_put_back(work: str, fails: bool) -> None:
    model = Counting()
    model.last.bias.grad = torch.ones(3, dtype=torch.float64)
    if fails:
        model.last.register_forward_hook(interrupt)
    before = state(model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            WORK[work](model)
    else:
        WORK[work](model)
    assert str(state(model)) == str(before)


class Renormalising(nn.Module):
    """Its forward pass writes to parameters: a table with max_norm, and a prompt that projects its own ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.prompt, self.last = (
            nn.Embedding(5, 4, max_norm=0.5),
            nn.Parameter(torch.ones(4)),
            nn.Linear(4, 3),
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.prompt.data /= self.prompt.data.norm().clamp(min=1.0)
        return self.last(torch.tanh(self.table(x.argmax(1)) + self.prompt))


@pytest.mark.parametrize("limit", [0, 1 << 22])
@pytest.mark.parametrize("work", WORK)
def test_what_a_forward_pass_writes_to_parameters_is_put_back(
    monkeypatch: pytest.MonkeyPatch, work: str, limit: int
) -> None:
    monkeypatch.setattr(as_found, "_WRITTEN_BYTES", limit)  # a table that is renormalised is copied whatever its size
    model = Renormalising()
    if limit == 0:
        model.prompt.data.zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradsketchWarning)  # of what is slow
        WORK[work](model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_too_large_to_copy_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_found, "_WRITTEN_BYTES", 0)
    model = nn.Linear(4, 3)

    def clipping(model: nn.Module) -> float:
        with torch.no_grad():
            model.weight.clamp_(-0.1, 0.1)
        return 0.0

    with pytest.warns(GradsketchWarning, match="wrote to weight, too large to be copied"):
        evaluated(clipping, model, "here")


def test_a_loss_that_runs_backward_itself_leaves_grad_alone() -> None:
    def doubled(model: nn.Module, batch: Any) -> Tensor:
        losses(model, batch).sum().backward()
        return losses(model, batch)

    model = Counting()
    model.last.bias.grad = kept = torch.ones(3, dtype=torch.float64)
    gs.sketch_gradients(model, doubled, BATCH, gs.BlockSum(gs.Parameters(model), 16), method="loop")
    assert model.last.bias.grad is kept
    assert torch.equal(kept, torch.ones(3, dtype=torch.float64))
    assert model.first.weight.grad is None


def test_an_index_is_asked_by_the_model_that_built_it_where_positions_grow(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(toys.Characters().get_vocab()),
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    model = transformers.LlamaForCausalLM(config)
    before = state(model)
    rows = ["the first of 3.", "the second of 3", "3 were in total"]
    index = gs.build_index(tmp_path, model, toys.language_task(), rows, d=16, progress=False)
    short = index.query(model, ["abc"], k=1)
    index.explain(model, index.query(model, rows, k=1), top=1)
    assert index.query(model, ["abc"], k=1).queries == short.queries
    assert str(state(model)) == str(before)


# --- the keepers themselves ---


def test_modes_of_every_submodule() -> None:
    model = Counting()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (model.training, model.first.training, model.last.training) == (True, False, True)
    with Modes(model):
        model.first.train()
    assert not model.first.training


def test_trainability() -> None:
    model, apart = Counting(), torch.zeros(2)
    model.first.bias.requires_grad_(False)
    with Trainability(model, [apart]) as trainability:
        trainability.only([model.first.bias, apart])
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["first.bias"]
        assert apart.requires_grad
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["first.bias"]
    assert not apart.requires_grad


def test_gradients_are_set_aside() -> None:
    model = Counting()
    model.last.bias.grad = kept = torch.ones(3, dtype=torch.float64)
    with Gradients(model):
        losses(model, BATCH).sum().backward()
        assert not torch.equal(model.last.bias.grad, kept)
    assert model.last.bias.grad is kept
    assert model.first.weight.grad is None


def test_weights_can_be_put_back_again_and_again() -> None:
    model = Counting()
    before = model.first.weight.detach().clone()
    with Weights(model) as weights:
        for put_back in (weights.put_back, lambda: None):
            with torch.no_grad():
                model.first.weight.add_(1)
            put_back()
            assert torch.equal(model.first.weight, before) == (put_back == weights.put_back)
    assert torch.equal(model.first.weight, before)


def test_buffers_that_training_wrote_to_replaced_or_moved() -> None:
    model = Counting()
    buffers, steps = Buffers(model), model.steps
    model(X)
    assert buffers.changed() == ["calls", "steps"]
    buffers.put_back()
    assert model.steps is steps
    assert (int(model.calls), model.made_for) == (0, 2)
    moved = Counting()
    buffers = Buffers(moved)
    moved.float()(X.float())
    buffers.put_back()
    assert (moved.steps.dtype, moved.steps.tolist()) == (torch.float32, [1, 1])


def test_a_subspace_puts_back_a_buffer_that_was_replaced() -> None:
    model = Counting()
    parameters = gs.Parameters(model)
    before, steps = model(X[:2]).detach(), model.steps
    with gs.Subspace(model, parameters, gs.AFFD(parameters.n, 4)) as subspace:
        subspace(X)
    assert model.steps is steps
    assert torch.equal(model(X[:2]), before)


def test_buffers_too_large_to_copy_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_found, "_ASIDE_BYTES", 20)
    model = Counting()
    model.large = nn.Module()
    model.large.register_buffer("unread", torch.ones(100))
    with buffers_aside(model):  # "steps" is small enough
        model(X)
    assert model.steps.tolist() == [1, 1]
    model.register_forward_hook(lambda *_: model.large.unread.add_(1))
    with pytest.warns(gs.GradsketchWarning, match=r"wrote to large\.unread, too large"), buffers_aside(model):
        model(X)


def test_random_state_and_seeds() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    with RandomState():
        torch.rand(5)
    with seeded(8):
        drawn = torch.rand(2)
    assert torch.equal(torch.rand(2), wanted)
    torch.manual_seed(8)
    assert torch.equal(torch.rand(2), drawn)


@pytest.mark.gpu
def test_random_state_of_a_device_and_of_no_other() -> None:
    device = torch.device("cuda:0")
    torch.manual_seed(3)
    with seeded(8, device):
        drawn = torch.rand(2, device=device)
        host = torch.rand(2)
    here = torch.rand(2, device=device)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2, device=device), here)
    assert torch.equal(torch.rand(2), host)
    torch.manual_seed(8)
    assert torch.equal(torch.rand(2, device=device), drawn)
