"""Every situation is exact in float64, for every kind of sketch, or refused in one clear message."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsketch as gs
from gradients.per_example.situations import SITUATIONS, Entry, Situation

TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def cut(batch: Any, places: list[int]) -> Any:
    return {name: value[places] for name, value in batch.items()}


def exact(made: Situation, batch: Any, parameters: gs.Parameters) -> Tensor:
    """Return flat gradients by a whole backward pass of one row alone at a time."""
    rows = []
    for i in range(len(batch["x"])):
        made.model.zero_grad(set_to_none=True)
        loss = made.losses(made.model, cut(batch, [i]))
        made.model.zero_grad(set_to_none=True)  # what the loss's own backward passes left is no part of it
        loss.sum().backward()
        rows.append(
            torch.cat(
                [torch.zeros(p.numel()) if p.grad is None else p.grad.to_dense().flatten() for _, p in parameters]
            )
        )
    made.model.zero_grad(set_to_none=True)
    return torch.stack(rows)


def sketched(sketcher: gs.GradientSketcher, made: Situation, batch: Any) -> Tensor:
    with (made.around or contextlib.nullcontext)(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sketcher(batch).values


EXACT = [name for name, entry in SITUATIONS.items() if entry.outcome != "refused"]
REFUSED = [name for name, entry in SITUATIONS.items() if entry.outcome == "refused"]
# What an example's gradient is alone is well defined here, and that is what the loop returns.
DEFINED_ALONE = {"batch_statistics_behind_a_head_of_zeros"}
BY_METHOD = [(n, method) for n in REFUSED for method in ("auto", "loop") if method == "auto" or n not in DEFINED_ALONE]


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    entry: Entry = SITUATIONS[name]
    made = entry.make()
    parameters = gs.Parameters(made.model)
    phi = gs.BlockSum(parameters, min(24, parameters.n))
    sketcher = gs.GradientSketcher(made.model, made.losses, phi)
    whole = exact(made, made.batch, parameters)
    scale = whole.norm(dim=1).max()
    # Other sizes and orders through one sketcher: what the first batch taught must hold for them.
    for places in ([0, 1, 2, 3, 4], [3, 1], [4, 2, 0], [2], [1, 0, 4, 3, 2]):
        got = sketched(sketcher, made, cut(made.batch, places))
        expected = phi(exact(made, cut(made.batch, places), parameters))
        assert (got - expected).norm(dim=1).max() <= TOLERANCE * scale, places
    assert set(sketcher.slow) == entry.slow
    assert sketcher.audits.audited >= (entry.outcome == "fast")
    assert sketcher.audits.largest_error < 1e-8


@pytest.mark.parametrize("name", EXACT)
def test_flat_gradients_and_inner_products(name):
    made = SITUATIONS[name].make()
    parameters = gs.Parameters(made.model)
    whole = exact(made, made.batch, parameters)
    phi = gs.AFFD(parameters.n, min(8, parameters.n))
    sketcher = gs.GradientSketcher(made.model, made.losses, phi, parameters=parameters)
    got, size = sketched(sketcher, made, made.batch), float(whole.norm())
    torch.testing.assert_close(got, phi(whole), rtol=1e-8, atol=1e-9 * size)
    with (made.around or contextlib.nullcontext)(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gram = gs.gradient_gram(made.model, made.losses, made.batch)
    torch.testing.assert_close(gram, whole @ whole.T, rtol=1e-8, atol=1e-9 * size**2)


@pytest.mark.parametrize(("name", "method"), BY_METHOD)
def test_refused(name, method):
    entry = SITUATIONS[name]
    made = entry.make()
    phi = gs.BlockSum(gs.Parameters(made.model), 8)
    with pytest.raises(gs.InputError) as caught:
        gs.sketch_gradients(made.model, made.losses, made.batch, phi, method=method)
    assert entry.words in str(caught.value)


@pytest.mark.parametrize("name", EXACT)
def test_the_model_and_the_batch_are_left_as_found(name):
    made = SITUATIONS[name].make()
    before = copy.deepcopy(dict(made.model.state_dict()))
    flags = {n: (p.requires_grad, p.grad) for n, p in made.model.named_parameters()}
    state = torch.get_rng_state()
    phi = gs.BlockSum(gs.Parameters(made.model), 8)
    sketched(gs.GradientSketcher(made.model, made.losses, phi), made, made.batch)
    assert torch.equal(state, torch.get_rng_state())
    assert {n: (p.requires_grad, p.grad) for n, p in made.model.named_parameters()} == flags
    for n, value in made.model.state_dict().items():
        assert torch.equal(value, before[n]), n
    assert not any(vars(value) for value in made.batch.values() if isinstance(value, Tensor))
