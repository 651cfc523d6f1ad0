"""Owners of rows are measured right, or the rows are said to be mixed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradsketch.gradients.per_example.owners import InOrder, Measured, MixedError, owners_of, projected, spread_weights

DTYPES = st.sampled_from([torch.float64, torch.float32])


@st.composite
def owned(draw) -> tuple[Tensor, Tensor, int, torch.dtype]:
    """Gradients of rows, each with its owner; −1 has none."""
    examples, dtype = draw(st.integers(2, 20)), draw(DTYPES)
    owners = torch.tensor(draw(st.lists(st.integers(-1, examples - 1), min_size=1, max_size=30)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    gradient = torch.randn(len(owners), draw(st.integers(1, 5)), generator=generator, dtype=dtype)
    gradient *= 10.0 ** draw(st.integers(-3, 3))
    return gradient * (owners >= 0)[:, None], owners, examples, dtype


def measured(gradient: Tensor, parts: Tensor, examples: int, dtype: torch.dtype) -> Tensor:
    """Owners from two backward passes: ``parts`` [r, b] says how much each example brings to each row."""
    weights = spread_weights(torch.zeros(examples, dtype=dtype), dtype)
    weighted = gradient * (parts.to(dtype) @ weights)[:, None]
    plain = gradient * parts.to(dtype).sum(1, keepdim=True)
    return owners_of(projected(weighted, 1), projected(plain, 1), weights, dtype)


@given(owned())
def test_each_row_has_the_owner_it_has(case):
    gradient, owners, examples, dtype = case
    parts = torch.nn.functional.one_hot(owners.clamp_min(0), examples)
    assert measured(gradient, parts, examples, dtype).tolist() == owners.tolist()


@given(owned(), st.sampled_from([1.0, 0.5, 0.1, -0.1, -3.0, 0.002]), st.data())
def test_a_row_of_two_is_mixed(case, share, data):
    gradient, owners, examples, dtype = case
    row = data.draw(st.integers(0, len(owners) - 1))
    other = data.draw(st.integers(0, examples - 1))
    if owners[row] < 0 or other == owners[row]:
        return
    weights = spread_weights(torch.zeros(examples, dtype=dtype), dtype)
    plain = torch.cat([gradient, torch.zeros_like(gradient)], 1)
    weighted = plain * weights[owners.clamp_min(0), None]
    second = share * torch.cat([torch.zeros_like(gradient), gradient], 1)[row]
    plain[row] += second
    weighted[row] += weights[other] * second
    with pytest.raises(MixedError):
        owners_of(projected(weighted, 1), projected(plain, 1), weights, dtype)


@pytest.mark.parametrize("examples", [2, 20, 64])
def test_what_has_cancelled_has_an_owner(examples):
    """As behind a router's softmax, where little more than rounding is left; by a power of two nothing rounds anew."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(0, examples, (200,), generator=generator)
    gradient = 1 + 1e-6 * torch.randn(200, 50, generator=generator)
    outputs = torch.randn(200, 50, generator=generator).softmax(-1)
    weights = spread_weights(torch.zeros(examples), torch.float32)

    def backward(gradient: Tensor) -> Tensor:
        return projected(outputs * (gradient - (gradient * outputs).sum(-1, keepdim=True)), 1)

    found = owners_of(backward(weights[owners][:, None] * gradient), backward(gradient), weights, torch.float32)
    assert found.tolist() == owners.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("examples", [2, 9, 64, 200])
def test_weights_stay_apart_and_in_range(examples, dtype):
    weights = spread_weights(torch.zeros(examples, dtype=dtype), dtype)
    assert len(weights.unique()) == examples
    assert bool(((100 * weights).isfinite() & (0.01 * weights > 0)).all())


@given(st.integers(1, 6), st.data())
def test_a_grouping_keeps_every_row_with_its_example(examples, data):
    owners = torch.tensor(data.draw(st.lists(st.integers(-1, examples - 1), min_size=1, max_size=20)))
    rows = torch.arange(1.0, len(owners) + 1)
    grouped = Measured(owners, examples, 1)(rows)
    for example in range(examples):
        assert [r for r in grouped[example].tolist() if r] == rows[owners == example].tolist()
    start = data.draw(st.integers(0, len(owners) - 1))
    part = Measured(owners, examples, 1).part(start, len(owners))(rows[start:])
    assert sorted(r for r in part.flatten().tolist() if r) == rows[start:][owners[start:] >= 0].tolist()


@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_in_order_brings_each_examples_rows_together(examples, sizes, data):
    axis = data.draw(st.integers(0, len(sizes) - 1))
    sizes[axis] *= examples
    owner = (torch.arange(sizes[axis]) // (sizes[axis] // examples)).view(
        [-1 if d == axis else 1 for d in range(len(sizes))]
    )
    rows = owner.expand(sizes)[..., None] * torch.ones(2)
    grouped = InOrder(examples, axis, len(sizes))(rows)
    assert grouped.shape[0] == examples
    assert grouped.numel() == rows.numel()
    assert bool((grouped == torch.arange(examples)[:, None, None]).all())
