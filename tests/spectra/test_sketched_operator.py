"""The sketched operator: the bias is the one predicted, the correction removes it, the stated errors hold."""

import numpy as np
import pytest
import torch
from matrices import rotated

import gradsketch as gs
from gradsketch.spectra.bias import corrected, detection_threshold, effective_d, least_d

N, D, SEEDS = 2048, 256, 20


class Diagonal(gs.LinearMap):
    is_self_adjoint = True

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, (len(values), len(values)), values.dtype

    def _apply(self, x):
        return x * self.values

    _apply_adjoint = _apply


def eigenvalues():
    """Ten isolated leaders of both signs above a positive bulk, whose trace is what biases."""
    leaders = torch.tensor([60.0, 50, 40, 33, 27, 22, -35, -28, -23, -18], dtype=torch.float64)
    bulk = torch.rand(N - 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([leaders, bulk])


@pytest.fixture(scope="module")
def runs():
    operator = rotated(eigenvalues())
    return [
        gs.spectrum(phi @ operator @ phi.T, 10, seed=phi.seed) for phi in (gs.AFFD(N, D, seed=s) for s in range(SEEDS))
    ]


def true_leaders():
    values = eigenvalues().numpy()
    return np.sort(values[np.argsort(-np.abs(values))[:10]])[::-1]


@pytest.mark.statistical
def test_the_raw_bias_is_the_one_predicted(runs):
    """Per value, 20 runs: the mean raw shift within 4 standard errors of (λ/d) Σ λ_j/(λ − λ_j); P < 0.01 for all."""
    raw = np.stack([np.sort([e.raw for e in r.asked])[::-1] for r in runs])
    every, leaders = eigenvalues().numpy(), true_leaders()
    predicted = np.array([(v / D) * sum(o / (v - o) for o in every if o != v) for v in leaders])
    shift = raw.mean(0) - leaders
    errors = raw.std(0, ddof=1) / SEEDS**0.5
    assert (np.abs(shift - predicted) < 4 * errors + 0.1 * np.abs(predicted)).all()
    assert (predicted / np.abs(leaders)).max() > 0.1


@pytest.mark.statistical
def test_corrected_values_lie_within_their_stated_errors(runs):
    """200 values; two standard errors should hold 95 %: with fewer than 85 % the correction or its error is wrong."""
    leaders = true_leaders()
    inside, raw, fixed = [], [], []
    for run in runs:
        found = sorted(run.asked, key=lambda e: -e.value)
        for e, exact in zip(found, leaders, strict=True):
            inside.append(abs(e.value - exact) < 2 * e.error)
            raw.append(abs(e.raw - exact) / abs(exact))
            fixed.append(abs(e.value - exact) / abs(exact))
    assert np.mean(inside) > 0.85
    assert np.mean(fixed) < 0.6 * np.mean(raw)


@pytest.mark.statistical
def test_moments_and_threshold(runs):
    every = eigenvalues()
    for run in runs[:3]:
        assert abs(run.trace.value - float(every.sum())) < 5 * run.trace.standard_error
        assert abs(run.squared_norm.value - float(every.square().sum())) < 5 * run.squared_norm.standard_error
        # AFFD has orthogonal rows: as a sample without replacement, it makes less noise by 1 − d/n.
        assert run.threshold == pytest.approx((run.squared_norm.value / D * (1 - D / N)) ** 0.5)


def test_values_below_the_threshold_are_marked():
    operator = rotated(torch.cat([torch.tensor([60.0, -50]), torch.rand(500)]))
    phi = gs.AFFD(502, 128)
    result = gs.spectrum(phi @ operator @ phi.T, 8)
    assert [e.value > 0 for e in result.eigenvalues if e.converged] == [True, False]
    assert any("detection threshold" in note for note in result.notes)


@pytest.mark.statistical
def test_nothing_below_the_threshold_counts_as_found():
    """4096 eigenvalues within ±1, ‖H‖_F² = 1365, threshold 3.3 at d = 128: raw values reach 6, and all are bulk.

    3 runs, whose outermost values pass the edge of the bulk with P = 0.01 a side: more than one has P < 0.002.
    """
    values = 2 * torch.rand(4096, generator=torch.Generator().manual_seed(0)) - 1
    found = []
    for seed in range(3):
        phi = gs.AFFD(4096, 128, seed=seed)
        result = gs.spectrum(phi @ Diagonal(values) @ phi.T, 5, which="both", steps=100, tolerance=0.01, seed=seed)
        assert max(abs(e.raw) for e in result.eigenvalues) > 5
        assert all(e.residual < 0.01 for e in result.eigenvalues)
        found += [e.converged for e in result.eigenvalues]
    assert sum(found) <= 1


def test_without_probes_nothing_is_corrected():
    operator = rotated(eigenvalues()[:500])
    phi = gs.AFFD(500, 128)
    result = gs.spectrum(phi @ operator @ phi.T, 5, probes=0)
    assert result.trace is None
    assert all(e.raw is None for e in result.eigenvalues)


def test_a_thousand_krylov_vectors():
    values = torch.cat([torch.logspace(2, 0, 60, dtype=torch.float64), torch.zeros(5000, dtype=torch.float64)])
    phi = gs.AFFD(5060, 2048)
    result = gs.spectrum(phi @ Diagonal(values) @ phi.T, 60, steps=1000, tolerance=1e-8)
    dense = torch.linalg.eigvalsh((phi @ Diagonal(values) @ phi.T).dense()).flip(0)[:60]
    np.testing.assert_allclose(sorted((e.raw for e in result.asked), reverse=True), dense.numpy(), rtol=1e-6)


def test_the_formula_on_paper():
    """One outlier over a flat rest: λ + tr_rest/d + F_rest/(d λ) exactly, undone."""
    raw = np.array([10 + 4 / 100 + 16 / (100 * 10.0)])
    values, seen = corrected(raw, 100.0, 14.0, 116.0)
    assert values[0] == pytest.approx(10.0, rel=1e-6)
    assert seen[0]
    assert detection_threshold(100.0, 25.0) == 2.0
    assert least_d(1.0, 100.0, 0.1) == 512


def test_the_recommended_size_does_what_it_says():
    operator = rotated(eigenvalues())
    advice = gs.recommend_d(operator, share=0.5, tolerance=0.08)
    assert advice.hvps == 20
    assert advice.d == 512
    phi = gs.AFFD(N, advice.d)
    result = gs.spectrum(phi @ operator @ phi.T, 10)
    assert result.threshold < 0.5 * 0.5 * advice.largest
    top = np.sort(eigenvalues().numpy())[::-1][:3]
    np.testing.assert_allclose([e.value for e in result.positive[:3]], top, rtol=0.25)
    with pytest.raises(gs.InputError, match="between 0 and 1"):
        gs.recommend_d(operator, share=2.0)


@pytest.mark.parametrize(
    ("kind", "n", "d", "share"),
    [
        (gs.AFFD, 1024, 128, 0.875),
        (gs.AFFD, 1024, 512, 0.5),
        (gs.AFJL, 1024, 512, 0.5),
        (gs.Dense, 1024, 128, 1.0),
        (gs.Dense, 1024, 512, 1.0),
        (gs.Dense, 1024, 1024, 1.0),
    ],
)
def test_orthogonal_rows_make_less_noise(kind, n, d, share):
    assert d / effective_d(kind(n, d), 0) == pytest.approx(share, rel=0.25 if kind is gs.Dense else 1e-6)


@pytest.mark.parametrize("kind", [gs.AFFD, gs.AFJL])
def test_a_sketch_that_is_a_rotation_moves_nothing(kind):
    values = torch.cat([torch.tensor([30.0, 20, 15, 10]), torch.rand(1020) * 0.6]).double()
    phi = kind(1024, 1024)
    result = gs.spectrum(phi @ Diagonal(values) @ phi.T, 4, tolerance=1e-6)
    np.testing.assert_allclose(result.values, [30, 20, 15, 10], rtol=1e-5)
    assert result.threshold == 0
    assert any("method='full' is exact" in note for note in result.notes)


@pytest.mark.statistical
def test_errors_hold_where_d_is_half_of_n():
    """48 values: two standard errors hold 95 %; fewer than 80 % has P < 0.001."""
    values = torch.cat([torch.tensor([30.0, 20, 15, 10]), torch.rand(1020) * 0.6]).double()
    inside = []
    for seed in range(12):
        phi = gs.AFFD(1024, 512, seed=seed)
        result = gs.spectrum(phi @ Diagonal(values) @ phi.T, 4, seed=seed)
        inside += list(np.abs(np.sort(result.values)[::-1] - [30, 20, 15, 10]) < 2 * np.sort(result.errors)[::-1])
    assert np.mean(inside) > 0.8
