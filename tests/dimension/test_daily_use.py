"""A Subspace in daily use: optimisers, averages, pickles, casts, compilers, processes, quantised weights."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

import gradsketch as gs
from launch import PYTHONPATH, run

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 3
D = 16


def net(*, batch_norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def opened(model: nn.Module | None = None, *, moved: float = 0.0) -> gs.Subspace:
    model = net() if model is None else model
    parameters = gs.Parameters(model)
    subspace = gs.Subspace(model, parameters, gs.AFFD(parameters.n, D))
    with torch.no_grad():
        subspace.w.normal_(std=moved or 1e-9, generator=torch.Generator().manual_seed(2)) if moved else None
    return subspace


def at(w: Tensor) -> nn.Module:
    """Return an ordinary model with theta0 + Phiᵀ w written into it, Phi as a matrix."""
    model = net()
    parameters = gs.Parameters(model)
    phi = gs.AFFD(parameters.n, D).dense(torch.float32)
    theta = parameters.flatten() + phi.T @ w.detach().float()
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(parameters.unflatten(theta)[name])
    return model


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimiser.step()


# --- optimisers and what surrounds them ---

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "foreach Adam": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "AdamW with decay": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_after_every_optimiser_the_model_is_at_its_point(name: str) -> None:
    subspace = opened()
    train(subspace, OPTIMISERS[name](subspace.parameters()))
    assert subspace.w.norm().item() > 0.05
    for called in (subspace, subspace.model):
        torch.testing.assert_close(called(X), at(subspace.w)(X))


def test_lbfgs_goes_down() -> None:
    subspace = opened()
    optimiser = torch.optim.LBFGS(subspace.parameters(), max_iter=10)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(subspace(X), Y)
        loss.backward()
        return loss

    before = closure().item()
    optimiser.step(closure)
    assert cross_entropy(subspace(X), Y).item() < before - 0.01
    torch.testing.assert_close(subspace(X), at(subspace.w)(X))


def test_schedules_groups_clipping_and_accumulation() -> None:
    whole, parts = opened(), opened()
    for subspace, size in ((whole, 32), (parts, 8)):
        optimiser = torch.optim.AdamW([{"params": [subspace.w], "weight_decay": 0.0}], lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=5)
        for _ in range(5):
            optimiser.zero_grad()
            for x, y in zip(X.split(size), Y.split(size), strict=True):
                (100 * cross_entropy(subspace(x), y) * size / 32).backward()
            norm = torch.nn.utils.clip_grad_norm_(subspace.parameters(), 1.0)
            assert norm > 1
            torch.testing.assert_close(subspace.w.grad.norm(), torch.tensor(1.0))
            optimiser.step()
            schedule.step()
    torch.testing.assert_close(parts.w, whole.w, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole(X), at(whole.w)(X))


def test_an_average_of_weights_is_at_the_average_of_w() -> None:
    subspace, seen = opened(), []
    average = torch.optim.swa_utils.AveragedModel(subspace)
    optimiser = torch.optim.Adam(subspace.parameters(), lr=0.1)
    for _ in range(4):
        train(subspace, optimiser, 1)
        average.update_parameters(subspace)
        seen.append(subspace.w.detach().clone())
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(average.module.w.detach(), mean)
    torch.testing.assert_close(average(X), at(mean)(X))
    torch.testing.assert_close(subspace(X), at(seen[-1])(X))


# --- pickles ---


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize("inner", [False, True])
def test_copies_are_subspaces_of_their_own(copied: Callable[[nn.Module], nn.Module], inner: bool) -> None:
    subspace = opened()
    train(subspace, torch.optim.Adam(subspace.parameters(), lr=0.1))
    wanted = subspace(X)
    other = copied(subspace.model if inner else subspace)
    assert torch.equal(other(X), wanted)
    with torch.no_grad():
        subspace.w.zero_()
    assert torch.equal(other(X), wanted)
    if not inner:
        assert type(other).__name__ == "Subspace"
        train(other, torch.optim.Adam(other.parameters(), lr=0.1), 2)
        torch.testing.assert_close(other(X), at(other.w)(X))
        merged = other.merge()
        assert type(merged) is nn.Sequential
        assert type(merged[0]) is nn.Linear


def test_a_pickle_is_read_in_another_process(tmp_path: Path) -> None:
    subspace = opened(moved=0.3)
    torch.save(subspace, tmp_path / "subspace.pt")
    torch.save(subspace(X), tmp_path / "wanted.pt")
    program = (
        "import torch, sys; s = torch.load(sys.argv[1] + '/subspace.pt', weights_only=False);"
        "x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1));"
        "assert torch.equal(s(x), torch.load(sys.argv[1] + '/wanted.pt', weights_only=False))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": PYTHONPATH}
    )


# --- casts, and other weights underneath ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["subspace", "model"])
@pytest.mark.parametrize("when", ["fresh", "called", "trained"])
def test_a_cast_at_any_time(dtype: torch.dtype, what: str, when: str) -> None:
    subspace = opened(moved=0.3 if when == "trained" else 0.0)
    wanted = at(subspace.w)(X)
    if when != "fresh":
        torch.testing.assert_close(subspace(X), wanted)
    (subspace if what == "subspace" else subspace.model).to(dtype)
    assert subspace.w.dtype == (dtype if what == "subspace" else torch.float32)
    for called in (subspace, subspace.model):
        out = called(X.to(dtype))
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float64 else 0.05
        torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance)
    cross_entropy(out.float(), Y).backward()
    assert subspace.w.grad.dtype == subspace.w.dtype


def test_weights_loaded_underneath_are_where_it_starts_from() -> None:
    subspace = opened(moved=0.3)
    subspace(X)
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    subspace.model.load_state_dict(other.state_dict())
    moved = opened(other, moved=0.3)
    torch.testing.assert_close(subspace(X), moved(X))


def doubled() -> nn.Sequential:
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    return other


@pytest.mark.parametrize("how", ["another tensor", "in place"])
def test_weights_put_past_the_version_counter_are_merged(how: str) -> None:
    subspace, other = opened(moved=0.3), doubled()
    before = subspace(X)
    for parameter, wanted in zip(subspace.model.parameters(), other.parameters(), strict=True):
        if how == "another tensor":
            parameter.data = wanted.detach().clone()
        else:
            parameter.data.copy_(wanted)
    wanted = opened(other, moved=0.3)(X)
    if how == "another tensor":
        torch.testing.assert_close(subspace(X), wanted)
    assert not torch.allclose(before, wanted)
    torch.testing.assert_close(subspace.merge()(X), wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_that_is_called_alone_is_at_the_point_after_a_step(fused: bool) -> None:
    """A fused step raises no version counter, and no forward pass of the model comes before the layer's."""
    subspace = opened(moved=0.3)
    train(subspace, torch.optim.Adam(subspace.parameters(), lr=0.1, fused=fused))
    assert isinstance(subspace.model, nn.Sequential)
    torch.testing.assert_close(subspace.model[0](X), at(subspace.w)[0](X))  # type: ignore[index]


