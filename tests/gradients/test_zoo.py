"""Every promised architecture: per-example gradients equal torch.func's, whatever the batch around an example.

Float64. Tolerance 1e-6 of a gradient's norm: Llama and its kin compute their norms in float32 whatever the weights are.
"""

from __future__ import annotations

import contextlib
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import CASES, VOCABULARY, Case, exact_gradients

from gradsketch import BlockSum, CausalLM, GradientSketcher, Parameters, gradient_gram, sketch_gradients
from gradsketch.errors import InputError, NonFiniteError
from gradsketch.sketches.base import Sketch
from sampled import a_third

# What cannot be captured in one backward pass, and says so.
BLOCKS = 96


class Keep(Sketch):
    """The sketch that keeps everything."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n)

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Tensor) -> Tensor:
        return x.clone()

    _apply_adjoint = _apply


class World:
    """A case's model with its exact gradients, made once."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model()
        self.parameters = Parameters(self.model)
        self.exact = exact_gradients(self.model, case.task, case.examples, self.parameters)
        self.phi = BlockSum(self.parameters, BLOCKS)
        self.reference = self.phi(self.exact)

    def sketches(self, places: list[int] | None = None, **options: Any) -> Tensor:
        places = list(range(len(self.case.examples))) if places is None else places
        batch = self.case.task.collate([self.case.examples[place] for place in places])
        return sketch_gradients(self.model, self.case.task, batch, self.phi, **options)


@cache
def world(name: str) -> World:
    return World(CASES[name])


