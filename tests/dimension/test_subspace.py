"""A Subspace is the model at theta0 + Phiᵀ w, and leaves the model alone."""

import copy
import gc
import inspect
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradsketch as gs
from dimension.maps import Gaussian, Identity
from gradsketch.dimension.subspace import Subspace
from gradsketch.sketches.base import Sketch

N_INPUTS = 5


class Net(nn.Module):
    """Tied, unused and frozen parameters, batch statistics, and a norm."""

    def __init__(self, *, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(N_INPUTS, 6)
        self.norm = nn.LayerNorm(6)
        self.middle = nn.Linear(6, 6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.middle.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(6, 2).requires_grad_(False)
        self.reentrant = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.tied(torch.tanh(self.middle(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.frozen(self.batch_norm(x))


def made(seed: int = 0, dtype: torch.dtype = torch.float64, **options: bool | None) -> tuple[Net, gs.Parameters]:
    torch.manual_seed(seed)
    model = Net(**options).to(dtype)
    return model, gs.Parameters(model)


def data(rows: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, N_INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


def randomised(subspace: Subspace, scale: float = 0.1) -> Subspace:
    with torch.no_grad():
        subspace.w.copy_(scale * torch.randn(subspace.w.shape, generator=torch.Generator().manual_seed(2)))
    return subspace


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def reference(w: Tensor, sketch: Sketch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient with respect to theta at theta0 + Phiᵀ w, by functional_call on a fresh model."""
    model, parameters = made()
    theta = (parameters.flatten() + sketch.lift(w.detach())).requires_grad_()
    output = torch.func.functional_call(model, parameters.unflatten(theta), (x,))
    loss = output.square().sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    return loss.detach(), gradient


@pytest.fixture
def subspace() -> Subspace:
    model, parameters = made()
    return randomised(Subspace(model, parameters, Gaussian(parameters.n, 11)))


# --- what it computes ---


def test_forward_and_gradient_are_those_at_theta0_plus_lift(subspace: Subspace) -> None:
    loss, gradient = reference(subspace.w, subspace.sketch, data())
    ours = loss_of(subspace, data())
    ours.backward()
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(subspace.w.grad, subspace.sketch(gradient))


def test_w_is_the_only_trainable_tensor(subspace: Subspace) -> None:
    assert [name for name, p in subspace.named_parameters() if p.requires_grad] == ["w"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(subspace: Subspace, reentrant: bool) -> None:
    loss_of(subspace, data()).backward()
    model, parameters = made(checkpointed=reentrant)
    other = randomised(Subspace(model, parameters, subspace.sketch))
    loss_of(other, data()).backward()
    torch.testing.assert_close(other.w.grad, subspace.w.grad)


def test_gradients_accumulate_over_micro_batches(subspace: Subspace) -> None:
    subspace.eval()  # batch statistics would differ between the whole and its halves
    loss_of(subspace, data()).backward()
    whole = subspace.w.grad.clone()
    subspace.w.grad = None
    for part in data().split(3):
        loss_of(subspace, part).backward()
    torch.testing.assert_close(subspace.w.grad, whole)


def test_two_forwards_before_one_backward(subspace: Subspace) -> None:
    subspace.eval()
    first, second = data().split(4)
    (loss_of(subspace, first) + loss_of(subspace, second)).backward()
    both = subspace.w.grad.clone()
    subspace.w.grad = None
    loss_of(subspace, data()).backward()
    torch.testing.assert_close(both, subspace.w.grad)


def test_an_old_graph_keeps_its_own_point(subspace: Subspace) -> None:
    subspace.eval()
    loss = loss_of(subspace, data())
    expected = subspace.sketch(reference_in_eval(subspace.w, subspace.sketch))
    randomised(subspace, 0.3)
    subspace(data())
    loss.backward()
    torch.testing.assert_close(subspace.w.grad, expected)


def reference_in_eval(w: Tensor, sketch: Sketch) -> Tensor:
    model, parameters = made()
    model.eval()
    theta = (parameters.flatten() + sketch.lift(w.detach())).requires_grad_()
    output = torch.func.functional_call(model, parameters.unflatten(theta), (data(),))
    (gradient,) = torch.autograd.grad(output.square().sum(), theta)
    return gradient


def test_a_backward_that_failed_leaves_nothing_behind(subspace: Subspace) -> None:
    loss_of(subspace, data()).backward()
    expected = subspace.w.grad.clone()
    subspace.w.grad = None

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise MemoryError

    hidden = subspace.model.norm(Fails.apply(subspace.model.first(data())))
    with pytest.raises(MemoryError):
        subspace.model.middle(hidden).sum().backward()
    loss_of(subspace, data()).backward()
    torch.testing.assert_close(subspace.w.grad, expected)


def test_second_derivatives(subspace: Subspace) -> None:
    subspace.eval()
    v = torch.linspace(-1, 1, subspace.w.numel(), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss_of(subspace, data()), subspace.w, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ v, subspace.w)

    def loss(w: Tensor) -> Tensor:
        model, parameters = made()
        theta = parameters.flatten() + subspace.sketch.lift(w)
        return torch.func.functional_call(model.eval(), parameters.unflatten(theta), (data(),)).square().sum()

    _, expected = torch.autograd.functional.hvp(loss, subspace.w.detach(), v)
    torch.testing.assert_close(product, expected)


def test_identity_recovers_full_training() -> None:
    model, parameters = made()
    full, _ = made()
    subspace = Subspace(model, parameters, Identity(parameters.n, parameters.n))
    for module, trained in ((subspace, [subspace.w]), (full, [p for p in full.parameters() if p.requires_grad])):
        optimiser = torch.optim.SGD(trained, lr=0.05)
        for _ in range(5):
            optimiser.zero_grad()
            loss_of(module, data()).backward()
            optimiser.step()
    torch.testing.assert_close(gs.Parameters(subspace.merge()).flatten(), gs.Parameters(full).flatten())


@pytest.mark.parametrize("kind", ["AFFD", "AFJL", "QK"])
def test_as_many_dimensions_as_parameters_recover_full_training(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(15, 4).double()  # n = 64: these kinds are then rotations
    full, x = copy.deepcopy(model), torch.randn(9, 15, dtype=torch.float64)
    parameters = gs.Parameters(model)
    subspace = Subspace(model, parameters, getattr(gs, kind)(64, 64))
    for module, trained in ((subspace, [subspace.w]), (full, list(full.parameters()))):
        optimiser = torch.optim.SGD(trained, lr=0.01)
        for _ in range(5):
            optimiser.zero_grad()
            loss_of(module, x).backward()
            optimiser.step()
    assert not torch.allclose(parameters.flatten(), gs.Parameters(full).flatten(), atol=0.01)
    torch.testing.assert_close(gs.Parameters(subspace.merge()).flatten(), gs.Parameters(full).flatten())


def test_an_optimiser_that_writes_past_the_version_counter_is_noticed(subspace: Subspace) -> None:
    before = subspace(data())
    subspace.w.data.add_(1.0)
    loss, _ = reference(subspace.w, subspace.sketch, data())
    assert not torch.equal(subspace(data()), before)
    torch.testing.assert_close(loss_of(subspace, data()), loss)


def test_a_submodule_called_alone_follows_w(subspace: Subspace) -> None:
    first = subspace.model.first(data())
    randomised(subspace, 1.0)
    assert not torch.equal(subspace.model.first(data()), first)


def test_inference_mode_and_no_grad(subspace: Subspace) -> None:
    subspace.eval()
    with torch.inference_mode():
        a = subspace(data())
    with torch.no_grad():
        b = subspace(data())
    c = subspace(data())
    c.sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(b, c)


def test_parameters_put_in_by_functional_call_are_obeyed(subspace: Subspace) -> None:
    bias = torch.full((6,), 3.0, dtype=torch.float64)
    out = torch.func.functional_call(subspace.model.first, {"bias": bias}, (data() * 0,))
    assert torch.equal(out, bias.expand(7, 6))


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.LSTM(5, 4, num_layers=2),
        lambda: nn.GRU(5, 4, bidirectional=True),
        lambda: nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3)),
    ],
    ids=["lstm", "gru", "transformer", "weight_norm", "conv"],
)
@pytest.mark.parametrize("mode", [True, False])
def test_modules_with_their_own_ways_of_reading_weights(model, mode: bool) -> None:
    torch.manual_seed(0)
    model = model().double().train(mode)
    parameters = gs.Parameters(model)
    sketch = Gaussian(parameters.n, 6)
    other = copy.deepcopy(model)

    def output(m: nn.Module) -> Tensor:
        out = m(data())
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    with randomised(Subspace(model, parameters, sketch)) as subspace:
        ours = output(subspace)
        ours.backward()
        w = subspace.w
    with torch.no_grad():
        moved = parameters.unflatten(parameters.flatten() + sketch.lift(w.detach()))
        for name, parameter in gs.Parameters(other):
            parameter.copy_(moved[name])
    theirs = output(other)
    theirs.backward()
    gradient = gs.Parameters(other).flatten({name: p.grad for name, p in gs.Parameters(other)})
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(w.grad, sketch(gradient))


def test_sparse_embedding_gradients() -> None:
    model = nn.Embedding(10, 3, sparse=True).double()
    parameters = gs.Parameters(model)
    subspace = Subspace(model, parameters, Gaussian(30, 4))
    subspace(torch.tensor([1, 4, 4])).sum().backward()
    gradient = torch.zeros(10, 3, dtype=torch.float64)
    gradient[1], gradient[4] = 1, 2
    torch.testing.assert_close(subspace.w.grad, subspace.sketch(gradient.flatten()))


# --- precision ---


def test_autocast_narrows_the_model_but_not_the_map() -> None:
    model, parameters = made(dtype=torch.float32)
    sketch = Gaussian(parameters.n, 11)
    subspace = randomised(Subspace(model, parameters, sketch)).eval()
    weight = exact(subspace, "first.weight")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(subspace, data(dtype=torch.float32))
        assert torch.equal(model.first.weight, weight)
        loss.backward()
    narrow = subspace.w.grad.clone()
    subspace.w.grad = None
    loss_of(subspace, data(dtype=torch.float32)).backward()
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, subspace.w.grad)
    torch.testing.assert_close(narrow, subspace.w.grad, rtol=0.1, atol=0.05 * float(subspace.w.grad.abs().max()))


def exact(subspace: Subspace, name: str) -> Tensor:
    lifted = subspace.selection.unflatten(subspace.sketch.lift(subspace.w.detach()))
    return lifted[name] + dict(subspace.selection)[name]


def test_half_precision_weights_are_rounded_once() -> None:
    model, parameters = made(dtype=torch.bfloat16)
    subspace = randomised(Subspace(model, parameters, Gaussian(parameters.n, 11)))
    loss_of(subspace, data(dtype=torch.bfloat16)).backward()
    assert subspace.w.dtype == torch.float32
    assert subspace.w.grad.dtype == torch.float32
    assert torch.equal(model.first.weight, exact(subspace, "first.weight").bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_after_the_first_forward_moves_the_point_too(dtype: torch.dtype) -> None:
    model, parameters = made(dtype=torch.float32)
    subspace = Subspace(model, parameters, Gaussian(parameters.n, 11))
    before = subspace(data(dtype=torch.float32))
    after = subspace.to(dtype)(data(dtype=dtype))
    assert after.dtype == dtype
    torch.testing.assert_close(after.float(), before, rtol=0.1, atol=0.1)


def test_infinite_gradients_reach_the_gradient_scaler() -> None:
    model, parameters = made(dtype=torch.float32)
    subspace = Subspace(model, parameters, Gaussian(parameters.n, 11))
    optimiser = torch.optim.SGD([subspace.w], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(subspace, data(dtype=torch.float32)) * 3e38).backward()
    scaler.step(optimiser)
    scaler.update()
    assert torch.equal(subspace.w, torch.zeros(11))
    assert scaler.get_scale() == 1.0


# --- memory ---


def test_a_step_holds_one_buffer_and_one_gradient() -> None:
    width = 512
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(6)))
    parameters = gs.Parameters(model)
    subspace = Subspace(model, parameters, Strided(parameters.n, 8))
    optimiser = torch.optim.SGD([subspace.w], lr=1e-3)
    with Allocations() as allocations:
        for _ in range(3):
            optimiser.zero_grad()
            subspace(torch.ones(1, width)).sum().backward()
            optimiser.step()
    # The buffer, the gradient, one layer's gradient before it is copied, and small change.
    assert allocations.peak < 4 * (2 * parameters.n + 1.5 * width * width)
    gc.disable()  # no cycle may keep n numbers alive until the next collection
    try:
        values = weakref.ref(subspace._point.plain["0.weight"].untyped_storage())
        gradient = weakref.ref(subspace._reserve._kept)
        assert gradient() is not None
        subspace.close()
        assert values() is None
        assert gradient() is None
    finally:
        gc.enable()


class Strided(Sketch):
    """Every (n/d)-th entry: no memory of its own."""

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Tensor) -> Tensor:
        return x[:, :: self.n // self.d].clone()

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        out = w.new_zeros(len(w), self.n)
        out[:, :: self.n // self.d] = w
        return out


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of storage alive at once among those made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


# --- the model is left as found ---


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "tensors": [(name, t.clone()) for name, t in model.state_dict().items()],
        "identities": [(name, id(p)) for name, p in model.named_parameters()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for (name, a), (_, b) in zip(before.pop("tensors"), after.pop("tensors"), strict=True):
        assert torch.equal(a, b), name
    assert before == after


def test_the_model_is_left_as_found_also_by_an_exception() -> None:
    model, parameters = made()
    model.batch_norm.eval()
    model.unused.weight.grad = torch.ones(3, 3, dtype=torch.float64)
    before = snapshot(model)
    subspace = Subspace(model, parameters, Gaussian(parameters.n, 4))

    def train() -> None:
        with subspace:
            subspace.train()
            loss_of(randomised(subspace), data()).backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert_same(before, snapshot(model))
    subspace.close()  # twice is fine
    with pytest.raises(gs.InputError, match="closed"):
        subspace(data())


def test_a_constructor_that_fails_leaves_the_model_alone() -> None:
    model, parameters = made()
    stranger, _ = made()
    before = snapshot(model)
    with pytest.raises(gs.InputError, match="n=") as error:
        Subspace(model, parameters, Gaussian(parameters.n + 1, 4))
    assert "Gaussian(parameters.n, 4)" in str(error.value)
    with pytest.raises(gs.InputError, match="does not hold"):
        Subspace(model, gs.Parameters(stranger), Gaussian(parameters.n, 4))
    assert_same(before, snapshot(model))
    with Subspace(model, parameters, Gaussian(parameters.n, 4)):
        inside = snapshot(model)
        with pytest.raises(gs.InputError, match="open in another Subspace"):
            Subspace(model, parameters, Gaussian(parameters.n, 4))
        assert_same(inside, snapshot(model))


def test_merge_equals_forward(subspace: Subspace) -> None:
    subspace.eval()
    inside = subspace(data())
    model = subspace.merge().eval()
    assert type(model.first) is nn.Linear
    assert torch.equal(model(data()), inside)
    assert all(p.requires_grad for name, p in model.named_parameters() if "frozen" not in name)


def test_a_deep_copy_is_independent(subspace: Subspace) -> None:
    subspace.eval()
    before = subspace(data())
    other = copy.deepcopy(subspace)
    assert torch.equal(other(data()), before)
    with torch.no_grad():
        other.w.zero_()
    assert torch.equal(subspace(data()), before)
    assert not torch.equal(other(data()), before)
    other.close()
    assert torch.equal(subspace(data()), before)


# --- saving ---


def test_the_state_dict_is_w_and_a_fingerprint_and_what_training_changed_besides(subspace: Subspace) -> None:
    assert set(subspace.state_dict()) == {"w", "_extra_state"}
    assert all(isinstance(value, Tensor) for value in subspace.state_dict().values())
    subspace.train()
    subspace(data())
    state = subspace.state_dict()
    assert {"model.batch_norm.running_mean", "model.batch_norm.num_batches_tracked"} <= set(state)
    assert not any("weight" in name for name in state)

    model, parameters = made()
    other = Subspace(model, parameters, subspace.sketch)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(data()), subspace.eval()(data()))


def test_a_state_dict_inside_another_module(subspace: Subspace) -> None:
    holder = nn.ModuleDict({"inner": subspace, "head": nn.Linear(2, 2)})
    state = holder.state_dict()
    assert set(state) == {"inner.w", "inner._extra_state", "head.weight", "head.bias"}
    holder.load_state_dict(state)


@pytest.mark.parametrize("what", ["sketch", "parameters", "theta0"])
def test_a_state_dict_of_another_subspace_is_refused(subspace: Subspace, what: str) -> None:
    model, parameters = made(seed=int(what == "theta0"))
    if what == "parameters":
        parameters = gs.Parameters(model, frozen=True, exclude=("unused*", "first.bias"))
    seed = int(what == "sketch")
    other = Subspace(model, parameters, Gaussian(parameters.n, 11, seed=seed))
    with pytest.raises(gs.FingerprintError, match=what):
        other.load_state_dict(subspace.state_dict(), strict=False)
    assert torch.equal(other.w, torch.zeros(11, dtype=torch.float64))


def test_save_and_load_like_an_adapter(tmp_path: Path) -> None:
    model, parameters = made()
    subspace = randomised(Subspace(model, parameters, gs.AFFD(parameters.n, 16, seed=5, form="global")))
    subspace(data())  # moves the batch statistics
    subspace.save_pretrained(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 10_000
    other = Subspace.from_pretrained(made()[0], tmp_path / "adapter")
    assert torch.equal(other.eval()(data()), subspace.eval()(data()))

    stranger, _ = made(seed=1)
    before = snapshot(stranger)
    with pytest.raises(gs.FingerprintError, match="theta0"):
        Subspace.from_pretrained(stranger, tmp_path / "adapter")
    assert_same(before, snapshot(stranger))
    with pytest.raises(gs.InputError, match="save_pretrained"):
        Subspace.from_pretrained(stranger, tmp_path)


def test_a_sketch_of_ones_own_is_passed_when_loading(subspace: Subspace, tmp_path: Path) -> None:
    subspace.save_pretrained(tmp_path)
    with pytest.raises(gs.InputError, match="sketch="):
        Subspace.from_pretrained(made()[0], tmp_path)
    other = Subspace.from_pretrained(made()[0], tmp_path, sketch=subspace.sketch)
    assert torch.equal(other.w, subspace.w)


# --- a wrapper like any other ---


def test_attributes_and_signature_of_the_model_show_through(subspace: Subspace) -> None:
    assert subspace.reentrant is None
    assert list(inspect.signature(subspace.forward).parameters) == ["x"]
    assert list(inspect.signature(type(subspace).forward).parameters) == ["self", "x"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = subspace.nothing