def test_a_layer_that_was_replaced_is_named() -> None:
    model = net()
    subspace = opened(model, moved=0.3)
    subspace(X)
    own, model[-1] = model[-1], nn.Linear(8, 3)
    with torch.no_grad():
        subspace.w.add_(1.0)
    for work in (lambda: subspace(X), subspace.merge):
        with pytest.raises(gs.InputError, match=r"'2\.weight'"):
            work()
    model[-1] = own
    torch.testing.assert_close(subspace(X), at(subspace.w)(X))
    model[0] = nn.Sequential(model[0], nn.Identity())  # a wrapper around it is another matter
    torch.testing.assert_close(subspace(X), at(subspace.w)(X))
    subspace.close()
    assert own.weight.requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.spectral_norm,
        torch.nn.utils.weight_norm,
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() + 1)),
        lambda layer: layer.load_state_dict({n: t + 1 for n, t in layer.state_dict().items()}, assign=True),
    ],
    ids=["prune", "prune-l1", "spectral-norm", "weight-norm", "another-parameter", "assigned-state"],
)
def test_pruning_and_other_parameters_of_an_open_layer_are_refused(change: Callable[[nn.Module], Any]) -> None:
    model = net()
    subspace = opened(model, moved=0.3)
    subspace(X)
    # Loading a state, torch wraps the error in one of its own.
    with pytest.raises(Exception, match=r"'0\.weight', which was taken out .*Call merge\(\) or close\(\) first"):
        change(model[0])
    torch.testing.assert_close(subspace(X), at(subspace.w)(X))
    subspace.close()
    change(model[0])


