"""Other tensors take the place of a model's parameters; the model's own are not touched; what is open composes."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gradsketch as gs
from gradsketch.attribution.checkpoints import Checkpoint, weights_of
from gradsketch.stand_ins import held, read_instead, stand_ins


class Net(nn.Module):
    """Tied layers, a recurrent layer, a buffer that the forward pass writes to, and one that it replaces."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.inner.weight
        self.recurrent = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)
        self.checkpointed = checkpointed
        self.double()

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.again(torch.tanh(self.inner(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(self.recurrent(x[:, None])[0][:, -1])


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BATCH = X, torch.arange(6) % 3


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


def at(weights: dict[str, Tensor], **options: bool) -> Net:
    """Return an ordinary model with these weights written into it."""
    model = Net(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def state(model: nn.Module) -> object:
    """Everything of the model that could change, identities included."""
    return [
        (
            type(module),
            {k: v if isinstance(v, bool | int) else id(v) for k, v in vars(module).items() if k != "_flat_weights"},
            [id(weight) for weight in vars(module).get("_flat_weights", [])],
            [
                (n, id(t), t._version, t.requires_grad, id(t.grad))
                for n, t in module._parameters.items()
                if t is not None
            ],
            [(n, id(t), t._version) for n, t in module._buffers.items() if t is not None],
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_stand_ins_are_read_and_differentiated_by_ties_included(checkpointed: bool) -> None:
    model = Net(checkpointed=checkpointed)
    model.head.bias.grad = torch.ones(3, dtype=torch.float64)
    weights = other_weights(model)
    wanted = at(weights)
    losses(wanted, BATCH).sum().backward()
    before = state(model)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    with stand_ins(model, leaves):
        assert model.again.weight is leaves["inner.weight"]
        assert list(dict(model.named_parameters())) == list(leaves)
        losses(model, BATCH).sum().backward()
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(leaves[name].grad, parameter.grad)
    assert state(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_blocks_nest_and_leave_nothing_also_by_an_exception(error: type[BaseException]) -> None:
    model, one, two = Net(), torch.ones(4, 4), torch.zeros(4, 4)
    before = state(model)

    def fail() -> None:
        with stand_ins(model, {"inner.weight": one}), stand_ins(model, {"again.weight": two}):
            assert model.inner.weight is two
            model.inner.register_buffer("left_behind", one)
            raise error

    with pytest.raises(error):
        fail()
    assert model.inner.weight.shape == (4, 4)
    assert state(model) == before
    with (
        pytest.raises(gs.InputError, match=r"'inner\.wait', which Net does not have"),
        stand_ins(model, {"inner.wait": one}),
    ):
        pass
    assert state(model) == before


def test_a_recurrent_layer_keeps_nothing_that_stood_in() -> None:
    model = Net()
    leaves = other_weights(model)
    with stand_ins(model, leaves):
        model(X)
    gone = weakref.ref(leaves["recurrent.weight_hh_l0"].untyped_storage())
    gc.disable()
    try:
        leaves.clear()
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("fits", [True, False])
def test_a_checkpoint_is_loaded_into_copies(fits: bool) -> None:
    model = Net()
    model.register_buffer("scale", torch.ones(2))
    model.inner.bias.requires_grad_(False)
    weights = other_weights(model) | {"scale": torch.zeros(2)}
    if not fits:
        weights["head.weight"] = torch.zeros(2)
    before, wanted = state(model), at(other_weights(model))
    checkpoint = Checkpoint("late", weights, 1.0)
    if fits:
        with weights_of(model, checkpoint):
            assert torch.equal(model(X), wanted(X))
            assert model.scale.tolist() == [0, 0]
            assert model.again.weight is model.inner.weight
            assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["inner.bias"]
    else:
        with pytest.raises(gs.InputError, match="'late' does not fit"), weights_of(model, checkpoint):
            pass
    assert state(model) == before


class Packed(nn.Parameter):
    """A kind of weight with something of its own beside its numbers, as quantised ones have."""

    def __new__(cls, data: Tensor) -> "Packed":
        packed = super().__new__(cls, data, requires_grad=False)
        packed.scale = 2.0
        return packed


class Unpacking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.weight.scale).T


@pytest.mark.parametrize("build", [gs.hessian, gs.gauss_newton, gs.fisher])
def test_weights_of_a_kind_of_their_own_stay_what_they_are(build) -> None:
    layer = Unpacking(4, 4, bias=False, dtype=torch.float64)
    layer.weight = Packed(layer.weight.data)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3, dtype=torch.float64))
    H = build(model, losses, BATCH)
    assert H.n == 15
    assert torch.isfinite(H(torch.ones(15))).all()


# --- what is open in a Subspace ---


@pytest.fixture
def opened():
    """A model open in a Subspace away from w = 0, and an ordinary model with the same weights."""
    model = Net(checkpointed=True)
    parameters = gs.Parameters(model, exclude="head.bias")
    with gs.Subspace(model, parameters, gs.AFFD(parameters.n, 9)) as subspace:
        with torch.no_grad():
            subspace.w.copy_(torch.randn(9, generator=torch.Generator().manual_seed(2)))
        weights = {n: p.detach() for n, p in model.named_parameters()}
        lifted = parameters.unflatten(subspace.sketch.lift(subspace.w.detach()))
        yield subspace, at(weights | {n: weights[n] + step for n, step in lifted.items()})


MODES = ("grad-of-grad", "jvp-of-grad", "central-difference")
CURVATURES = (gs.hessian, gs.gauss_newton, gs.fisher)


def test_what_modules_read_instead_is_known(opened) -> None:
    subspace, point = opened
    readings, wanted = read_instead(subspace.model), held(point)
    assert set(readings) == set(dict(point.named_parameters(remove_duplicate=False))) - {"head.bias"}
    for name, reading in readings.items():
        torch.testing.assert_close(reading.now(), wanted[name])
    with stand_ins(subspace.model, {"inner.weight": wanted["inner.weight"]}):
        assert "again.weight" not in read_instead(subspace.model)
    # An optimiser that raises no version counter moves the point too.
    subspace.w.data.zero_()
    assert torch.equal(read_instead(subspace.model)["head.weight"].now(), held(subspace.model)["head.weight"])
    assert read_instead(point) == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", CURVATURES)
@pytest.mark.parametrize("globs", ["*", "head.*"])
def test_curvature_of_an_open_model_is_that_at_its_point(opened, build, mode, globs) -> None:
    subspace, point = opened
    model = subspace.model
    H = build(model, losses, BATCH, gs.Parameters(model, globs, frozen=True), mode=mode)
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for _ in range(2):  # the second uses the graph that was kept
        wanted = build(point, losses, BATCH, gs.Parameters(point, globs), mode=mode)(v)
        torch.testing.assert_close(H(v), wanted, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        subspace.w.zero_()
    start = Net()
    wanted = build(start, losses, BATCH, gs.Parameters(start, globs), mode=mode)(v)
    torch.testing.assert_close(H(v), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", CURVATURES)
def test_curvature_of_the_subspace_itself_is_the_sketched_one(opened, build, mode) -> None:
    subspace, point = opened
    phi = subspace.sketch
    parameters = gs.Parameters(point, exclude="head.bias")
    S = build(subspace, losses, BATCH, mode=mode)
    v = torch.randn(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = phi(build(point, losses, BATCH, parameters, mode=mode)(phi.lift(v)))
    for _ in range(2):
        torch.testing.assert_close(S(v), wanted, rtol=1e-6, atol=1e-8)
    gradient = gs.loss_gradient(subspace, losses, BATCH, dtype=torch.float64)
    torch.testing.assert_close(gradient, phi(gs.loss_gradient(point, losses, BATCH, parameters, dtype=torch.float64)))
    # It trains on as if nothing had been asked.
    torch.testing.assert_close(subspace.model.head.weight, held(point)["head.weight"])
    losses(subspace, BATCH).mean().backward()
    torch.testing.assert_close(subspace.w.grad, gradient)


def test_parameters_of_the_model_inside_are_taken_where_it_stands(opened) -> None:
    subspace, point = opened
    inside = gs.Parameters(subspace, "model.*", frozen=True)
    got = gs.loss_gradient(subspace, losses, BATCH, inside, dtype=torch.float64)
    torch.testing.assert_close(got, gs.loss_gradient(point, losses, BATCH, dtype=torch.float64))


def test_what_the_subspace_moves_does_not_pass_for_what_was_selected(opened) -> None:
    subspace, _ = opened

    def headless(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model.body(batch[0]).square().sum(1)

    with pytest.raises(gs.InputError, match=r"depends on none of the 1 selected parameters, 'head\.weight'"):
        gs.loss_gradient(subspace.model, headless, BATCH, gs.Parameters(subspace.model, "head.weight", frozen=True))


@pytest.mark.parametrize("method", ["auto", "outer", "vmap", "loop", "implicit"])
def test_sketches_by_parameters_that_are_read_elsewhere_are_refused(opened, method) -> None:
    subspace, point = opened
    model = subspace.model
    parameters = gs.Parameters(model, frozen=True)
    match = r"'inner\.weight' of a Net that is open in a Subspace.*merge\(\) or close\(\)"
    with pytest.raises(gs.InputError, match=match):
        gs.sketch_gradients(model, losses, BATCH, gs.BlockSum(parameters, 16), parameters=parameters, method=method)
    with pytest.raises(gs.InputError, match=match):
        gs.gradient_gram(model, losses, BATCH, parameters=parameters)
    assert torch.equal(model(X), subspace(X))
    if method == "loop":  # what the Subspace leaves alone, at its point
        alone = gs.Parameters(model, "head.bias", frozen=True)
        got = gs.sketch_gradients(model, losses, BATCH, gs.BlockSum(alone, 3), method=method)
        own = gs.Parameters(point, "head.bias")
        torch.testing.assert_close(got, gs.sketch_gradients(point, losses, BATCH, gs.BlockSum(own, 3), method=method))


def test_functional_call_with_another_w_differentiates_by_that_one(opened) -> None:
    subspace, _ = opened
    w = torch.randn(9, dtype=torch.float64, requires_grad=True)
    subspace(X)  # a point of its own w is kept
    same = subspace.w.detach().clone().requires_grad_()
    for other in (w, same):
        torch.func.functional_call(subspace, {"w": other}, (X,)).sum().backward()
        assert other.grad is not None
    assert subspace.w.grad is None
