"""Products with the Hessian, the Gauss–Newton matrix and the Fisher against routes of their own, in float64."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    Case,
    fisher_times,
    gauss_newton_times,
    gradient_by_backward,
    hessian_times,
    vectors,
    worst_block_error,
)

from gradsketch import Parameters, fisher, gauss_newton, hessian, loss_gradient
from sampled import latin

pytestmark = pytest.mark.filterwarnings("ignore:attention takes its math path")

MODES = ("grad-of-grad", "jvp-of-grad", "central-difference")
KINDS = {
    "hessian": (hessian, hessian_times),
    "gauss_newton": (gauss_newton, gauss_newton_times),
    "fisher": (fisher, fisher_times),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture(scope="module", params=KINDS)
def expected(request: pytest.FixtureRequest, case: Case):
    build, times = KINDS[request.param]
    v = vectors(case)
    return build, case, v, torch.stack([times(case, row) for row in v])


@pytest.mark.parametrize(("mode", "streamed"), latin(MODES, [False, True]))
def test_every_block_equals_an_independent_product(expected, mode, streamed):
    build, case, v, products = expected
    data = case.examples if streamed else case.batch
    operator = build(case.model, case.losses, data, mode=mode, batch_size=3)
    assert worst_block_error(case, operator(v), products) < (1e-6 if mode == "central-difference" else 1e-8)


def test_vectors_in_any_batch_shape_and_again(expected):
    build, case, v, _ = expected
    operator = build(case.model, case.losses, case.batch)
    together = operator(v[:2].view(2, 1, -1))
    assert together.shape == (2, 1, operator.n)
    one_by_one = torch.stack([operator(row) for row in v[:2]]).view_as(together)
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)


def test_gradient_equals_plain_backward(case):
    for data in (case.batch, case.examples):
        gradient = loss_gradient(case.model, case.losses, data, batch_size=3, dtype=torch.float64)
        torch.testing.assert_close(gradient, gradient_by_backward(case), rtol=1e-12, atol=1e-12)


def test_linear_regression_in_closed_form():
    case = CASES["regression"]()
    x = torch.stack([torch.cat([x, torch.ones(1)]) for x, _ in case.examples])
    second_moment = x.T @ x / len(x)
    # Weight rows and biases interleave as [W_00 W_01 W_02 W_10 …, b_0 b_1].
    places = torch.tensor([[0, 1, 2, 6], [3, 4, 5, 7]])
    dense = torch.zeros(8, 8, dtype=torch.float64)
    for place in places:
        dense[place[:, None], place] = 2 * second_moment
    for data in (case.batch, case.examples):
        H = hessian(case.model, case.losses, data, batch_size=4)
        torch.testing.assert_close(H.dense(), dense)


def test_blocks_by_globs_are_blocks_of_the_whole():
    case = CASES["gpt2"]()
    whole = hessian(case.model, case.losses, case.batch)
    names = Parameters(case.model).names
    chosen = Parameters(case.model, "transformer.h.0.*")
    block = hessian(case.model, case.losses, case.batch, chosen)
    mask = torch.cat([torch.full((t.numel(),), name in chosen.names) for name, t in Parameters(case.model)])
    assert 0 < mask.sum() < len(mask)
    assert len(names) > len(chosen.names)
    v = torch.randn(chosen.n, dtype=torch.float64)
    padded = torch.zeros(whole.n, dtype=torch.float64)
    padded[mask] = v
    torch.testing.assert_close(block(v), whole(padded)[mask], rtol=1e-10, atol=1e-10)
