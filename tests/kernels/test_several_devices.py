"""Layers spread over two devices, as accelerate's device_map spreads them, give the numbers of one device."""

import pytest
import torch
from torch import nn

import gradsketch as gs
from gradsketch.attribution.build import build_index
from gradsketch.attribution.index import Index
from gradsketch.gradients.per_example.sketcher import _Sketches
from kernels.pretend_device import bare, moved, pretend_device

TASK = gs.Classification()
ROWS = [(torch.randint(0, 11, (4,), generator=torch.Generator().manual_seed(i)), i % 5) for i in range(20)]
ASKED = ROWS[:3]


class Spread(nn.Module):
    """The first layers on one device and the last on another; what comes out is where the input was."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first = nn.Embedding(11, 8), nn.Linear(8, 16)
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        hidden = torch.relu(self.first(self.embed(x))).to(self.last.weight.device)
        return self.last(self.norm(hidden).mean(1)).to(x.device)


def spread():
    model = Spread()
    moved(model.norm)
    moved(model.last)
    return model


def sketches(**options):
    def job(model):
        return gs.sketch_gradients(model, TASK, TASK.collate(ROWS), gs.BlockSum(gs.Parameters(model), 64), **options)

    return job


def sketches_of_whole_gradients(model):
    parameters = gs.Parameters(model)
    return gs.sketch_gradients(
        model, TASK, TASK.collate(ROWS), gs.AFFD(parameters.n, 64), parameters=parameters, method="outer"
    )


def losses(model):
    sketched = gs.GradientSketcher(model, TASK, gs.BlockSum(gs.Parameters(model), 64))(TASK.collate(ROWS))
    return sketched.losses + sketched.values.sum(1)


def preconditioned(model):
    return sketches(precondition=gs.ekfac(model, TASK, ROWS))(model)


def gram(model):
    return gs.gradient_gram(model, TASK, TASK.collate(ROWS))


def product(kind):
    def job(model):
        operator = kind(model, TASK, ROWS)
        return operator(torch.randn(operator.n, generator=torch.Generator().manual_seed(0)))

    return job


def hits(tmp_path, precondition=None, **options):
    def job(model):
        folder = tmp_path / str(next(model.last.parameters()).device)
        build_index(folder, model, TASK, ROWS, d=64, dtype="float32", progress=False, precondition=precondition)
        found = Index.open(folder, task=TASK).query(model, ASKED, k=5, **options)
        return torch.tensor([[hit.score for hit in hits] for hits in found])

    return job


def same(job):
    want = job(Spread())
    with pretend_device():
        came = bare(job(spread()))
    torch.testing.assert_close(came, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


JOBS = {
    "sketches": sketches(method="outer"),
    "implicit": sketches(method="implicit"),
    "one by one": sketches(method="loop"),
    "whole gradients": sketches_of_whole_gradients,
    "losses": losses,
    "ekfac": preconditioned,
    "gram": gram,
    "hessian": product(gs.hessian),
    "gauss_newton": product(gs.gauss_newton),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_numbers_are_those_of_one_device(job):
    same(job)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "ridge"},
        {"score": "influence", "precondition": "kfac"},
        {"exact": "ekfac", "rerank": 10, "data": ROWS},
    ],
    ids=["ridge", "kfac", "reranked"],
)
def test_an_index_answers_as_of_one_device(tmp_path, options):
    same(hits(tmp_path, **options))


def test_a_subspace_says_that_it_wants_one_device():
    with pretend_device():
        model = spread()
        parameters = gs.Parameters(model)
        with pytest.raises(gs.InputError, match="parameters on one device"):
            gs.Subspace(model, parameters, gs.AFFD(parameters.n, 16))


def test_a_device_whose_share_is_lost_is_seen(monkeypatch):
    """Each device adds up what it holds; a row that is only the first one's is held against the whole gradient."""

    def only_the_first(self):
        for at, out in self.outs.items():
            self.phi.add_vectors(out, self.vectors[at])
        return next(iter(self.outs.values()))

    monkeypatch.setattr(_Sketches, "result", only_the_first)
    with pretend_device(), pytest.raises(gs.InputError, match="rows that differ"):
        sketches()(spread())
