"""The gradient of w is Phi ∇L exactly: for every kind of sketch, and for every architecture we promise."""

import pytest
import torch
from torch import nn

import gradsketch as gs
from contracts import sketch_cases
from gradients import zoo


@pytest.mark.parametrize("case", [*sketch_cases.CASES, "BlockSum"], ids=str)
def test_every_kind_of_sketch(case: sketch_cases.Case | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)).double()  # n = 344
    parameters, x = gs.Parameters(model), torch.randn(3, 12, dtype=torch.float64)
    sketch = gs.BlockSum(parameters, 64, seed=3) if case == "BlockSum" else case.build(parameters.n, 64, seed=3)
    w = torch.randn(64, dtype=torch.float64) / 20
    theta = (parameters.flatten() + sketch.lift(w)).requires_grad_()
    (gradient,) = torch.autograd.grad(
        torch.func.functional_call(model, parameters.unflatten(theta), (x,)).square().sum(), theta
    )
    with gs.Subspace(model, parameters, sketch) as subspace:
        with torch.no_grad():
            subspace.w.copy_(w)
        subspace(x).square().sum().backward()
    torch.testing.assert_close(subspace.w.grad, sketch(gradient))


@pytest.mark.parametrize("name", zoo.CASES)
def test_every_architecture(name: str) -> None:
    case = zoo.CASES[name]
    model = case.model()
    parameters = gs.Parameters(model)
    exact = zoo.exact_gradients(model, case.task, case.examples, parameters).sum(0)
    sketch = gs.AFFD(parameters.n, 128)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with gs.Subspace(model, parameters, sketch) as subspace:
        # Through the Subspace and through the model itself: both are at theta0 + Phiᵀ w.
        for called in (subspace, model):
            subspace.w.grad = None
            for example in case.examples:
                case.task.losses(called, case.task.collate([example])).sum().backward()
            torch.testing.assert_close(subspace.w.grad, sketch(exact), rtol=1e-6, atol=1e-9)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