def test_a_w_of_another_size_is_refused() -> None:
    subspace = opened()
    subspace.w = nn.Parameter(torch.ones(D + 1))
    with pytest.raises(gs.InputError, match=f"{D + 1}"):
        subspace(X)


# --- compilers ---

COMPILED: dict[str, Callable[[nn.Module, object], nn.Module]] = {
    "around": lambda model, backend: torch.compile(opened(model), backend=backend),
    "inside": lambda model, backend: opened(torch.compile(model, backend=backend)),
    "in place": lambda model, backend: (model.compile(backend=backend), opened(model))[1],
    "one layer": lambda model, backend: (
        model.__setitem__(-1, torch.compile(model[-1], backend=backend)),
        opened(model),
    )[1],
}


@pytest.mark.parametrize("how", COMPILED)
def test_compilation_happens_once_and_changes_nothing(how: str) -> None:
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain, compiled = opened(net(batch_norm=True)), COMPILED[how](net(batch_norm=True), backend)
    outputs = []
    for subspace in (plain, compiled):
        optimiser = torch.optim.Adam([subspace.w], lr=0.1)
        train(subspace, optimiser, 2)
        count = backend.frame_count
        train(subspace, optimiser, 6)
        assert backend.frame_count == count
        subspace.eval()
        with torch.no_grad():
            outputs.append(subspace(X))
    assert backend.frame_count > 0
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(compiled.w, plain.w)


def test_a_compiled_module_that_is_called_alone_follows_w() -> None:
    torch._dynamo.reset()
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    subspace = opened(model)
    for std in (0.3, 0.6):
        with torch.no_grad():
            subspace.w.normal_(std=std)
            torch.testing.assert_close(model[2](X.repeat(1, 2)[:, :8]), at(subspace.w)[2](X.repeat(1, 2)[:, :8]))


@pytest.mark.parametrize("saved_on", ["plain", "compiled"])
@pytest.mark.parametrize("loaded_on", ["plain", "compiled"])
def test_buffers_are_found_on_compiled_and_plain_bases(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    def base(kind: str) -> nn.Module:
        model = net(batch_norm=True)
        return torch.compile(model, backend="eager") if kind == "compiled" else model

    subspace = opened(base(saved_on))
    train(subspace, torch.optim.Adam([subspace.w], lr=0.1))
    wanted = subspace.eval()(X)
    subspace.save_pretrained(tmp_path)
    assert "model.1.running_mean" in subspace.state_dict()
    torch.testing.assert_close(gs.Subspace.from_pretrained(base(loaded_on), tmp_path).eval()(X), wanted)
    other = opened(base(loaded_on))
    assert "matched" in str(other.load_state_dict(subspace.state_dict()))
    torch.testing.assert_close(other.eval()(X), wanted)


def test_transforms_of_torch_func_are_refused() -> None:
    subspace = opened()

    def loss(w: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(subspace, {"w": w}, (X,)), Y)

    with pytest.raises(gs.InputError, match=r"gs\.sketch_gradients\(subspace"):
        torch.func.grad(loss)(subspace.w.detach())
    out = subspace(X)[0]
    with pytest.raises(gs.InputError, match="is_grads_batched"):
        torch.autograd.grad(out, subspace.w, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for row in torch.eye(3):
        assert torch.autograd.grad(out, subspace.w, row, retain_graph=True)[0].norm() > 0


# --- quantised weights ---


class Packed(nn.Module):
    """A layer whose weight is kept in bytes, as 8-bit layers keep it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randint(-99, 99, (8, 6), dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype).T / 99) + self.bias


def test_packed_weights_are_left_alone() -> None:
    model = nn.Sequential(Packed(), nn.Tanh(), nn.Linear(8, 3))
    packed = model[0].weight
    before = packed.clone()
    assert "0.weight" not in gs.Parameters(model, frozen=True).names
    assert type(model[0]) is Packed
    subspace = opened(model)
    train(subspace, torch.optim.Adam([subspace.w], lr=0.1))
    inside = subspace(X)
    assert torch.equal(subspace.merge()(X), inside)
    assert model[0].weight is packed
    assert torch.equal(packed, before)
    assert packed.dtype == torch.int8


# --- several processes ---


def test_processes_train_together_or_are_refused() -> None:
    run("dimension.processes")
