"""(F + λI)⁻¹ on whole gradients, against EK-FAC and linear systems written out in float64."""

import warnings

import pytest
import torch
from test_kfac import Experts, Tokens, alone, token_losses, tokens
from torch import nn
from torch.nn import functional
from zoo import CASES

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.curvature.solve import DampedInverse
from gradsketch.gradients.per_example.directions import Directions

DAMPING = 0.2


def divided(x, left, right, squares):
    """U ((Uᵀ x V) / (Λ + λ)) Vᵀ."""
    return left @ ((left.T @ x @ right) / (squares + DAMPING * squares.mean())) @ right.T


def test_it_is_ekfac_written_out():
    model, batch = Tokens().double(), tokens()
    inverse = gs.inverse_fisher(model, token_losses, batch, labels="empirical", damping=DAMPING)
    gradients = list(alone(model, token_losses, batch, gs.Parameters(model)))
    errors, inputs = torch.zeros(4, 4).double(), torch.zeros(5, 5).double()
    for x, y, counts in zip(*batch.values(), strict=True):
        error = (model(x).softmax(1) - functional.one_hot(y, 4)).detach() * counts[:, None]
        errors += error.T @ error
        inputs += (x * counts[:, None]).T @ x
    left, right = torch.linalg.eigh(errors).eigenvectors, torch.linalg.eigh(inputs).eigenvectors
    weights = torch.stack([g["linear.weight"] for g in gradients])
    squares = (left.T @ weights @ right).square().mean(0)
    bias = torch.stack([g["linear.bias"] for g in gradients]).square().mean(0)
    x, y = torch.randn(4, 5).double(), torch.randn(4).double()
    expected = torch.cat([divided(x, left, right, squares).flatten(), y / (bias + DAMPING * bias.mean())])
    torch.testing.assert_close(inverse(torch.cat([x.flatten(), y])), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse.dense(), inverse.T.dense(), rtol=1e-9, atol=1e-9)


def test_every_expert_has_its_own():
    x, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 4
    model, task = Experts().double(), gs.Classification()
    inverse = gs.inverse_fisher(model, task, (x, labels), labels="empirical", damping=DAMPING)
    gradients = torch.stack([g["stack"] for g in alone(model, task, (x, labels), gs.Parameters(model))])
    sides, squares = [], []
    for expert, mine in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
        errors = (model(x)[mine].softmax(1) - functional.one_hot(labels[mine], 4)).detach()
        sides.append([torch.linalg.eigh(m.T @ m).eigenvectors for m in (x[mine], errors)])
        left, right = sides[-1]
        squares.append((left.T @ gradients[:, expert] @ right).square().mean(0))
    damping, v = DAMPING * torch.stack(squares).mean(), torch.randn(2, 3, 4).double()
    expected = [
        left @ ((left.T @ x @ right) / (own + damping)) @ right.T
        for x, (left, right), own in zip(v, sides, squares, strict=True)
    ]
    torch.testing.assert_close(inverse(v.flatten()), torch.stack(expected).flatten(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_products_with_directions_are_those_of_whole_gradients(name):
    case, model = CASES[name], CASES[name].model()
    parameters, batch = gs.Parameters(model), case.task.collate(case.examples)
    along = Directions(parameters.shapes, torch.randn(3, parameters.n, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradsketchWarning)  # of parameters on the exact path, which count as well
        got = gs.GradientSketcher(model, case.task, along)(batch).values
    flat = [torch.cat([t.flatten() for t in g.values()]) for g in alone(model, case.task, batch, parameters)]
    expected = torch.stack(flat).double() @ along.vectors.T
    assert float((got - expected).norm()) < 1e-12 * float(expected.norm())


def test_directions_of_another_length_are_refused():
    with pytest.raises(InputError, match=r"\[d, 44\]"):
        Directions({"weight": (4, 11)}, torch.zeros(2, 43))


def test_an_inverse_by_conjugate_gradients_solves_the_system():
    torch.manual_seed(0)
    model, task = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), gs.Classification()
    data = (torch.randn(30, 4).double(), torch.arange(30) % 3)
    curvature = gs.gauss_newton(model, task, data)
    inverse = DampedInverse(curvature, DAMPING, tolerance=1e-10, iterations=200)
    dense, b = curvature.dense(), torch.randn(2, curvature.n).double()
    shift = inverse.shift * torch.eye(curvature.n).double()
    torch.testing.assert_close(inverse(b), torch.linalg.solve(dense + shift, b.T).T, rtol=1e-7, atol=1e-7)
    assert inverse.residual <= 1e-10
    mean = float(dense.trace()) / curvature.n
    assert abs(inverse.shift / (DAMPING * mean) - 1) < 1  # eight random vectors
    rough = DampedInverse(curvature, 1e-3, tolerance=1e-10, iterations=2)
    with pytest.warns(GradsketchWarning, match="after 2 products"):
        rough(b)
    assert rough.residual > 1e-10


@pytest.mark.parametrize("damping", [0.0, -1.0])
def test_a_damping_that_is_not_positive_is_refused(damping):
    model, task = nn.Linear(4, 3), gs.Classification()
    data = (torch.randn(6, 4), torch.arange(6) % 3)
    with pytest.raises(InputError, match="positive"):
        DampedInverse(gs.gauss_newton(model, task, data), damping)
    with pytest.raises(InputError, match="positive"):
        gs.inverse_fisher(model, task, data, damping=damping)
