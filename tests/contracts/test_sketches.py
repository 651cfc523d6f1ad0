"""The battery every sketch must pass, whatever its kind and options.

By default every kind meets a third of the sizes, and every size a third of the kinds; all meet all with ``-m slow``.
"""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import gradsketch as gs
from contracts.sketch_cases import CASES
from gradsketch.sketches.recipe import made_from, recipe_of
from sampled import latin

# Odd sizes need padding; the last one is longer than a cache-sized piece.
SIZES = [(2, 1), (7, 3), (64, 16), (300, 96), (300_001, 4096)]

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def sized(sizes):
    """Run with every case and size, a third of them by default."""
    cases = [pytest.param(*p.values[:1], *p.values[1], marks=p.marks) for p in latin(CASES, sizes)]
    return pytest.mark.parametrize(("case", "n", "d", "dtype")[: 1 + len(sizes[0])], cases, ids=str)


def vectors(b, length, dtype=torch.float64):
    return torch.randn(b, length, dtype=dtype, generator=torch.Generator().manual_seed(length))


@sized(SIZES)
def test_linear(case, n, d):
    n, d = case.fit(n, d)
    phi, x = case.build(n, d), vectors(2, n)
    torch.testing.assert_close(phi(2 * x[0] - 3 * x[1]), 2 * phi(x[0]) - 3 * phi(x[1]), rtol=1e-10, atol=1e-10)


@sized(SIZES)
def test_lift_is_the_adjoint(case, n, d):
    n, d = case.fit(n, d)
    phi, x, w = case.build(n, d), vectors(2, n), vectors(2, d)
    left, right = (phi(x) * w).sum(-1), (x * phi.lift(w)).sum(-1)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@sized(SIZES)
