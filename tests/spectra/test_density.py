"""Stochastic Lanczos quadrature against known spectra."""

import numpy as np
import pytest
import torch
from matrices import Matrix, rotated, spectra

import gradsketch as gs

FORMS = {"kept": 1 << 28, "three-term": 0}


@pytest.mark.parametrize("memory", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["two-sided", "dense edge", "power law"])
@pytest.mark.statistical
def test_integral_trace_and_second_moment(name, memory):
    """Each of 12 comparisons is within 4 standard errors of 8 probes: t with 7 degrees of freedom, P < 0.006."""
    eigenvalues = spectra()[name]
    result = gs.density(rotated(eigenvalues), probes=8, steps=30, memory=memory)
    assert result.reorthogonalized == (memory > 0)
    for weights in result.weights:
        assert sum(weights) == pytest.approx(1, abs=1e-12)
    curve = result.curve(points=4000)
    assert np.trapezoid(curve.density, curve.grid) == pytest.approx(1, abs=1e-4)
    for estimate, exact in [(result.trace, eigenvalues.sum()), (result.squared_norm, eigenvalues.square().sum())]:
        assert abs(estimate.value - float(exact)) < 4 * estimate.standard_error


def test_a_probe_has_exact_moments():
    operator = rotated(spectra()["two-sided"])
    result = gs.density(operator, probes=1, steps=20, memory=0)
    z = gs.Stream(0, "spectrum", "density", "0").signs(0, operator.n, dtype=torch.float64)
    v = z
    for power in range(6):
        expected = float(z @ v) / operator.n
        assert result.moment(power).value == pytest.approx(expected, rel=1e-9)
        v = operator(v)


def test_copies_share_the_weight_of_what_they_copy():
    operator = rotated(spectra()["one-sided"])
    kept = gs.density(operator, probes=3, steps=100)
    forgotten = gs.density(operator, probes=3, steps=100, memory=0)
    for a, b in zip(kept.nodes, forgotten.nodes, strict=True):
        assert sum(x > 5 for x in b) > sum(x > 5 for x in a)
    grid = kept.curve(points=200, width=2.0)
    other = forgotten.curve(points=200, width=2.0)
    np.testing.assert_allclose(other.density, grid.density, atol=1e-3 * grid.density.max())


@pytest.mark.statistical
def test_share_of_negative_eigenvalues():
    """Exact share 0.25; the estimate of 10 probes is within 4 standard errors."""
    eigenvalues = torch.cat([-torch.linspace(1, 2, 100), torch.linspace(1, 5, 300)]).double()
    share = gs.density(rotated(eigenvalues), probes=10, steps=20).share_below(0.0)
    assert abs(share.value - 0.25) < 4 * share.standard_error
    assert share.standard_error < 0.05


def test_one_distinct_eigenvalue():
    result = gs.density(Matrix(2 * torch.eye(50)), probes=2, steps=10)
    assert result.hvps == 2
    assert result.curve().density.max() > 0


def test_json_round_trip(tmp_path):
    result = gs.density(rotated(spectra()["two-sided"]), probes=2, steps=5)
    assert gs.Density.from_json(result.to_json(tmp_path / "d.json")) == result


def test_bad_input_is_named():
    operator = rotated(spectra()["two-sided"])
    with pytest.raises(gs.InputError, match="at least one"):
        gs.density(operator, probes=0)
    with pytest.raises(gs.InputError, match="positive number"):
        gs.density(operator, probes=1, steps=2).curve(width=-1.0)
    with pytest.raises(gs.InputError, match="its own adjoint"):
        gs.density(Matrix(torch.rand(5, 5), is_self_adjoint=False))
