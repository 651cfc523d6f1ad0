"""Sketches of per-example gradients in JAX are those of the gradients, and torch's, whatever the loss is made of."""

import numpy as np
import pytest
import torch

import gradsketch as gs

jax = pytest.importorskip("jax", reason="the extra gradsketch[jax] is not installed")
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

import gradsketch.jax as gj  # noqa: E402

V, E, T, B, D = 20, 8, 5, 3, 32
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, V, (B, T)))


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def relative(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def formed(loss, params, batch, sketch):
    """Sketches of gradients that are formed one after another."""
    return jax.jit(jax.vmap(lambda example: sketch.apply(jax.grad(loss)(params, example))))(batch)


def cross_entropy(logits, ids):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits)[:-1], ids[1:, None], 1).sum()


def stacked_names(path, shape):
    return gj.TorchName(path.replace("layers", "layers.{}"), (1, 0) if len(shape) == 3 else None)


def scanned():
    params = {
        "embedding": normal(V, E),
        "layers": {"w": normal(2, E, E) / 3, "b": normal(2, E)},
        "head": normal(V, E),
    }

    def loss(p, ids):
        @jax.checkpoint
        def layer(h, p):
            return h + jax.nn.gelu(h @ p["w"] + p["b"]), None

        return cross_entropy(lax.scan(layer, p["embedding"][ids], p["layers"])[0] @ p["head"].T, ids)

    return loss, params, stacked_names, set()


def branched():
    params = {"a": normal(V, E), "b": normal(E, V)}

    def loss(p, ids):
        logits = lax.cond(
            ids[0] > V // 2, lambda: p["a"][ids] @ p["b"], lambda: 2 * jax.nn.one_hot(ids, V) @ p["a"] @ p["b"]
        )
        return cross_entropy(logits, ids)

    return loss, params, None, set()


def made_of_parameters():
    """Weights that are products of parameters, a tied embedding, and a matrix that is added."""
    params = {"embedding": normal(V, E), "up": normal(E, 2), "down": normal(2, E), "position": normal(T, E)}

    def loss(p, ids):
        h = p["embedding"][ids] + p["position"]
        return cross_entropy(jnp.tanh(h @ (p["up"] @ p["down"])) @ p["embedding"].T, ids)

    return loss, params, None, {"up", "down", "position"}


def with_rules_of_its_own():
    @jax.custom_vjp
    def halved(x, w):  # whose derivative is not that of its code
        return x @ w

    halved.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T / 2, kept[0].T @ g / 2))
    params = {"embedding": normal(V, E), "w": normal(E, V)}
    return lambda p, ids: cross_entropy(halved(p["embedding"][ids], p["w"]), ids), params, None, {"w"}


SITUATIONS = [
    scanned,
    *(pytest.param(f, marks=pytest.mark.slow) for f in (branched, made_of_parameters, with_rules_of_its_own)),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
def test_as_if_they_were_formed(situation):
    loss, params, names, slow = situation()
    sketch = gj.block_sum(params, D, seed=1, names=names)
    sketches = gj.per_example(loss, sketch)
    assert relative(sketches(params, IDS), formed(loss, params, IDS, sketch)) < 1e-6
    assert set(sketches.slow(params, IDS)) == slow


@pytest.mark.slow
def test_convolution():
    params = {"kernel": normal(3, 3, 2, 4), "head": normal(4, 3)}

    def loss(p, x):
        h = lax.conv_general_dilated(x[None], p["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.log_softmax(jnp.tanh(h).mean((0, 1, 2)) @ p["head"])[0]

    sketch = gj.block_sum(params, D, names=gj.flax_names)
    sketches = gj.per_example(loss, sketch)
    x = normal(B, 7, 6, 2)
    assert relative(sketches(params, x), formed(loss, params, x, sketch)) < 1e-6
    assert not sketches.slow(params, x)


def test_no_gradient_is_formed():
    params, names = {"w": normal(37, 41)}, None
    sketches = gj.per_example(lambda p, x: jnp.tanh(x @ p["w"]).sum(), gj.block_sum(params, D, names=names))
    text = jax.jit(sketches).lower(params, normal(B, T, 37)).as_text()
    assert f"tensor<{B}x{T}x41xf32>" in text
    assert f"tensor<{B}x37x41xf32>" not in text
    assert f"tensor<{B}x41x37xf32>" not in text


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, E)
        self.up = torch.nn.Linear(E, 2 * E)
        self.out = torch.nn.Linear(2 * E, V)

    def forward(self, ids):
        return self.out(torch.nn.functional.gelu(self.up(self.embedding(ids))))


@pytest.mark.slow
def test_one_model_has_one_sketch_in_both_libraries():
    torch.manual_seed(0)
    model = Tiny()
    state = {name: jnp.asarray(tensor.numpy()) for name, tensor in model.state_dict().items()}
    params = {
        "embedding": {"embedding": state["embedding.weight"]},
        "up": {"kernel": state["up.weight"].T, "bias": state["up.bias"]},
        "out": {"kernel": state["out.weight"].T, "bias": state["out.bias"]},
    }

    def loss(p, ids):
        h = jax.nn.gelu(p["embedding"]["embedding"][ids] @ p["up"]["kernel"] + p["up"]["bias"], approximate=False)
        return cross_entropy(h @ p["out"]["kernel"] + p["out"]["bias"], ids)

    def losses(model, batch):  # of torch
        logits = model(batch)[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").sum(1)

    sketch = gj.block_sum(params, D, seed=5, names=gj.flax_names)
    wanted = gs.BlockSum(gs.Parameters(model), D, seed=5)
    assert sketch.torch.fingerprint == wanted.fingerprint
    found = gj.per_example(loss, sketch)(params, IDS)
    by_torch = gs.GradientSketcher(model, losses, wanted)(torch.from_numpy(np.array(IDS, np.int64))).values
    assert relative(found, by_torch) < 1e-6


@pytest.mark.slow
def test_lift_is_the_adjoint():
    _, params, names, _ = scanned()
    sketch = gj.block_sum(params, D, names=names)
    w = normal(D)
    lifted = sketch.lift(w)
    there = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(lifted), jax.tree.leaves(params), strict=True))
    assert float(there) == pytest.approx(float(w @ sketch.apply(params)), rel=1e-5)


def test_a_wrong_sketch_does_not_pass_the_audit():
    params = {"w": normal(E, E)}
    right, wrong = gj.block_sum(params, D, seed=0), gj.block_sum(params, D, seed=1)
    sketches = gj.per_example(lambda p, x: jnp.tanh(p["w"] @ x).sum(), right)
    object.__setattr__(right, "apply", wrong.apply)
    with pytest.raises(gs.InputError, match="off the gradient's own"):
        sketches(params, normal(B, E))


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (lambda p, x: p["w"] @ x, np.ones((B, E), np.float32), "a loss of shape"),
        (lambda p, x: (p["w"] @ x).sum() * np.nan, np.ones((B, E), np.float32), "not finite"),
        (lambda p, x: (p["w"] @ x[0]).sum(), (np.ones((2, E), np.float32), np.ones(3)), "first axis"),
    ],
    ids=["no scalar", "not finite", "no batch"],
)
def test_what_is_refused(loss, batch, message):
    params = {"w": normal(E, E)}
    with pytest.raises(gs.GradsketchError, match=message):
        gj.per_example(loss, gj.block_sum(params, D))(params, batch)
