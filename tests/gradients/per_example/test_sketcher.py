"""Sketches made during backward equal sketches of gradients formed one example at a time, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradsketch as gs


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
