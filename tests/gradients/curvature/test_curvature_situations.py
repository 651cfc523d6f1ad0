"""Every situation is right, says what it does, or is refused: whole matrices against first derivatives in float64."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from curvature_situations import SITUATIONS, Setting, Situation
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.data import each_tensor
from gradsketch.gradients.parameters import bare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEP = 1e-6


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def oracle_of(setting: Setting) -> tuple[nn.Module, Any, Any]:
    """A copy in float64 of the plain model, its losses, and all rows at once."""
    model = setting.plain_model if setting.plain_model is not None else bare(setting.model)
    batch = setting.data if setting.batch is None else setting.batch
    batch = each_tensor(batch, lambda t: t.detach().double() if t.is_floating_point() else t)
    return copy.deepcopy(model).double(), setting.plain_losses or setting.losses, batch


def gradient(model: nn.Module, losses: Any, batch: Any, *, create: bool = False) -> Tensor:
    values = trained(model)
    grads = torch.autograd.grad(losses(model, batch).mean(), values, allow_unused=True, create_graph=create)
    parts = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, values, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def moved(model: nn.Module, direction: Tensor, step: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(trained(model)) + step * direction, trained(model)
        )
    return model


def dense_hessian(setting: Setting) -> Tensor:
    model, losses, batch = oracle_of(setting)
    n = sum(p.numel() for p in trained(model))
    if not setting.differences:
        g = gradient(model, losses, batch, create=True)
        rows = [torch.autograd.grad(x, trained(model), retain_graph=True, materialize_grads=True) for x in g]
        return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
    rows = []
    for unit in torch.eye(n, dtype=torch.float64):
        ahead, behind = (gradient(moved(model, unit, h), losses, batch) for h in (STEP, -STEP))
        rows.append((ahead - behind) / (2 * STEP))
    return torch.stack(rows)


def dense_gauss_newton(setting: Setting) -> Tensor:
    """Jᵀ A J: J by differences of outputs, A by differentiating the plain loss twice in them."""
    model, losses, batch = oracle_of(setting)
    n = sum(p.numel() for p in trained(model))

    def outputs(model: nn.Module) -> Tensor:
        return model(batch[0]).detach()

    base = outputs(model)
    columns = []
    for unit in torch.eye(n, dtype=torch.float64):
        ahead, behind = (outputs(moved(model, unit, h)) for h in (STEP, -STEP))
        columns.append((ahead - behind) / (2 * STEP))
    J = torch.stack(columns, -1).reshape(-1, n)

    def loss(z: Tensor) -> Tensor:
        return losses(lambda *_: z, batch).mean()

    A = torch.autograd.functional.hessian(loss, base).reshape(base.numel(), base.numel())
    return J.T @ A @ J


def build(kind: Any, setting: Setting) -> tuple[Any, Tensor, list[str]]:
    """Return the operator, its whole matrix, and what was said."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        operator = kind(setting.model, setting.losses, setting.data, setting.parameters, **setting.options)
        matrix = operator.dense().double()
    return operator, matrix, [str(w.message) for w in heard if issubclass(w.category, GradsketchWarning)]


CURVATURES = {"hessian": (gs.hessian, dense_hessian), "gauss_newton": (gs.gauss_newton, dense_gauss_newton)}
CASES = [
    pytest.param(situation, kind, id=f"{situation.name}-{kind}")
    for situation in SITUATIONS.values()
    for kind in CURVATURES
    if situation.outcome != "refused" and (kind == "hessian" or situation.gauss_newton)
]


@pytest.mark.parametrize(("situation", "kind"), CASES)
def test_matrices_are_right_and_what_is_odd_is_said(situation: Situation, kind: str) -> None:
    setting = situation.setting()
    builder, oracle = CURVATURES[kind]
    wanted = oracle(setting)
    operator, came, heard = build(builder, setting)
    assert torch.linalg.matrix_norm(came - wanted) <= situation.tolerance * torch.linalg.matrix_norm(wanted) + 1e-8
    assert operator.check is not None
    if situation.outcome == "exact":
        assert heard == []
        assert operator.mode == setting.options.get("mode", "auto")
        assert operator.check.conclusive
    else:
        assert len(heard) == 1
        assert re.search(situation.words, heard[0])
    assert (operator.mode == "central-difference") == (
        situation.outcome == "differences" or setting.options.get("mode") == "central-difference"
    )


REFUSED = [s for s in SITUATIONS.values() if s.outcome == "refused"]


# What is wrong about a Hessian alone is not refused for the other two.
EACH = [(s, k) for s in REFUSED for k in (gs.hessian, gs.gauss_newton, gs.fisher) if k is gs.hessian or s.gauss_newton]


@pytest.mark.parametrize(("situation", "kind"), EACH, ids=lambda value: getattr(value, "name", None) or value.__name__)
def test_what_has_no_curvature_is_refused(situation: Situation, kind: Any) -> None:
    setting = situation.setting()
    with pytest.raises(InputError, match=situation.words):
        build(kind, setting)
