"""Walks through a model give what torch's own give, in the same order."""

import torch
from torch import nn

from gradsketch.walks import buffers_of, modules_of, parameters_of


def tied():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.BatchNorm1d(2), nn.Sequential(shared, nn.Linear(2, 2, bias=False)))
    model[2][1].weight = shared.weight
    model.register_module("absent", None)
    model.register_buffer("again", model[1].running_mean)
    model.register_parameter("none", None)
    model.append(model[1])
    return model


def test_everything_once_in_torchs_order():
    for model in (tied(), nn.Transformer(8, 2, 1, 1, 8), torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))):
        for found, wanted in (
            (modules_of(model), model.modules()),
            (parameters_of(model), model.parameters()),
            (buffers_of(model), model.buffers()),
        ):
            assert [id(x) for x in found] == [id(x) for x in wanted]
