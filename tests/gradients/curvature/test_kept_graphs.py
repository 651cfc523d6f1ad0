"""A kept graph is used only while everything it was made from is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_situations import LoRA, cross_entropy, mlp, points
from torch import Tensor, nn

import gradsketch as gs

OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


def step(model: nn.Module, batch: Any, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    cross_entropy(model, batch).mean().backward()
    optimiser.step()


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("build", [gs.hessian, gs.gauss_newton, gs.fisher])
def test_steps_of_every_optimiser_are_seen(make: Callable[[Any], torch.optim.Optimizer], build: Any) -> None:
    torch.manual_seed(0)
    model, batch = mlp(), points()
    operator = build(model, cross_entropy, batch, check=False)
    v = torch.randn(operator.n)
    before = operator(v)
    step(model, batch, make(model.parameters()))
    after = operator(v)
    torch.testing.assert_close(after, build(model, cross_entropy, batch, check=False)(v))
    assert (after - before).norm() > 1e-3 * before.norm()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.temperature, self.settings = LoRA(nn.Linear(4, 5)), 1.0, {"deep": [{"gain": 1.0}]}
        self.register_buffer("shift", torch.zeros(5))
        self.plain, self.head = torch.zeros(5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.settings["deep"][0]["gain"]
        return self.head(torch.tanh(self.inner(x) + self.shift + self.plain)) / self.temperature * gain


factor = 1.0


def losses(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) * factor


def change_global(model: Any, batch: Any) -> None:
    global factor
    factor = 2.0 if factor == 1.0 else 1.0


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "an attribute": lambda m, b: setattr(m, "temperature", 0.2),
    "inside a list in a dict": lambda m, b: m.settings["deep"][0].update(gain=3.0),
    "the scale of an adapter": lambda m, b: m.inner.scaling.update(default=2.0),
    "a disabled adapter": lambda m, b: setattr(m.inner, "_disable_adapters", True),
    "a buffer": lambda m, b: m.shift.add_(0.5),
    "a buffer by .data": lambda m, b: m.shift.data.add_(0.5),
    "a tensor that is no buffer": lambda m, b: m.plain.add_(0.5),
    "weights by .data": lambda m, b: m.inner.A.data.mul_(2.0),
    "two rows exchanged by .data": lambda m, b: m.inner.A.data.copy_(m.inner.A.data.flip(0)),
    "frozen weights": lambda m, b: m.inner.base.weight.data.mul_(2.0),
    "the batch": lambda m, b: b[0].mul_(2.0),
    "the labels": lambda m, b: b[1].copy_((b[1] + 1) % 3),
    "a hook": lambda m, b: m.inner.register_forward_hook(lambda *a: a[-1] * 2),
    "train or eval": lambda m, b: m.eval(),
    "a global variable of the loss": change_global,
    "a state dict": lambda m, b: m.load_state_dict({k: t * 2 for k, t in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_a_forward_pass_reads_is_seen(change: Callable[[Any, Any], Any]) -> None:
    torch.manual_seed(0)
    model, batch = Scaled(), points()
    operator = gs.hessian(model, losses, batch, check=False)
    v = torch.randn(operator.n)
    before = operator(v)
    assert torch.equal(operator(v), before)
    with torch.no_grad():
        change(model, batch)
    if hasattr(change, "__name__") and change is CHANGES["a state dict"]:
        operator = gs.hessian(model, losses, batch, check=False)  # other tensors: another operator
    wanted = gs.hessian(model, losses, batch, check=False)(v)
    torch.testing.assert_close(operator(v), wanted)
    if change is not CHANGES["train or eval"]:
        assert not torch.allclose(wanted, before)
    if change is change_global:
        change_global(model, batch)


def test_autocast_around_a_product_is_seen() -> None:
    torch.manual_seed(0)
    model, batch = mlp(), points()
    operator = gs.hessian(model, cross_entropy, batch, check=False)
    v = torch.randn(operator.n)
    plain = operator(v)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(operator(v), plain)
    torch.testing.assert_close(operator(v), plain)


def test_a_graph_is_kept_though_forward_passes_count() -> None:
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    torch.manual_seed(0)
    model = Counting(*mlp())
    operator = gs.hessian(model, cross_entropy, points(), check=False)
    v = torch.randn(operator.n)
    for _ in range(3):
        operator(v)
    assert model.calls == 1


@pytest.mark.parametrize("build", [gs.hessian, gs.gauss_newton, gs.fisher])
def test_graphs_of_several_batches_are_kept_where_they_fit(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, calls = mlp(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    data = list(zip(*points(12), strict=True))
    operator = build(model, cross_entropy, data, check=False, batch_size=4)
    v = torch.randn(2, operator.n)
    first, second = operator(v), operator(v)
    made = len(calls)
    for _ in range(3):
        torch.testing.assert_close(operator(v), first)
    torch.testing.assert_close(second, first)
    assert len(calls) == made
    step(
        model, tuple(map(torch.stack, zip(*data, strict=True))), torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    )
    torch.testing.assert_close(operator(v), build(model, cross_entropy, data, check=False, batch_size=4)(v))
    data[9][0].mul_(2.0)
    torch.testing.assert_close(operator(v), build(model, cross_entropy, data, check=False, batch_size=4)(v))
    monkeypatch.setattr("gradsketch.gradients.curvature.base._KEPT_BYTES", 0)
    streamed = build(model, cross_entropy, data, check=False, batch_size=4)
    del calls[:]
    for _ in range(3):
        streamed(v)
    assert len(calls) == 9
