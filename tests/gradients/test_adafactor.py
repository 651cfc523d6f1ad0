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