def assert_close(values: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Row by row, relative to the largest row: a zero row must be zero to the same precision."""
    error = (values - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-9 * wanted.norm(dim=1).max())
    assert error.max() <= tolerance, error.tolist()


# What they share with many more architectures is tested in tests/architectures.
@pytest.mark.parametrize("name", a_third(CASES))
class TestEveryArchitecture:
    def test_gradients_are_exact(self, name):
        w = world(name)
        batch = w.case.task.collate(w.case.examples)
        gradients = sketch_gradients(w.model, w.case.task, batch, Keep(w.parameters.n), parameters=w.parameters)
        assert_close(gradients, w.exact)

    def test_sketches_are_exact_and_repeated_examples_equal(self, name):
        w = world(name)
        sketches = w.sketches()
        assert_close(sketches, w.reference)
        first = {repr(example): place for place, example in reversed(list(enumerate(w.case.examples)))}
        same = torch.tensor([first[repr(example)] for example in w.case.examples])
        assert len(same.unique()) < len(same)
        assert_close(sketches, sketches[same], 1e-9)

    def test_batch_mates_order_and_split_change_nothing(self, name):
        w = world(name)
        assert_close(w.sketches([2]), w.reference[[2]])
        order = list(reversed(range(len(w.case.examples))))
        assert_close(w.sketches(order[:3]), w.reference[order[:3]])

    def test_inner_products_are_exact(self, name):
        w = world(name)
        task, examples = w.case.task, w.case.examples
        gram = gradient_gram(w.model, task, task.collate(examples), task.collate(examples[:2]))
        wanted = w.exact @ w.exact[:2].T
        scale = w.exact.norm(dim=1)[:, None] * w.exact[:2].norm(dim=1)
        assert ((gram - wanted).abs() <= 1e-6 * scale + 1e-12).all()


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_padding_changes_nothing(name):
    w = world(name)
    batch = w.case.task.collate(w.case.examples)
    fills = {"attention_mask": 0, "labels": -100, "input_ids": 0}
    longer = {key: functional.pad(value, (0, 3), value=fills[key]) for key, value in batch.items()}
    assert_close(sketch_gradients(w.model, w.case.task, longer, w.phi), w.reference)


@pytest.mark.parametrize("name", ["gpt2", "mlp", "resnet"])
@pytest.mark.parametrize("method", ["vmap", "loop", "implicit"])
def test_every_method_agrees(name, method):
    w = world(name)
    # The mask of transformers for sdpa looks at values, which vmap forbids.
    model = _gpt2("eager") if name == "gpt2" else w.model
    batch = w.case.task.collate(w.case.examples)
    assert_close(sketch_gradients(model, w.case.task, batch, w.phi, method=method), w.reference)


class SequenceFirst(nn.Module):
    """Layers see [t, b, …]: where t = b, nothing in a shape tells which dim counts examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(8, VOCABULARY)
        self.inner = nn.Linear(6, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).transpose(0, 1)
        logits: Tensor = self.head(torch.tanh(self.inner(x)).cumsum(0)).transpose(0, 1)
        return logits


class SharedPositions(nn.Module):
    """A position embedding looked up once for the whole batch, by an index [t] without a batch dim."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, 8), nn.Embedding(16, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        logits: Tensor = self.head(torch.tanh(self.inner(x)).cumsum(1))
        return logits


class Experts(nn.Module):
    """Linear layers that see only the tokens routed to them, from any example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.gate = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        flat = x.reshape(-1, 8)
        weights = self.gate(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = (weights.argmax(-1) == i).nonzero()[:, 0]
            out = out.index_add(0, chosen, expert(flat[chosen]) * weights[chosen][:, i : i + 1])
        logits: Tensor = self.head(out.view_as(x).cumsum(1))
        return logits


class Odd(nn.Module):
    """Parameters used in every other way: scaled, transposed, functionally, twice, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.scale, self.unused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) * self.scale
        x = self.inner(torch.tanh(self.inner(x))) + functional.linear(x, 2 * self.inner.weight.T)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        logits: Tensor = x @ self.embedding.weight.T
        return logits


class Learned(nn.Module):
    """Layers whose input comes from parameters alone, by ways that are known and unknown, before any data joins."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.queries, self.start = nn.Parameter(torch.randn(16, 6)), nn.Parameter(torch.randn(8))
        self.project, self.mix = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        queries = self.project(self.queries[:t].expand(b, t, 6))
        mixed = self.mix(torch.einsum("b,h->bh", torch.ones(b, dtype=queries.dtype), self.start))
        logits: Tensor = self.head(torch.tanh(self.embedding(input_ids) + queries).cumsum(1) * mixed[:, None])
        return logits


@pytest.mark.parametrize("kind", [SequenceFirst, SharedPositions, Experts, Odd, Learned])
@pytest.mark.parametrize(("count", "length"), [(4, 8), (5, 5), (2, 6), (3, 4)])
def test_examples_are_told_apart_whatever_the_shapes(kind, count, length):
    """Batch and length are multiples of each other, equal, or not; wrong rows would give wrong numbers silently."""
    torch.manual_seed(count)
    model, task = kind().double(), CausalLM()
    ids = torch.randint(0, VOCABULARY, (count, length))
    parameters = Parameters(model)
    exact = exact_gradients(model, task, [{"input_ids": row} for row in ids], parameters)
    phi = BlockSum(parameters, 64)
    with warnings.catch_warnings(action="ignore"):
        sketcher = GradientSketcher(model, task, phi)
        for rows in (slice(None), slice(1, None), slice(0, 1)):  # what the first batch taught holds for the next
            assert_close(sketcher({"input_ids": ids[rows]}).values, phi(exact[rows]))


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that a user could miss."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), sorted(vars(m)))
        for m in model.modules()
    ]
    return [tensors, flags, modules, torch.is_grad_enabled()]


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm", "t5"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_left_as_found(name, error):
    case = CASES[name]
    model, batch = case.model().train(), case.task.collate(case.examples)
    next(model.parameters()).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    before = snapshot(model)

    def losses(module: nn.Module, part: Any) -> Tensor:
        values = case.task.losses(module, part)
        if error is not None:
            values.register_hook(_raise(error))
        return values

    phi = BlockSum(Parameters(model), 64)
    context = contextlib.nullcontext() if error is None else pytest.raises(error)
    with warnings.catch_warnings(action="ignore"), context:
        sketch_gradients(model, losses, batch, phi)
    assert_unchanged(before, snapshot(model))


def _raise(error: type[BaseException]) -> Any:
    def hook(gradient: Tensor) -> None:
        raise error("on purpose")

    return hook


def _gpt2(attention: str = "sdpa") -> nn.Module:
    model = CASES["gpt2"].model()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(attention):
    w = world("gpt2")
    batch = w.case.task.collate(w.case.examples)
    assert_close(sketch_gradients(_gpt2(attention), w.case.task, batch, w.phi), w.reference)


def test_the_flash_kernel_agrees():
    """Which sdpa runs where no mask is needed; on a CPU too, in float64."""
    w = world("gpt2")
    ids = torch.randint(4, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    exact = exact_gradients(w.model, w.case.task, [{"input_ids": row} for row in ids], w.parameters)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert_close(sketch_gradients(_gpt2(), w.case.task, {"input_ids": ids}, w.phi), w.phi(exact))


def test_a_gram_that_is_not_finite_names_the_pair():
    w = world("mlp")
    x, labels = w.case.task.collate(w.case.examples)
    x = x.clone()
    x[2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="example 0 of the first batch and example 2 of the second"):
        gradient_gram(w.model, w.case.task, (x, labels))


def test_compiled_models():
    w = world("convolutions")
    batch = w.case.task.collate(w.case.examples)
    assert_close(sketch_gradients(torch.compile(w.model), w.case.task, batch, w.phi), w.reference)
    assert torch.allclose(
        gradient_gram(torch.compile(w.model), w.case.task, batch), w.exact @ w.exact.T, rtol=1e-9, atol=1e-12
    )


def _checkpointed(reentrant: bool) -> nn.Module:
    model = _gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()  # transformers checkpoints in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_gradient_checkpointing():
    w = world("gpt2")
    batch = w.case.task.collate(w.case.examples)
    assert_close(sketch_gradients(_checkpointed(False), w.case.task, batch, w.phi), w.reference)
    with pytest.raises(InputError, match="use_reentrant=True"):
        sketch_gradients(_checkpointed(True), w.case.task, batch, w.phi)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_weights_accumulate_in_float32(name, dtype):
    """Against autograd of the same model, one example at a time: what differs is rounding of the half precision."""
    case = CASES[name]
    model, task = case.model().to(dtype), case.task
    parameters = Parameters(model)
    phi = BlockSum(parameters, BLOCKS)
    exact = exact_gradients(model, task, case.examples, parameters).float()
    sketches = sketch_gradients(model, task, task.collate(case.examples), phi)
    assert sketches.dtype == torch.float32
    assert_close(sketches, phi(exact), 3e-2)


def test_autocast():
    w = world("gpt2")
    model = CASES["gpt2"].model().float()
    batch = w.case.task.collate(w.case.examples)
    phi = BlockSum(Parameters(model), BLOCKS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sketches = sketch_gradients(model, w.case.task, batch, phi)
    assert sketches.dtype == torch.float32
    assert_close(sketches.double(), w.reference, 5e-2)


def test_adapters_only():
    peft = pytest.importorskip("peft")
    case = CASES["llama"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(case.model(), config).double().eval()
    parameters = Parameters(model)
    assert all("lora_" in name for name in parameters.names)
    exact = exact_gradients(model, case.task, case.examples, parameters)
    phi = BlockSum(parameters, 32)
    assert_close(sketch_gradients(model, case.task, case.task.collate(case.examples), phi), phi(exact))
    assert_close(gradient_gram(model, case.task, case.task.collate(case.examples)), exact @ exact.T, 1e-6)
