"""What an operator says of its own error holds, and what its check costs is bounded."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from curvature_situations import (
    Applies,
    FusedCrossEntropy,
    FusedNorm,
    FusedSwish,
    cross_entropy,
    fused_cross_entropy,
    mlp,
    points,
)
from test_curvature_situations import gradient, trained
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError

MODES = ("auto", "auto", "auto", "central-difference")


def network(draw: random.Random) -> nn.Sequential:
    """A random small net with whatever is hard to differentiate twice."""
    width, layers = 4, []
    for _ in range(draw.randint(1, 2)):
        wider = draw.randint(2, 4)
        layer: nn.Module = nn.Linear(width, wider)
        if draw.random() < 0.25:
            layer = nn.utils.parametrizations.weight_norm(layer)
        activations = (nn.ReLU(), nn.Tanh(), nn.GELU(), Applies(FusedSwish.apply), Applies(torch.sin))
        layers += [layer, *([nn.LayerNorm(wider)] if draw.random() < 0.3 else []), draw.choice(activations)]
        width = wider
    return nn.Sequential(*layers, nn.Linear(width, 3))


def dense(model: nn.Module, losses: Any, batch: Any) -> Tensor:
    """The Hessian in float64 by differences of first derivatives; the model is left where it was."""
    values = trained(model)
    start = nn.utils.parameters_to_vector(values).detach()

    def at(point: Tensor) -> Tensor:
        with torch.no_grad():
            nn.utils.vector_to_parameters(point, values)
        return gradient(model, losses, batch)

    steps = 1e-6 * torch.eye(len(start), dtype=torch.float64)
    H = torch.stack([(at(start + step) - at(start - step)) / 2e-6 for step in steps])
    return (H + H.T) / 2


@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
@pytest.mark.parametrize("nets", [50, pytest.param(100, marks=pytest.mark.slow)])
def test_stated_errors_cover_on_random_nets(nets: int) -> None:
    """``error_along`` is the error |Hv − truth|: within a factor of two always, and not below it in 95 of 100."""
    draw, found, ratios = random.Random(0), [], []
    for seed in range(nets):
        torch.manual_seed(seed)
        model = network(draw)
        loss = fused_cross_entropy if draw.random() < 0.2 else cross_entropy
        dtype = draw.choice((torch.float64, torch.float32, torch.float32, torch.bfloat16))
        x, y = points(8)
        wide = copy.deepcopy(model.to(dtype)).double()
        H = dense(wide, loss, (x.to(dtype).double(), y))
        operator = gs.hessian(model, loss, (x.to(dtype), y), mode=draw.choice(MODES))
        leading = torch.linalg.eigh(H).eigenvectors[:, -1]
        v = leading if draw.random() < 0.5 else torch.randn(len(H), dtype=torch.float64)
        v = (v / v.norm()).to(operator.dtype)
        off = float((operator(v).double() - H @ v.double()).norm())
        exact = 1e-8 * float(H.norm())  # of the oracle
        found.append((off - exact) / (operator.error_along(v) + 1e-12))
        ratios.append(off / float(H.norm()))
    assert max(found) < 2
    assert sum(ratio <= 1.001 for ratio in found) >= 0.95 * nets
    assert sum(ratio < 0.01 for ratio in ratios) > 0.95 * nets  # bfloat16 has two digits


def test_the_check_finds_the_leading_error_of_a_difference() -> None:
    """In float32 alone, where steps must be long, the leading direction is truncated most and the error says so."""

    class Float32(nn.Module):
        """Computes in float32 whatever its weights are, with a curvature that grows fast."""

        def __init__(self) -> None:
            super().__init__()
            self.w, self.inside = nn.Parameter(torch.randn(6)), torch.float32

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(8 * torch.tanh(x.to(self.inside) @ self.w.to(self.inside)[:, None]))

    torch.manual_seed(0)
    model, x = Float32(), torch.randn(7, 6)

    def losses(m: Any, batch: Any) -> Tensor:
        return m(batch[0])[:, 0]

    wide = copy.deepcopy(model).double()
    wide.inside = torch.float64
    exact = gs.hessian(wide, losses, (x.double(),)).dense()
    operator = gs.hessian(model, losses, (x,), mode="central-difference")
    values, vectors = torch.linalg.eigh(exact)
    v = vectors[:, values.abs().argmax()].float()
    off = float((operator(v).double() - exact @ v.double()).norm())
    assert off <= operator.error_along(v) + 1e-5 * float(values.abs().max())
    assert off < 0.01 * float(values.abs().max())
    assert operator.check is not None
    assert operator.check.error > 1e-7


@pytest.mark.parametrize("mode", ["auto", "jvp-of-grad", "central-difference"])
def test_a_check_costs_a_bounded_number_of_passes_over_one_batch(mode: str) -> None:
    torch.manual_seed(0)
    model, calls = mlp(), []
    data = list(zip(*points(40), strict=True))
    model.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    operator = gs.hessian(model, cross_entropy, data, mode=mode, batch_size=4)
    del calls[:]
    operator(torch.randn(operator.n))
    first = len(calls)
    del calls[:]
    operator(torch.randn(operator.n))
    assert first - len(calls) <= 24


class Root(nn.Module):
    """Layers with norms in float32, as language models have them."""

    def __init__(self, norm: Any, width: int = 300, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head, self.norm, self.seen = nn.Linear(width, 3), norm, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.head.weight.dtype)
        for layer in self.layers:
            x = x + torch.tanh(layer(self.norm(x.float()).to(layer.weight)))
        return self.head(x)


def root_norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_narrow_inside_are_checked_in_their_own_precision(dtype: torch.dtype) -> None:
    """Weights in float64 would gain nothing, and cost twice the memory and five schemes of differences."""
    torch.manual_seed(0)
    model, x = Root(root_norm).to(dtype), torch.randn(16, 300, dtype=dtype)
    operator = gs.hessian(model, cross_entropy, (x, torch.arange(16) % 3))
    del model.seen[:]
    operator(torch.randn(operator.n))
    assert operator.check is not None
    assert operator.check.conclusive
    assert operator.check.error < (1e-2 if dtype == torch.float32 else 0.2)
    assert model.seen.count(torch.float64) == 1  # where it shows that it narrows
    assert len(model.seen) < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_derivative_in_a_model_that_narrows_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Root(FusedNorm.apply).to(dtype), torch.randn(16, 300, dtype=dtype)
    operator = gs.hessian(model, cross_entropy, (x, torch.arange(16) % 3), mode="grad-of-grad")
    with pytest.raises(InputError, match="hand-written function"):
        operator(torch.randn(operator.n))


def test_weights_that_a_model_looks_at_do_not_end_its_check() -> None:
    """One number stands for all weights where the precision of a model is looked for."""

    def forward(x: Tensor) -> Tensor:
        if float(x.std()) < 1e-3:
            raise ValueError("all alike")
        return x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), Applies(forward), nn.Linear(5, 3))
    operator = gs.hessian(model, cross_entropy, points())
    operator(torch.randn(operator.n))
    assert operator.check is not None
    assert operator.check.error < 1e-5


def test_kinks_are_said_where_steps_must_be_long() -> None:
    """A model that computes in float32 alone needs steps that cross the kinks of its ReLUs."""

    def forward(x: Tensor) -> Tensor:
        return x.float().relu().to(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), Applies(forward), nn.Linear(300, 3))
    operator = gs.hessian(model, cross_entropy, points(40), mode="central-difference")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        operator(torch.randn(operator.n))
    assert operator.check is not None
    said = [str(w.message) for w in heard if issubclass(w.category, GradsketchWarning)]
    assert bool(said) == (operator.check.error > 0.01)
    assert all("kinks" in text for text in said)
    assert operator.check.conclusive == (not said)


def test_a_wrong_derivative_is_said_once_and_named() -> None:
    torch.manual_seed(0)
    operator = gs.hessian(mlp(), fused_cross_entropy, points())
    v = torch.randn(operator.n)
    with pytest.warns(GradsketchWarning, match="off along a random direction, most in .*FusedCrossEntropyBackward"):
        operator(v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator(v)
    assert operator.mode == "central-difference"
    assert FusedCrossEntropy.__name__


def test_half_precision_that_overflows_says_what_to_type() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Applies(lambda x: (300 * x.square()).square()), nn.Linear(5, 3)).half()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25)
    x, y = points()

    def losses(m: Any, batch: Any) -> Tensor:
        return m(batch[0] * 0.3)[:, 0].float() * 1e3

    operator = gs.hessian(model, losses, (x.half(), y))
    with pytest.raises(NonFiniteError, match=r"float16.*bfloat16.*mode='central-difference'"):
        operator(torch.ones(operator.n))


def test_results_keep_float64() -> None:
    model = mlp().double()
    x, y = points()
    assert gs.loss_gradient(model, cross_entropy, (x.double(), y)).dtype == torch.float64
    assert gs.loss_gradient(mlp(), cross_entropy, (x, y)).dtype == torch.float32
    assert gs.hessian(model, cross_entropy, (x.double(), y)).to_scipy().dtype == "float64"
    assert gs.hessian(mlp(), cross_entropy, (x, y)).to_scipy().dtype == "float32"


def test_losses_per_token_are_averaged_by_curvature_and_refused_by_the_metric() -> None:
    """One loss a token: the gradient and the Hessian divide by their number, and no metric divides by another."""

    def per_token(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")

    model, batch = mlp(), (torch.randn(4, 5, 4), torch.randint(0, 3, (4, 5)))
    mean = per_token(model, batch).mean()
    with pytest.raises(InputError, match=r"20 losses from .* for a batch of 4 examples"):
        gs.Loss(per_token, batch)(model)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(model.parameters()))])
    torch.testing.assert_close(gs.loss_gradient(model, per_token, batch), wanted)


def test_loss_gradient_refuses_as_the_hessian_does() -> None:
    x, z = torch.randn(12, 4), torch.randn(12, 3)
    with pytest.raises(InputError, match="takes as batches"):
        gs.loss_gradient(mlp(), lambda m, b: (m(b[0]) - b[1]).square().flatten(1).sum(1), [(x, z)])
