"""Exact inner products: nothing of the passes stays behind."""

import gc
import weakref

import torch

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
