"""Every situation is exact or refused: sketches, formed gradients and inner products, against autograd row by row."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest
import torch
from situations import SITUATIONS, Setting, Situation
from torch import Tensor

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.data import each_tensor

EXACT = [s for s in SITUATIONS.values() if s.outcome != "refused"]
REFUSED = [s for s in SITUATIONS.values() if s.outcome == "refused"]


def rows_of(batch: Any, rows: list[int]) -> Any:
    return each_tensor(batch, lambda tensor: tensor.detach()[rows])


@cache
def gradients(name: str) -> Tensor:
    """Gradients [b, n] by ``loss.backward()`` on a model of its own, each row alone."""
    setting = SITUATIONS[name].setting()
    parameters = [tensor for _, tensor in gs.Parameters(setting.model)]
    found = []
    for row in range(length(setting.batch)):
        loss = setting.losses(setting.model, rows_of(setting.batch, [row])).sum()
        for tensor in parameters:
            tensor.grad = None  # a loss may have run a backward pass of its own
        loss.backward()
        parts = [torch.zeros_like(t) if t.grad is None else t.grad.to_dense() for t in parameters]
        found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def length(batch: Any) -> int:
    return int(len(next(iter(torch.utils._pytree.tree_leaves(batch)))))


def check(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).norm(dim=1)
    assert got.shape == want.shape
    assert not got.requires_grad
    assert bool((error <= tolerance * want.norm(dim=1) + tolerance * 1e-3).all()), f"errors {error / want.norm(dim=1)}"


@pytest.fixture
def _said(situation: Situation):
    """What is slow says so, and nothing else does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in said if issubclass(w.category, GradsketchWarning)]
    assert bool(ours) == (situation.outcome == "slow"), ours


@cache
def setting_of(name: str) -> Setting:
    """One model for all tests of a situation, because a model is left as it was found."""
    return SITUATIONS[name].setting()


def sketcher_of(situation: Situation, sketch: Any, method: str = "auto") -> tuple[Any, Any]:
    setting = setting_of(situation.name)
    parameters = gs.Parameters(setting.model)
    phi = sketch(parameters)
    return setting, gs.GradientSketcher(setting.model, setting.losses, phi, parameters=parameters, method=method)


def blocks(parameters: gs.Parameters) -> gs.BlockSum:
    return gs.BlockSum(parameters, min(24, parameters.n))


def flat(parameters: gs.Parameters) -> gs.AFFD | gs.BlockSum:
    return gs.AFFD(parameters.n, min(24, parameters.n)) if parameters.n > 1 else blocks(parameters)


situations = pytest.mark.parametrize("situation", EXACT, ids=lambda s: s.name)
# Variants meet the same code behind the capture: -m slow runs these tests for all of them.
first_variants = pytest.mark.parametrize(
    "situation",
    [pytest.param(s, marks=() if s.first else pytest.mark.slow) for s in EXACT],
    ids=[s.name for s in EXACT],
)


@situations
def test_batches_of_any_size_and_order_are_exact(situation, _said):
    setting, sketcher = sketcher_of(situation, blocks)
    want = sketcher.sketch(gradients(situation.name))
    with setting.around():
        for rows in (list(range(len(want))), [4, 2, 1, 3, 0, 2], [2], *([[3, 1, 0]] if situation.first else [])):
            check(sketcher(rows_of(setting.batch, rows)).values, want[rows], situation.tolerance)
    globs = situation.slow
    slow = {name for name in gs.Parameters(setting.model).names if any(fnmatchcase(name, glob) for glob in globs)}
    assert set(sketcher.slow) == slow, dict(sketcher.slow)


@first_variants
def test_formed_gradients_and_inner_products_are_exact(situation, _said):
    setting, sketcher = sketcher_of(situation, flat)
    want = gradients(situation.name)
    with setting.around():
        check(sketcher(rows_of(setting.batch, [3, 0, 4])).values, sketcher.sketch(want[[3, 0, 4]]), situation.tolerance)
        others = rows_of(setting.batch, [2, 0])
        gram = gs.gradient_gram(setting.model, setting.losses, setting.batch, others)
    scale = want.norm(dim=1)[:, None] * want[[2, 0]].norm(dim=1)[None]
    assert bool(((gram.double() - want @ want[[2, 0]].T).abs() <= 2 * situation.tolerance * (scale + 1e-3)).all())


@first_variants
def test_every_method_is_exact_or_refuses(situation):
    want = gradients(situation.name)
    for method in set(situation.methods) - {"auto"}:
        setting, sketcher = sketcher_of(situation, flat, method)
        with setting.around():
            try:
                got = sketcher(setting.batch).values
            except InputError as error:
                assert method == "outer" and situation.outcome == "slow" and "method='outer'" in str(error), error
            else:
                check(got, sketcher.sketch(want), situation.tolerance)


@pytest.mark.parametrize("situation", REFUSED, ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
def test_what_has_no_gradients_of_its_own_is_refused(situation):
    for method in situation.methods:
        for sketch in (blocks, flat):
            with pytest.raises(InputError, match=situation.words):
                setting, sketcher = sketcher_of(situation, sketch, method)
                sketcher(setting.batch)
        if method != "implicit":
            setting = situation.setting()
            with pytest.raises(InputError, match=situation.words):
                gs.gradient_gram(setting.model, setting.losses, setting.batch, method=method)
