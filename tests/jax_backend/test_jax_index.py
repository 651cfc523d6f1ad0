"""An index that one library made is asked from the other."""

import numpy as np
import pytest
import torch

import gradsketch as gs

jax = pytest.importorskip("jax", reason="the extra gradsketch[jax] is not installed")
import jax.numpy as jnp  # noqa: E402

import gradsketch.jax as gj  # noqa: E402

N, I, C, D = 24, 6, 3, 12  # noqa: E741


@pytest.fixture(scope="module")
def both():
    """Return torch's model, task and data, and the same as JAX has them: losses and sketches of all rows."""
    torch.manual_seed(0)
    model, task = torch.nn.Linear(I, C), gs.Classification()
    data = [(torch.randn(I), i % C) for i in range(N)]
    params = {"kernel": jnp.asarray(model.weight.detach().numpy()).T, "bias": jnp.asarray(model.bias.detach().numpy())}
    batch = jnp.stack([jnp.asarray(x.numpy()) for x, _ in data]), jnp.array([y for _, y in data])

    def loss(p, example):
        return -jax.nn.log_softmax(example[0] @ p["kernel"] + p["bias"])[example[1]]

    phi = gj.block_sum(params, D, seed=4, names=gj.flax_names)
    return model, task, data, phi, gj.per_example(loss, phi).with_losses(params, batch)


def found(hits):
    return [[hit.row for hit in query.proponents] for query in hits], [
        [hit.score for hit in query.proponents] for query in hits
    ]


@pytest.mark.parametrize("score", ["ridge", pytest.param("dot", marks=pytest.mark.slow)])
def test_both_ways(both, tmp_path, score):
    model, task, data, phi, (losses, sketches) = both
    options = {"k": 3, "score": score}
    by_torch = gs.build_index(tmp_path / "torch", model, task, data, d=D, seed=4, dtype="float32", progress=False)
    by_jax = gs.index_sketches(tmp_path / "jax", sketches, losses, data, phi.torch, dtype="float32")
    rows, scores = found(by_torch.query(model, data[:4], **options))
    for index in (by_torch, by_jax, gs.Index.open(tmp_path / "jax")):
        same_rows, same_scores = found(index.query_sketches(sketches[:4], losses[:4], data[:4], phi.torch, **options))
        assert same_rows == rows
        assert np.allclose(same_scores, scores, rtol=1e-3, atol=1e-5)


def test_other_sketches_are_refused(both, tmp_path):
    model, _, data, phi, (losses, sketches) = both
    index = gs.index_sketches(tmp_path / "jax", sketches, losses, data, phi.torch)
    other = gs.BlockSum(gs.Parameters(model), D, seed=5)
    with pytest.raises(gs.FingerprintError, match="seed"):
        index.query_sketches(sketches[:1], losses[:1], data[:1], other)
    with pytest.raises(gs.FingerprintError, match="data"):
        gs.index_sketches(tmp_path / "jax", sketches, losses, data[::-1], phi.torch)
    with pytest.raises(gs.InputError, match="one of each"):
        index.query_sketches(sketches[:2], losses[:1], data[:1], phi.torch)
    with pytest.raises(gs.NonFiniteError):
        index.query_sketches(sketches[:1] * np.nan, losses[:1], data[:1], phi.torch)
