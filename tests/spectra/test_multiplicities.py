"""The k largest are the k largest: copies of eigenvalues are found, or the result says that they are not counted."""

import numpy as np
import pytest
import torch
from matrices import rotated
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.functional import cross_entropy

import gradsketch as gs
from gradsketch.spectra.search import Trial
from sampled import latin


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1)


def regression(features, outputs, dtype=torch.float64):
    """H = 2 XᵀX/N once for every output: each eigenvalue as often as there are outputs."""
    torch.manual_seed(0)
    model = nn.Linear(features, outputs, bias=False).to(dtype)
    inputs = torch.randn(5 * features, features, dtype=dtype) * torch.linspace(3, 0.1, features, dtype=dtype)
    return gs.hessian(model, squares, (inputs, torch.randn(len(inputs), outputs, dtype=dtype)))


def zero_head(classes):
    """A softmax head at zero weights: each eigenvalue of XᵀX/(C N) C − 1 times, for any labels."""
    torch.manual_seed(0)
    model = nn.Linear(6, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    return gs.hessian(
        model,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        (torch.randn(90, 6).double(), torch.arange(90) % classes),
    )


def leaders(values, k):
    return np.sort(values[np.argsort(-np.abs(values), kind="stable")][:k])


@pytest.mark.parametrize(
    ("operator", "k"),
    [
        (regression(6, 4), 8),
        (regression(6, 4, torch.float32), 8),
        (regression(20, 10), 10),
        (zero_head(3), 6),
        (zero_head(5), 9),
    ],
)
@pytest.mark.parametrize("memory", [1 << 28, 0])
def test_layers_whose_eigenvalues_repeat(operator, k, memory):
    dense = np.linalg.eigvalsh(operator.dense().numpy())
    result = gs.spectrum(operator, k, method="full", memory=memory, progress=False)
    np.testing.assert_allclose(np.sort(result.values), leaders(dense, k), rtol=2e-3)
    assert result.converged.all()
    assert result.confidence >= 0.99
    arpack = eigsh(operator.to_scipy(torch.float64), k=k, which="LM", v0=np.ones(operator.n), ncv=operator.n)[0]
    np.testing.assert_allclose(np.sort(result.values), np.sort(arpack), rtol=2e-3)


def test_a_layer_with_twenty_outputs():
    operator = regression(60, 20, torch.float32)
    result = gs.spectrum(operator, 10, progress=False)
    largest = np.linalg.eigvalsh(operator.dense().numpy())[-1]
    np.testing.assert_allclose(result.values, [largest] * 10, rtol=1e-3)
    assert result.confidence >= 0.99


def planted(name, seed):
    """Return 300 eigenvalues with repeated leaders, and which="both"'s k of each end."""
    generator = np.random.default_rng(seed)
    sizes = np.sort(generator.uniform(2, 10, 6))[::-1]
    repeated = np.repeat(sizes, generator.integers(1, 5, 6))
    bulk = generator.normal(size=300 - len(repeated))
    signs = {"indefinite": generator.choice([-1, 1], len(repeated)), "top": 1, "bottom": -1, "positive": 1}[name]
    bulk = np.abs(bulk) if name == "positive" else bulk
    return np.r_[repeated * signs, np.clip(bulk, -1.5, 1.5)]


@pytest.mark.parametrize(
    ("seed", "name", "memory"), latin(range(2), ["indefinite", "top", "bottom", "positive"], [1 << 28, 0])
)
def test_planted_multiplicities(name, seed, memory):
    values = planted(name, seed)
    operator = rotated(torch.from_numpy(values), seed)
    result = gs.spectrum(operator, 8, method="full", memory=memory, tolerance=1e-6, progress=False)
    np.testing.assert_allclose(np.sort(np.abs(result.values)), np.sort(np.abs(values))[-8:], rtol=1e-6)
    both = gs.spectrum(operator, 5, which="both", method="full", memory=memory, steps=200, progress=False)
    ordered = np.sort(values)
    np.testing.assert_allclose(both.values[:5], ordered[::-1][:5], rtol=1e-3)
    if name != "positive":
        np.testing.assert_allclose(both.values[-5:], ordered[:5][::-1], rtol=1e-3)
    assert result.confidence >= 0.99


def test_outliers_and_shares_of_the_gradient_count_copies():
    values = torch.cat([torch.tensor([9.0, 9, 9, 5, 5, 1]), torch.rand(200) / 10]).double()
    operator = rotated(values)
    _, vectors = torch.linalg.eigh(operator.matrix)
    gradient = vectors[:, -5:].sum(1) + vectors[:, 0] * 5**0.5  # half of it among the outliers
    result = gs.spectrum(operator, 6, gradient=gradient, progress=False)
    assert result.outliers == 5
    assert result.gradient_in_outliers == pytest.approx(0.5, abs=1e-3)


def test_overlaps_of_eigenspaces_do_not_depend_on_which_copies_were_met():
    operator = rotated(torch.cat([torch.full((3,), 9.0), torch.rand(200) / 10]).double())
    points = [gs.spectrum(operator, 3, seed=seed, sketch=gs.AFFD(203, 128), progress=False) for seed in (0, 1)]
    assert gs.Evolution((0, 1), tuple(points)).overlaps(3).min() > 0.99


def test_the_sketched_basis_says_that_it_does_not_count_copies():
    result = gs.spectrum(regression(6, 4), 6, method="sketched-basis", progress=False)
    assert result.confidence is None
    assert any("does not count copies" in note for note in result.notes)


def test_a_search_that_was_cut_short_says_so():
    result = gs.spectrum(regression(60, 20), 10, steps=60, progress=False)
    assert result.confidence < 0.99
    assert any("cut short" in note for note in result.notes)


def test_a_matrix_of_low_rank_is_over_when_its_range_is():
    matrix = torch.zeros(500, dtype=torch.float64)
    matrix[:4] = torch.tensor([4.0, 3, 3, -2])
    operator = rotated(matrix)
    result = gs.spectrum(operator, 10, progress=False)
    np.testing.assert_allclose(result.values, [4, 3, 3, -2], rtol=1e-6)
    assert result.hvps < 15
    assert result.confidence >= 0.99


@pytest.mark.statistical
def test_an_eigenvalue_that_no_trial_met_is_as_rare_as_stated():
    """60 doubled leaders, each to be met by one more random vector: at 1 % each, P(more than 4 missed) < 0.001."""
    missed = 0
    for seed in range(60):
        values = torch.cat([torch.tensor([5.0, 5.0]), torch.linspace(0, 4.5, 98)]).double()
        result = gs.spectrum(Diagonal(values), 2, seed=seed, method="full", progress=False)
        missed += abs(result.values[1] - 5) > 0.05
    assert missed <= 4


class Diagonal(gs.LinearMap):
    is_self_adjoint = True

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, (len(values), len(values)), values.dtype

    def _apply(self, x):
        return x * self.values

    _apply_adjoint = _apply


def chain(nodes, weights, steps):
    """Return the coefficients of the measure with these nodes and weights, by Lanczos with re-orthogonalisation."""
    q, basis, trial = np.sqrt(weights / weights.sum()), [], Trial()
    for _ in range(steps):
        basis.append(q)
        w = nodes * q
        trial.alphas.append(float(q @ w))
        for _ in range(2):
            w = w - np.array(basis).T @ (np.array(basis) @ w)
        trial.betas.append(float(np.linalg.norm(w)))
        q = w / trial.betas[-1]
    return trial


@pytest.mark.parametrize("seed", range(20))
def test_no_measure_weighs_more_beyond_the_bound_than_its_chain_allows(seed):
    generator = np.random.default_rng(seed)
    nodes, weights = np.r_[generator.uniform(-1, 1, 60), 1.5], np.r_[generator.uniform(size=60), 0]
    weights[-1] = 10.0 ** generator.uniform(-12, -3)
    for steps in (1, 2, 4, 8):
        trial = chain(nodes, weights, steps)
        stated = trial.log_weight(1.5)
        assert stated is None or stated >= np.log(weights[-1] / weights.sum()) - 1e-6
        lower = chain(-nodes, weights, steps).flipped().log_weight(1.5)
        assert stated == pytest.approx(lower)


def test_the_bound_is_reached_by_a_measure_with_the_same_coefficients():
    """The Gauss–Radau rule with a node at the bound puts exactly the stated weight there."""
    generator = np.random.default_rng(0)
    nodes = generator.uniform(-1, 1, 60)
    trial = chain(nodes, np.ones(60), 5)
    matrix = np.diag([*trial.alphas, 0.0]) + np.diag(trial.betas, 1) + np.diag(trial.betas, -1)
    shifted = matrix[:5, :5] - 1.2 * np.eye(5)
    last = np.zeros(5)
    last[-1] = trial.betas[-1] ** 2
    matrix[5, 5] = 1.2 + np.linalg.solve(shifted, last)[-1]
    values, vectors = np.linalg.eigh(matrix)
    assert values[-1] == pytest.approx(1.2)
    assert trial.log_weight(1.2) == pytest.approx(np.log(vectors[0, -1] ** 2))
