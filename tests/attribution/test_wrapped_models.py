"""A compiled model, or one for several devices, is the model inside: for a build, a question and an explanation."""

import pytest
import torch
import toys
from torch import nn

import gradsketch as gs

QUESTION = ["the number 3 squared is 9"]
WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
}


def model():
    torch.manual_seed(0)
    return toys.TinyLM().eval()


@pytest.fixture(scope="module", params=WRAPPERS)
def index(request, tmp_path_factory):
    built, wrapped = WRAPPERS[request.param], WRAPPERS[request.param](model())
    moved = {name: tensor * 1.5 for name, tensor in wrapped.state_dict().items()}
    path, options = tmp_path_factory.mktemp(request.param), {"d": 256, "dtype": "float32", "progress": False}
    options["checkpoints"] = [{n: t.clone() for n, t in wrapped.state_dict().items()}, moved]
    return gs.build_index(path, built(model()), toys.language_task(), toys.texts(20), **options)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    path, options = tmp_path_factory.mktemp("wanted"), {"d": 256, "dtype": "float32", "progress": False}
    state = model().state_dict()
    states = [state, {name: tensor * 1.5 for name, tensor in state.items()}]
    built = gs.build_index(path, model(), toys.language_task(), toys.texts(20), checkpoints=states, **options)
    return built.scores(model(), QUESTION)


@pytest.mark.parametrize("asked", WRAPPERS)
def test_a_wrapped_model_is_the_model_inside(index, scores, asked):
    wrapped = WRAPPERS[asked](model())
    torch.testing.assert_close(index.scores(wrapped, QUESTION), scores)
    for rerank in (None, 3):
        hits = index.query(wrapped, QUESTION, k=2, rerank=rerank)
        for hit in index.explain(wrapped, hits)[0]:
            assert sum(token.value for token in hit.tokens) == pytest.approx(hit.score, rel=1e-3)
