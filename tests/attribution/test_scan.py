"""Streaming products and the running top k, against the whole score matrix in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from gradsketch.attribution.scan import Probe, rescore, scan, top
from gradsketch.random import Stream
from stores import make_store

D, N, M = 32, 300, 5


def matrix(name, rows, d=D):
    return Stream(0, name).normals(0, rows * d).view(rows, d)


@pytest.fixture
def queries():
    return matrix("queries", M)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("unit_length", [False, True])
def test_scores_are_products_with_the_stored_rows(tmp_path, queries, dtype, unit_length):
    x = matrix("x", N) * 1e-5
    store = make_store(tmp_path, x, dtype)
    stored = torch.cat([shard.decoded() for shard in store]).double()
    expected = queries.double() @ stored.T
    if unit_length:
        expected /= x.double().norm(dim=-1)
    found = torch.cat(
        [scores for _, scores in scan([Probe(store, queries, unit_length=unit_length)], store.ranges())], dim=1
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 7, N, N + 5])
def test_top_k_is_the_sorted_matrix(tmp_path, queries, sign, k):
    x = matrix("x", N)
    x[200:210] = x[3]  # ties, across shards
    x[50] = 0
    exact = sign * (queries @ x.T)
    values, rows = exact.sort(dim=1, descending=True, stable=True)
    found = top([Probe(make_store(tmp_path, x), queries)], k, sign=sign)
    n = min(k, N)
    torch.testing.assert_close(found.scores[:, :n], sign * values[:, :n])
    # Equal rows may differ in the last bit between blocks; compare the rows' content instead of their numbers.
    torch.testing.assert_close(x[found.rows[:, :n]], x[rows[:, :n]])
    assert (found.scores[:, n:] == -torch.inf).all()
    assert (found.rows[:, n:] == -1).all()


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=9, max_size=9), min_size=1, max_size=3),
    k=st.integers(1, 12),
    shard_rows=st.integers(1, 10),
)
def test_ties_go_to_the_earlier_row(tmp_path_factory, scores, k, shard_rows):
    """One number a sketch, so that scores are exact; any shard size gives the same answer."""
    x = torch.eye(9)
    q = torch.tensor(scores)
    store = make_store(tmp_path_factory.mktemp("ties"), x, shard_rows=shard_rows)
    found = top([Probe(store, q)], k)
    order = q.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.rows[:, : min(k, 9)], order.indices[:, :k])
    assert torch.equal(found.scores[:, : min(k, 9)], order.values[:, :k])


def test_only_kept_rows_are_found(tmp_path, queries):
    x = matrix("x", N)
    store = make_store(tmp_path, x)
    found = top([Probe(store, queries)], 10, keep=lambda shard: shard.numbers("loss") % 100 == 7)
    assert sorted(set(found.rows.flatten().tolist())) == [-1, 7, 107, 207]
    assert (found.rows >= 0).sum(dim=1).tolist() == [3] * M


def test_rows_without_a_gradient_are_never_found(tmp_path, queries):
    """A row that was skipped has a NaN for its norm; a row of zeros scores nothing."""
    x = matrix("x", 4)
    x[1] = 0
    store = make_store(tmp_path, x)
    found = top([Probe(store, queries, unit_length=True)], 4)
    assert (found.scores[found.rows == 1] == 0).all()


def test_checkpoints_add_up_with_their_weights(tmp_path, queries):
    a, b = matrix("a", N), matrix("b", N)
    stores = make_store(tmp_path / "a", a), make_store(tmp_path / "b", b)
    probes = [Probe(stores[0], queries, weight=0.25), Probe(stores[1], 2 * queries, weight=-3.0)]
    expected = 0.25 * queries @ a.T - 6 * queries @ b.T
    torch.testing.assert_close(
        torch.cat([s for _, s in scan(probes, probes[0].store.ranges())], dim=1), expected, rtol=1e-4, atol=1e-3
    )


def test_exact_scores_of_chosen_rows(tmp_path, queries):
    x = matrix("x", N)
    rows = torch.tensor([[5, 299, 64], [64, -1, 63], [0, 1, 2], [128, 5, 5], [-1, -1, -1]])
    found = rescore([Probe(make_store(tmp_path, x), queries)], rows)
    exact = queries @ x.T
    expected = torch.where(rows >= 0, exact.gather(1, rows.clamp_min(0)), -torch.inf)
    torch.testing.assert_close(found, expected)


def test_a_prefix_of_the_sketch_scores_without_bias(tmp_path):
    """Products of the first quarter, four times as large, lie around the whole product."""
    x = torch.ones(1, 4096)
    probe = Probe(make_store(tmp_path, x), torch.ones(1, 4096))
    ((_, scores),) = scan([probe], probe.store.ranges(), width=1024)
    assert float(scores) == 4096
