"""Sketches made during backward equal sketches of gradients formed one example at a time, in float64."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, NonFiniteError


def exact(model, losses, batch, parameters):
    """Flat per-example gradients by autograd, one example alone at a time."""
    rows = []
    for i in range(len(next(iter(batch.values())))):
        loss = losses(model, {name: value[i : i + 1] for name, value in batch.items()}).sum()
        parts = torch.autograd.grad(loss, [t for _, t in parameters], allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(t) if g is None else g).flatten()
                    for g, (_, t) in zip(parts, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def token_losses(model, batch):
    logits = model(batch["ids"])
    return functional.cross_entropy(logits.mT, batch["y"], reduction="none").sum(1)


class Tiny(nn.Module):
    """Tied embedding, shared block, norm, positions shared by the batch, a raw use, a functional use."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 6, padding_idx=0), nn.Embedding(9, 6)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6, bias=False))
        self.scale = nn.Parameter(torch.ones(6))
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        for _ in range(3):
            x = x + self.scale * self.block(x)
        x = self.conv(x.mT).mT
        return functional.linear(x, self.embed.weight)


def make(b=5, t=7):
    torch.manual_seed(0)
    model = Tiny().double()
    return model, {"ids": torch.randint(0, 11, (b, t)), "y": torch.randint(0, 11, (b, t))}


@pytest.mark.parametrize("t", [5, 7])  # five tokens in a batch of five: shapes alone would mislead
@pytest.mark.parametrize("d", [40, 256])
def test_equals_the_sketch_of_formed_gradients(d, t):
    model, batch = make(t=t)
    parameters = gs.Parameters(model)
    phi = gs.BlockSum(parameters, d)
    expected = phi(exact(model, token_losses, batch, parameters))
    torch.testing.assert_close(gs.sketch_gradients(model, token_losses, batch, phi), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "outer", "vmap", "loop", "implicit"])
def test_methods_agree(method):
    model, batch = make()
    parameters = gs.Parameters(model)
    expected = exact(model, token_losses, batch, parameters)
    for phi in (gs.BlockSum(parameters, 64), gs.AFFD(parameters.n, 64)):
        got = gs.sketch_gradients(model, token_losses, batch, phi, parameters=parameters, method=method)
        torch.testing.assert_close(got, phi(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_found(error):
    model, batch = make()
    model.block[1].weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}

    def failing(model, batch):
        token_losses(model, batch)
        raise error

    sketcher = gs.GradientSketcher(model, failing, gs.BlockSum(gs.Parameters(model), 64))
    with pytest.raises(error):
        sketcher(batch)
    gs.sketch_gradients(model, token_losses, batch, gs.BlockSum(gs.Parameters(model), 64))
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])
    assert torch._C._len_torch_function_stack() == 0


class Root(nn.Module):
    """Its second layer has an infinite derivative, at a finite loss, where its input is zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).abs().sqrt())


def class_losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def broken_batch(where, value):
    torch.manual_seed(1)
    x = torch.randn(5, 3)
    x[where] = value
    return {"x": x, "y": torch.tensor([0, 1, 0, 1, 0])}


# (what is put in the place of an example, what is said of it, the first parameter whose gradient it spoils)
NOT_FINITE = [(torch.inf, "its loss is nan", "first.weight"), (0.0, "its gradient of first.weight", "first.weight")]


@pytest.mark.parametrize("method", ["auto", "outer", "vmap", "loop", "implicit"])
@pytest.mark.parametrize(("value", "words", "name"), NOT_FINITE)
def test_what_is_not_finite_is_named_by_example_and_parameter(method, value, words, name):
    model = Root()
    sketcher = gs.GradientSketcher(model, class_losses, gs.BlockSum(gs.Parameters(model), 16), method=method)
    with pytest.raises(NonFiniteError, match=f"example 3 of the batch: {words}") as caught:
        sketcher(broken_batch(3, value))
    assert name in str(caught.value)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["BlockSum", "AFFD"])
@pytest.mark.parametrize(("value", "words", "name"), NOT_FINITE)
def test_what_is_not_finite_can_be_skipped_and_is_recorded(kind, value, words, name):
    model = Root()
    parameters = gs.Parameters(model)
    phi = gs.BlockSum(parameters, 16) if kind == "BlockSum" else gs.AFFD(parameters.n, 16)
    sketcher = gs.GradientSketcher(model, class_losses, phi, parameters=parameters, on_non_finite="skip")
    sketched, sound = sketcher(broken_batch([0, 1], value)), sketcher(broken_batch([], value))
    assert sorted(sketched.skipped) == [0, 1]
    assert all(words in reason for reason in sketched.skipped.values())
    assert not sketched.values[[0, 1]].any()
    torch.testing.assert_close(sketched.values[2:], sound.values[2:])
    assert sound.skipped == {}


@pytest.mark.parametrize("method", ["auto", "loop", "implicit"])
def test_dropout_in_training_mode_is_said_once(method):
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    sketcher = gs.GradientSketcher(model, class_losses, gs.BlockSum(gs.Parameters(model), 16), method=method)
    batch = broken_batch([], 0)
    with pytest.warns(GradsketchWarning, match=r"one draw .* call model\.eval\(\)"):
        first = sketcher(batch).values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sketcher(batch).values
        assert not torch.allclose(first, second)
        assert model.training
        fixed = model.eval()
        assert torch.equal(sketcher(batch).values, sketcher(batch).values)
        fresh = gs.GradientSketcher(fixed, class_losses, sketcher.sketch, method=method)
        torch.testing.assert_close(fresh(batch).values, sketcher(batch).values)


def test_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    phi = gs.BlockSum(gs.Parameters(model), 16)
    with pytest.raises(gs.InputError, match=r"BatchNorm in training mode(.|\n)*model.eval\(\)"):
        gs.sketch_gradients(model, class_losses, broken_batch([], 0), phi)
    assert gs.sketch_gradients(model.eval(), class_losses, broken_batch([], 0), phi).shape == (5, 16)


def test_losses_that_depend_on_batch_mates_are_refused():
    def contrasted(model, batch):
        logits = model(batch["x"])
        return functional.cross_entropy(logits - 2 * logits.mean(0), batch["y"], reduction="none")

    model = nn.Linear(3, 2)
    with pytest.raises(gs.InputError, match=r"together and .* one example at a time"):
        gs.sketch_gradients(model, contrasted, broken_batch([], 0), gs.BlockSum(gs.Parameters(model), 8))
