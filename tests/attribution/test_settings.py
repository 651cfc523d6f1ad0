"""What a model computes by numbers in none of its tensors: told where an index holds no texts to try it on."""

import warnings

import pytest
import torch
import toys
from torch import nn

import gradsketch as gs
from gradsketch.errors import GradsketchWarning


class Tempered(nn.Module):
    """A classifier with a temperature, scales by name, a counter of its calls, and dropout."""

    def __init__(self):
        super().__init__()
        self.net, self.dropout, self.head = toys.classifier(), nn.Dropout(0.1), nn.Linear(3, 3)
        self.head.temperature = 2.0
        self.scaling, self.calls, self.attention_dropout, self.name = {"default": 1.0}, 0, 0.1, "mine"

    def forward(self, x):
        self.calls += 1
        return self.head(self.dropout(self.net(x))) / self.head.temperature * self.scaling["default"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tempered")
    gs.build_index(path, tempered(), gs.Classification(), toys.vectors(16), d=32, progress=False)
    return path


def tempered():
    torch.manual_seed(0)
    return Tempered()


def ask(path, model):
    """Ask once, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradsketchWarning)
        index = gs.Index.open(path, task=gs.Classification())
        index.query(model, {n: v[:2] for n, v in toys.vectors(16).items()}, k=1)
    return [str(warning.message) for warning in caught if issubclass(warning.category, GradsketchWarning)]


def test_the_same_model_is_asked_without_a_word(path):
    model = tempered()
    model.calls = 100  # questions change it, so it tells nothing
    model.dropout.p, model.attention_dropout = 0.5, 0.5  # nothing in evaluation mode
    model.name, model.new = "yours", 3.0
    assert ask(path, model) == []


@pytest.mark.parametrize("change", [
    lambda model: setattr(model.head, "temperature", 1.0), lambda model: model.scaling.update(default=4.0),
])  # fmt: skip
def test_another_number_is_told(path, change):
    model = tempered()
    change(model)
    (told,) = ask(path, model)
    assert "is not what it was when the index was built" in told
    assert "head.temperature is 1.0 now" in told or "scaling is {'default': 4.0} now" in told