def test_stretches_add_up_and_lift_alone(case, n, d):
    n, d = case.fit(n, d)
    phi, x, w = case.build(n, d), vectors(2, n), vectors(2, d)
    if not phi.takes_stretches:
        return
    ends = [0, n // 3, n // 3 + n // 7, n]
    stretches = [(start, stop) for start, stop in pairwise(ends) if stop > start]
    parts = [phi._apply_stretch(x[:, start:stop].contiguous(), start) for start, stop in stretches]
    torch.testing.assert_close(torch.stack(parts).sum(0), phi(x), rtol=1e-10, atol=1e-10)
    lifted = [phi._apply_adjoint_stretch(w, start, stop - start) for start, stop in stretches]
    torch.testing.assert_close(torch.cat(lifted, dim=1), phi.lift(w), rtol=1e-10, atol=1e-10)


@sized(SIZES[:4])
def test_dense_is_the_map_of_the_identity(case, n, d):
    n, d = case.fit(n, d)
    phi, x = case.build(n, d), vectors(3, n)
    assert phi.dense().shape == phi.shape == (d, n)
    torch.testing.assert_close(phi.dense(), phi(torch.eye(n, dtype=torch.float64)).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(phi(x), x @ phi.dense().T, rtol=1e-10, atol=1e-10)


@sized([(*size, torch.float32) for size in SIZES] + [(*size, torch.float64) for size in SIZES[:-1]])
def test_bits_do_not_depend_on_the_batch(case, n, d, dtype):
    n, d = case.fit(n, d)
    phi, x, w = case.build(n, d), vectors(4, n, dtype), vectors(4, d, dtype)
    for map_, batch in ((phi, x), (phi.T, w)):
        whole = map_(batch)
        assert torch.equal(torch.cat([map_(batch[:1]), map_(batch[1:])]), whole)
        assert torch.equal(map_(batch[2]), whole[2])
        assert torch.equal(map_(batch.T.contiguous().T.view(2, 2, -1)).view_as(whole), whole)


@sized(SIZES)
def test_bits_do_not_depend_on_the_thread_count(case, n, d):
    n, d = case.fit(n, d)
    x, w, before = vectors(1, n, torch.float32), vectors(1, d, torch.float32), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            phi = case.build(n, d)
            results.append((phi(x), phi.lift(w)))
    finally:
        torch.set_num_threads(before)
    for sketch, lift in results[1:]:
        assert torch.equal(sketch, results[0][0])
        assert torch.equal(lift, results[0][1])


@sized(SIZES)
def test_narrow_input_is_widened_and_never_the_arithmetic(case, n, d):
    n, d = case.fit(n, d)
    phi = case.build(n, d)
    for dtype in (torch.bfloat16, torch.float16) if n < 1000 else (torch.bfloat16,):
        x, w = vectors(1, n, dtype), vectors(1, d, dtype)
        assert torch.equal(phi(x), phi(x.float()))
        assert torch.equal(phi.lift(w), phi.lift(w.float()))
    x = vectors(1, n)
    assert (phi(x.float()) - phi(x.float().double())).norm() < 1e-6 * x.norm()


@each_case
def test_the_process_wide_precision_is_neither_used_nor_changed(case):
    phi, x = case.build(5000, 64), vectors(2, 5000, torch.float32)
    exact = phi(x), phi.lift(phi(x))
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(phi(x), exact[0])
            assert torch.equal(phi.lift(exact[0]), exact[1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@sized(SIZES)
def test_the_input_is_left_alone(case, n, d):
    n, d = case.fit(n, d)
    phi, x, w = case.build(n, d), vectors(1, n), vectors(1, d)
    x0, w0 = x.clone(), w.clone()
    phi(x), phi.lift(w)
    assert torch.equal(x, x0)
    assert torch.equal(w, w0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_case
def test_sketching_vectors_that_may_be_overwritten(case, dtype):
    for n in (64, 100):
        phi, x = case.build(*case.fit(n, 16)), vectors(3, n, dtype)
        expected = phi(x)
        assert torch.equal(phi.sketch_(x.clone()), expected)
        assert torch.equal(phi.sketch_(x[0].clone()), expected[0])
        with pytest.raises(gs.InputError, match="outside any graph"):
            phi.sketch_(x.clone().requires_grad_())
        with pytest.raises(gs.InputError, match="vectors of length"):
            phi.sketch_(x[:, 1:])


@sized(SIZES)
def test_truncate(case, n, d):
    n, d = case.fit(n, d)
    phi, x, w = case.build(n, d), vectors(1, n), vectors(1, d)
    smaller = {max(1, d // 2), d, max(1, d - 1)}
    if phi.nesting is None:
        with pytest.raises(gs.InputError, match="a kind whose sizes nest"):
            phi.truncate(max(1, d // 2))
        return
    if phi.nesting == "fold":
        smaller = {size for size in smaller if d % size == 0 and size % phi.options()["nonzeros"] == 0}
    for size in smaller:
        small = phi.truncate(size)
        assert small.shape == (size, n)
        torch.testing.assert_close(phi.truncate_sketch(phi(x), size), small(x), rtol=1e-10, atol=1e-10)
        if phi.nesting == "prefix":
            w_small = torch.where(torch.arange(d) < size, w, 0.0)
            lifted = small.lift(w[:, :size]) * (size / d) ** 0.5
            torch.testing.assert_close(phi.lift(w_small), lifted, rtol=1e-10, atol=1e-10)
    with pytest.raises(gs.InputError, match="truncate"):
        phi.truncate(d + 1)


@each_case
def test_seed_and_kind_decide_the_map(case):
    phi, x = case.build(64, 16, seed=3), vectors(1, 64)
    again = made_from(json.loads(json.dumps(recipe_of(phi))))
    for copy in (again, pickle.loads(pickle.dumps(phi))):
        assert torch.equal(copy(x), phi(x))
        assert copy.fingerprint == phi.fingerprint
        assert repr(copy) == repr(phi)
    other = case.build(64, 16, seed=4)
    assert other.fingerprint != phi.fingerprint
    assert not torch.equal(other(x), phi(x))


@each_case
def test_scipy_and_algebra(case):
    phi = case.build(64, 16)
    matrix = phi.dense()
    operator = phi.to_scipy(dtype=torch.float64)
    x, w = vectors(1, 64)[0], vectors(1, 16)[0]
    torch.testing.assert_close(torch.from_numpy(operator @ x.numpy()), matrix @ x)
    torch.testing.assert_close(torch.from_numpy(operator.T @ w.numpy()), matrix.T @ w)
    gram = phi @ phi.T
    assert gram.is_self_adjoint
    torch.testing.assert_close(gram.dense(), matrix @ matrix.T)


@each_case
def test_derivatives(case):
    phi = case.build(8, 4)
    x = vectors(1, 8).requires_grad_()
    assert torch.autograd.gradcheck(phi, (x,), check_forward_ad=True, check_batched_grad=False)
    phi(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * phi.lift(phi(x.detach())))


@each_case
def test_function_transforms(case):
    phi = case.build(*case.fit(16, 4))
    x, w = vectors(3, phi.n), vectors(3, phi.d)
    for in_dim, batch in ((0, x), (1, x.T)):
        assert torch.equal(torch.func.vmap(phi, in_dims=in_dim)(batch), phi(x))

    def cubic(v):
        return phi.lift(v).pow(3).sum()

    lifted = phi.lift(w[0])
    torch.testing.assert_close(torch.func.grad(cubic)(w[0]), 3 * phi(lifted**2))
    hessian = 6 * phi.dense() @ torch.diag(lifted) @ phi.dense().T
    torch.testing.assert_close(torch.func.hessian(cubic)(w[0]), hessian)  # forward over reverse, batched


@each_case
def test_an_empty_batch_is_refused(case):
    phi = case.build(64, 16)
    for map_, shape in ((phi, (0, 64)), (phi, (2, 0, 64)), (phi.T, (0, 16)), (phi @ phi.T, (0, 16))):
        with pytest.raises(gs.InputError, match=r"an empty batch of shape .* Wanted: at least one vector. Leave"):
            map_(torch.zeros(shape))


@each_case
def test_these_numbers_never_change(case):
    """Stored sketches are compared with new ones for years. Raise the kind's ``version`` when they must change."""
    golden = json.loads((Path(__file__).parent / "golden_sketches.json").read_text())[str(case)]
    phi = case.build(*case.fit(1000, 16), seed=7)
    x = torch.arange(phi.n, dtype=torch.float64).cos()
    torch.testing.assert_close(phi(x)[:4], torch.tensor(golden["sketch"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert phi.fingerprint == golden["fingerprint"]
