"""What XLA is given: products in full precision, no look-ups, no 64-bit integers; and the same numbers on 8 devices."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="the extra gradsketch[jax] is not installed")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

import gradsketch.jax as gj  # noqa: E402

V, E, T, B, D = 5000, 8, 5, 3, 64


def tied(p, ids):
    """A loss without look-ups of its own but the embedding, whose gather is the model's."""
    logits = jnp.tanh(p["embedding"][ids] @ p["w"] + p["b"]) @ p["embedding"].T
    return (jax.nn.log_softmax(logits) * jax.nn.one_hot(ids, V)).sum()


PARAMS = {"embedding": jnp.ones((V, E)), "w": jnp.ones((E, E)), "b": jnp.ones(E)}
SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
SKETCH = gj.block_sum(SHAPES, D)
PROGRAMS = {
    "affd": (gj.affd(3 << 20, 1024).apply, [jax.ShapeDtypeStruct((3 << 20,), jnp.float32)], 0),
    "affd lifted": (gj.affd(3 << 20, 1024).lift, [jax.ShapeDtypeStruct((1024,), jnp.float32)], 0),
    "afjl": (gj.afjl(5000, 64).apply, [jax.ShapeDtypeStruct((5000,), jnp.float32)], 0),
    "qk": (gj.qk(5000, 64).apply, [jax.ShapeDtypeStruct((5000,), jnp.float32)], 0),
    "srht": (gj.srht(64, 16, 1024).apply, [jax.ShapeDtypeStruct((1024,), jnp.float32)], 0),
    "block_sum": (SKETCH.apply, [SHAPES], 0),
    # The embedding's own look-up; its gradient, a scatter, is not needed.
    "per_example": (gj.per_example(tied, SKETCH), [SHAPES, jax.ShapeDtypeStruct((B, T), jnp.int32)], 1),
}


# The others take seconds each.
QUICK = {("affd", "tpu"), ("per_example", "tpu"), ("block_sum", "cuda")}


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        pytest.param(name, platform, marks=[] if (name, platform) in QUICK else pytest.mark.slow)
        for name in PROGRAMS
        for platform in ("tpu", "cuda")
    ],
)
def test_what_is_exported(name, platform):
    function, shapes, gathers = PROGRAMS[name]
    with jax.default_matmul_precision("highest" if name == "per_example" else "default"):  # the model's own products
        text = export.export(jax.jit(function), platforms=[platform])(*shapes).mlir_module()
    assert len(re.findall(r"\"stablehlo\.(?:dynamic_)?gather\"", text)) == gathers
    assert not re.search(r"stablehlo\.(scatter|sort|custom_call)", text)
    values = re.sub(r"= array<i64.*?>|dense<[^>]*> : tensor<[^>]*xi64>|: i64", "", text)  # attributes, not values
    assert not re.search(r"tensor<(?:\d+x)*u?i64>", values)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products or name == "afjl"
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import gradsketch.jax as gj
assert len(jax.devices()) == 8
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
params = {"up": rng.standard_normal((16, 32), np.float32), "down": rng.standard_normal((32, 16), np.float32)}
batch = rng.standard_normal((8, 3, 16), np.float32)
loss = lambda p, x: jnp.square(jnp.tanh(x @ p["up"]) @ p["down"]).sum()
sketches = gj.per_example(loss, gj.block_sum(params, 32))
wanted = np.asarray(sketches(params, batch))
place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
there = {"up": place(params["up"], None, "model"), "down": place(params["down"], "model", None)}
found = jax.jit(sketches)(there, place(batch, "data"))
print(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
"""


@pytest.mark.slow
def test_sharded_parameters():
    source = Path(gj.__file__).parents[2]
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(source),
        "JAX_PLATFORMS": "cpu",
        "PATH": "",
    }
    done = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


@pytest.mark.slow
def test_memory_does_not_grow_with_the_vector():
    n = 1 << 23
    phi = gj.affd(n, 1024)
    for function, size in ((phi.apply, n), (jax.grad(lambda x: jnp.square(phi.apply(x)).sum()), n), (phi.lift, 1024)):
        program = jax.jit(function).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.75 * 4 * n


def test_eigenvalues_are_those_of_the_hessian():
    matrix = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
    matrix = matrix @ matrix.T
    params = {"a": jnp.ones(5), "b": jnp.ones(7)}

    def loss(p, scale):
        x = jnp.concatenate([p["a"], p["b"]])
        return scale * jnp.vdot(x, matrix @ x) / 2

    found = gj.spectrum(gj.hvp(loss), params, jnp.array([0.5, 1.5]), k=4, steps=12)
    wanted = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1][:4]
    assert np.abs(found.values - wanted).max() < 1e-4 * wanted[0]
    assert found.products == 12
