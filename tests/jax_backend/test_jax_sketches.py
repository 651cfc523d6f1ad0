"""The sketches in JAX have torch's bits of randomness, and its numbers up to rounding."""

import numpy as np
import pytest
import torch

import gradsketch as gs

jax = pytest.importorskip("jax", reason="the extra gradsketch[jax] is not installed")
import jax.numpy as jnp  # noqa: E402

import gradsketch.jax as gj  # noqa: E402
from gradsketch.jax.random import as_key, flip, is_negative_at, normals, words  # noqa: E402

STREAM = gs.Stream(7, "AFFD", "B")


def relative(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(("first", "high"), [(0, 0), (2**32 - 8, 0), (5, 1), (3, 4)])
def test_words(first, high):
    counters = jnp.uint32(first) + jnp.arange(8, dtype=jnp.uint32)
    wanted = STREAM.words(4 * (first + (high << 32)), 32).numpy().view(np.uint32)
    assert np.array_equal(np.asarray(words(as_key(STREAM), counters, high)).reshape(-1), wanted)


def test_signs_and_normals():
    signs = STREAM.signs(128, 1000).numpy()
    assert np.array_equal(flip(jnp.ones(1000), as_key(STREAM), 1), signs)
    places = np.array([128, 133, 255, 256, 257, 1127])
    assert np.array_equal(1 - 2 * is_negative_at(as_key(STREAM), jnp.asarray(places)), signs[places - 128])
    found, wanted = np.asarray(normals(STREAM, 20_000)), STREAM.normals(0, 20_000).numpy()
    assert (found == wanted).mean() > 0.99
    assert np.abs(found - wanted).max() < 3e-7


CASES = {
    "affd": (gj.affd(50_001, 1000, seed=7), gs.AFFD(50_001, 1000, seed=7)),
    "affd in pieces": (gj.affd((1 << 20) + 77, 64, seed=1), gs.AFFD((1 << 20) + 77, 64, seed=1)),
    "affd of few": (gj.affd(300, 64), gs.AFFD(300, 64)),
    "afjl": (gj.afjl(50_001, 1000, seed=7), gs.AFJL(50_001, 1000, seed=7)),
    "qk": (gj.qk(50_001, 1024, seed=7), gs.QK(50_001, 1024, seed=7)),
    "srht that keeps all": (gj.srht(8, 4, 16, seed=3), gs.TiledSRHT(8, 4, 16, seed=3)),
    "srht of a vector": (gj.srht(1, 500, 64, seed=3), gs.TiledSRHT(1, 500, 64, seed=3)),
    "srht folded": (gj.srht(5000, 30, 256, seed=3), gs.TiledSRHT(5000, 30, 256, seed=3)),
    "srht spread, tall": (gj.srht(64, 16, 1024, seed=3), gs.TiledSRHT(64, 16, 1024, seed=3)),
    "srht spread, wide": (gj.srht(16, 64, 1024, seed=3), gs.TiledSRHT(16, 64, 1024, seed=3)),
}


# The others take seconds to compile.
QUICK = {"affd of few", "qk", "srht that keeps all", "srht spread, tall"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_apply_and_lift(name):
    phi, reference = CASES[name]
    x, w = (
        torch.from_numpy(np.random.default_rng(0).standard_normal((2, k), np.float32)) for k in reference.shape[::-1]
    )
    assert relative(jax.jit(phi.apply)(x.numpy()), reference(x)) < 6e-7
    assert relative(jax.jit(phi.lift)(w.numpy()), reference.lift(w)) < 6e-7


@pytest.mark.slow
def test_outer_is_the_sketch_of_the_matrix():
    phi, (left, right) = gj.srht(200, 30, 64), (np.random.default_rng(0).standard_normal((5, k)) for k in (200, 30))
    assert (
        relative(phi.outer(left.astype("f"), right.astype("f")), phi.apply((left.T @ right).ravel().astype("f"))) < 1e-6
    )


@pytest.mark.slow
def test_derivatives():
    phi = gj.affd(700, 32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(700), jnp.float32)
    square = lambda x: jnp.square(phi.apply(x)).sum() / 2  # noqa: E731
    assert relative(jax.grad(square)(x), phi.lift(phi.apply(x))) < 1e-6
    _, twice = jax.jvp(jax.grad(square), (x,), (x,))
    assert relative(twice, phi.lift(phi.apply(x))) < 1e-6


@pytest.mark.parametrize("x", [np.ones(5, np.float32), np.ones(700, np.int32)], ids=["length", "integers"])
def test_what_is_no_vector_is_refused(x):
    with pytest.raises(gs.InputError, match="length 700"):
        gj.affd(700, 32).apply(x)
