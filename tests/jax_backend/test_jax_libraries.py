"""Models of flax.nnx, linen and equinox are sketched as they are."""

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="the extra gradsketch[jax] is not installed")
import jax.numpy as jnp  # noqa: E402

import gradsketch.jax as gj  # noqa: E402

pytestmark = pytest.mark.slow  # each is a minute of compiling
V, E, T, B, D = 20, 12, 6, 3, 32
IDS = jax.random.randint(jax.random.key(1), (B, T), 0, V)


def cross_entropy(logits, ids):
    optax = pytest.importorskip("optax")
    return optax.softmax_cross_entropy_with_integer_labels(logits[:-1], ids[1:]).sum()


def nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embedding = nnx.Embed(V, E, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, E, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(E, rngs=rngs)
            self.head = nnx.Linear(E, V, rngs=rngs)

        def __call__(self, ids):
            h = self.embedding(ids)
            return self.head(h + self.attention(self.norm(h)))

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    return lambda p, ids: cross_entropy(nnx.merge(graph, p)(ids), ids), params, gj.flax_names


def linen_model():
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids):
            h = linen.Embed(V, E)(ids)
            h = linen.remat(linen.Dense)(E)(h)
            h, _ = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(h, None)
            return linen.Dense(V)(linen.gelu(h))

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, h, _):
            return h + linen.Dense(E)(jnp.tanh(h)), None

    model = Model()
    params = model.init(jax.random.key(0), IDS[0])

    def names(path, shape):
        name, axes, torch_shape = gj.flax_names(path, shape[1:] if "Scan" in path else shape)
        return gj.TorchName("layers.{}." + name if "Scan" in path else name, axes, torch_shape)

    return lambda p, ids: cross_entropy(model.apply(p, ids), ids), params, names


def equinox_model():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        up: eqx.nn.Linear
        head: eqx.nn.Linear

        def __call__(self, ids):
            h = jax.vmap(self.up)(jax.vmap(self.embedding)(ids))
            return jax.vmap(self.head)(jax.nn.gelu(h))

    keys = jax.random.split(jax.random.key(0), 3)
    model = Model(
        eqx.nn.Embedding(V, E, key=keys[0]), eqx.nn.Linear(E, E, key=keys[1]), eqx.nn.Linear(E, V, key=keys[2])
    )
    params, static = eqx.partition(model, eqx.is_array)
    return lambda p, ids: cross_entropy(eqx.combine(p, static)(ids), ids), params, None


@pytest.mark.parametrize("made", [nnx_model, linen_model, equinox_model], ids=lambda f: f.__name__)
def test_as_if_gradients_were_formed(made):
    loss, params, names = made()
    sketch = gj.block_sum(params, D, names=names)
    sketches = gj.per_example(loss, sketch)
    found = sketches(params, IDS)
    wanted = jax.jit(jax.vmap(lambda ids: sketch.apply(jax.grad(loss)(params, ids))))(IDS)
    assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert not sketches.slow(params, IDS)
