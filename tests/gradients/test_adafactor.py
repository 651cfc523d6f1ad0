"""Factors of an optimizer's second moments: exact where these are of rank one, and for every vector."""

import pytest
import torch
from torch import nn

import gradsketch as gs
from gradsketch.errors import InputError


def stepped(model, optimizer, count=3):
    for _ in range(count):
        model(torch.randn(8, 6).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_a_product_is_that_of_one_step():
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), eps=1e-3))
    rank_one = (0.1 + torch.rand(4, 1).double()) * (0.1 + torch.rand(6).double())
    optimizer.state[model.weight]["exp_avg_sq"].copy_(rank_one)
    with torch.no_grad():  # so that (√v + ε)² is of rank one as well
        optimizer.param_groups[0]["eps"] = 0.0
    phi = gs.BlockSum(gs.Parameters(model), 28)  # as many numbers as parameters
    before = gs.adafactor(model, optimizer).before(phi)
    x, q = torch.randn(2, 28).double(), torch.randn(3, 28).double()
    corrected = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.9**3) for p in (model.weight, model.bias)]
    v = torch.cat([m.flatten() for m in corrected])
    torch.testing.assert_close(before.precondition(q) @ before.precondition(x).T, q @ (x / v.sqrt()).T)


def test_epsilon_counts_as_in_the_step():
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = stepped(model, torch.optim.Adam(model.parameters(), eps=0.7))
    optimizer.state[model.weight]["exp_avg_sq"].zero_()
    pair = gs.adafactor(model, optimizer).roots["weight"]
    torch.testing.assert_close(pair.rows.values[:, None] * pair.columns.values, torch.full((4, 6), 0.7**-0.5).double())


def test_an_optimizer_without_second_moments_is_refused():
    model = nn.Linear(6, 4).double()
    for optimizer in (torch.optim.Adam(model.parameters()), stepped(model, torch.optim.SGD(model.parameters(), 0.1))):
        with pytest.raises(InputError, match="second moments"):
            gs.adafactor(model, optimizer)


def test_the_largest_moments_count_where_the_step_takes_these():
    model = nn.Linear(6, 4).double()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), amsgrad=True, betas=(0.9, 0.5), eps=0.0))
    with torch.no_grad():
        optimizer.state[model.bias]["max_exp_avg_sq"].mul_(100)
    largest = optimizer.state[model.bias]["max_exp_avg_sq"] / (1 - 0.5**3)
    torch.testing.assert_close(gs.adafactor(model, optimizer).roots["bias"].columns.values, largest**-0.25)


def test_a_state_of_parameters_in_another_order_is_refused():
    """PyTorch hands a state dict on by places, and compares no shapes."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 6)).double()
    state = stepped(model, torch.optim.AdamW(model.parameters())).state_dict()
    named = dict(model.named_parameters())
    for order, words in (
        (("1.weight", "0.weight", "2.weight", "2.bias"), r"\[6, 4\] for '0.weight'"),
        (("0.weight", "2.bias", "2.weight", "1.weight"), r"\[6\] for '1.weight'"),
    ):
        other = torch.optim.AdamW([named[name] for name in order])
        other.load_state_dict(state)
        with pytest.raises(InputError, match=words):
            gs.adafactor(model, other)


def test_names_in_a_state_tell_equal_shapes_apart():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    state = stepped(model, torch.optim.AdamW(model.named_parameters())).state_dict()
    other = torch.optim.AdamW([*model[1].parameters(), *model[0].parameters()])
    other.load_state_dict(state)
    with pytest.raises(InputError, match=r"'1.weight' in the place of '0.weight'"):
        gs.adafactor(model, other)
    wrapped = nn.ModuleDict({"module": model})  # a wrapper puts something before all names
    inner = stepped(model, torch.optim.AdamW(wrapped.named_parameters()))
    assert set(gs.adafactor(model, inner).roots) == set(dict(model.named_parameters()))


def test_an_optimizer_of_another_kind_is_refused():
    transformers = pytest.importorskip("transformers")
    model = nn.Linear(6, 4).double()
    kinds = transformers.optimization.Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    optimizer = stepped(model, kinds)
    for parameters in (None, "bias"):
        with pytest.raises(InputError, match="Adafactor without second moments"):
            gs.adafactor(model, optimizer, parameters=parameters)


@pytest.mark.parametrize("change", ["no gradient", "nan", "no step"])
def test_moments_without_a_metric_are_refused(change):
    model = nn.Linear(6, 4).double()
    optimizer = stepped(model, torch.optim.Adam(model.parameters(), eps=0.0))
    state = optimizer.state[model.bias]
    if change == "no step":
        state["step"].zero_()
    else:
        state["exp_avg_sq"].fill_(0.0 if change == "no gradient" else float("nan"))
    with pytest.raises(InputError, match="factors of 'bias'"):
        gs.adafactor(model, optimizer)
