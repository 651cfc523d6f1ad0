"""Exact inner products: nothing of the passes stays behind."""

import gc
import weakref

import torch
from torch import nn

from gradsketch.gradients.gram import gradient_gram


def test_the_graph_is_freed():
    """Factors that were kept with their graph held the graph for ever, invisible to Python's collector."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    hidden = []

    def losses(model, batch):
        h = torch.tanh(model[0](batch["x"]))
        hidden.append(weakref.ref(h))
        return model[2](h).square().sum(1)

    gradient_gram(model, losses, {"x": torch.randn(3, 4)})
    gc.collect()
    assert hidden
    assert all(reference() is None for reference in hidden)


def test_gradients_formed_one_after_another_count_in_every_form():
    """As the transposed matrix and the entry of a stack, in a function that is run again on each example."""
    torch.manual_seed(0)
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.randn(shape).double()) for shape in ((2, 3), (4, 3, 2)))

    def losses(model, batch):
        return (torch.maximum(batch, model.a.T) * torch.maximum(batch, model.b[1])).sum((1, 2))

    batch = torch.randn(5, 3, 2).double()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, [model.a, model.b], retain_graph=True)])
        for one in losses(model, batch)
    ]
    want = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(gradient_gram(model, losses, batch), want)
