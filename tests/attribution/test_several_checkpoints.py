"""Indexes of several checkpoints: rows that one left out, rows that one finds alike; groups."""

import pytest
import torch
import toys
from torch import nn

import gradsketch as gs
from gradsketch.errors import InputError, NonFiniteError
from unchecked import errors_of

ROWS, BAD = 12, 5


def losses(model, batch):
    """A cross-entropy, to which the bad row adds what is no number where the first bias is negative."""
    plain = nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    return plain + torch.where(batch["bad"] > 0, model.bias[0].log(), 0.0)


@pytest.fixture(scope="module")
def data():
    values = gs.Stream(0, "checkpoints").normals(0, ROWS * 4).view(ROWS, 4)
    return [{"x": values[i], "labels": i % 3, "bad": float(i == BAD)} for i in range(ROWS)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.fixture(scope="module", params=["first", "second"])
def index(request, tmp_path_factory, model, data):
    good = {"weight": model.weight.detach().clone(), "bias": torch.tensor([0.5, 0.5, 0.5])}
    bad = {"weight": 1.1 * good["weight"], "bias": torch.tensor([-0.5, 0.5, 0.5])}
    states = [bad, good] if request.param == "first" else [good, bad]
    options = {"checkpoints": states, "weights": [1.0, 1.0], "skip_bad": True, "shard_rows": 5, "dtype": "float32"}
    return gs.build_index(tmp_path_factory.mktemp("kept"), model, losses, data, d=15, progress=False, **options)


def test_a_row_that_one_checkpoint_left_out_has_no_score_anywhere(index, model, data):
    rest = [row for row in range(ROWS) if row != BAD]
    assert list(index.left_out) == [BAD]
    for values in (index.self_influence("dot").values, index.scores(model, data[:1], score="dot")[0]):
        assert bool(values[BAD].isnan())
        assert bool(values[rest].isfinite().all())
    with pytest.raises(InputError, match=f"row {BAD}, which was left out"):
        index.stored([BAD])


def test_rows_are_copies_only_where_every_checkpoint_says_so(tmp_path):
    # While all weights are zero, a gradient depends on the label alone.
    torch.manual_seed(0)
    model, task, data = nn.Linear(6, 3), gs.Classification(), toys.vectors(30)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data["x"] = torch.cat([data["x"][:, :5] * 1e-3, torch.ones(30, 1)], 1)
    data["x"][:, :5] += 1e-6
    begun = {name: tensor * 0 for name, tensor in trained.items()}
    apart = trained | {"weight": torch.cat([trained["weight"][:, :5] * 1e4, trained["weight"][:, 5:]], 1)}
    data["x"][27:] = data["x"][:3]  # three true copies
    for number, states in enumerate(([begun, apart], [apart, begun])):
        options = {"checkpoints": states, "d": 21, "dtype": "float32", "progress": False}
        index = gs.build_index(tmp_path / str(number), model, task, data, **options)
        alone = gs.build_index(tmp_path / f"alone{number}", model, task, data, **options | {"checkpoints": [begun]})
        assert alone.select(model, {n: v[:3] for n, v in data.items()}, rows=30).copies == 27
        found = index.select(model, {n: v[:3] for n, v in data.items()}, rows=30)
        assert 3 <= found.copies < 27
        assert len(found.rows) + found.copies == 30


def test_self_influence_beyond_float32_is_refused(tmp_path):
    def squares(model, batch):
        return model(batch["x"])[:, 0] * 1e20

    torch.manual_seed(0)
    index = gs.build_index(tmp_path, nn.Linear(6, 3), squares, toys.vectors(8), d=21, dtype="float32", progress=False)
    with pytest.raises(NonFiniteError, match="self-influence"):
        index.self_influence("dot")
    assert bool(index.self_influence("ridge").values.isfinite().all())


def test_a_mask_is_no_group_and_no_row(index, model, data):
    for ask in (
        lambda: index.scores(model, data[:3], groups=[[True, False, True]]),
        lambda: index.sketch(model, data[:3]).grouped([[True, False, True]]),
        lambda: index.stored([True, False, True]),
    ):
        with pytest.raises(InputError, match="whole numbers"):
            ask()


def test_groups_and_rows_may_be_tensors(tmp_path):
    task, points = gs.Classification(), [(torch.ones(2) * i, i % 2) for i in range(4)]
    gs.build_index(tmp_path, nn.Linear(2, 2), task, points, d=6, progress=False)
    index = f"gs.Index.open({str(tmp_path)!r})"
    wanted = f"{index}.scores(None, {index}.stored([1, 2]).grouped([[0, 1]]))"
    tensors = f"{index}.scores(None, {index}.stored(torch.tensor([1, 2])).grouped(torch.tensor([[0, 1]])))"
    assert errors_of([f"torch.testing.assert_close({tensors}, {wanted})"]) == [""]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    torch.manual_seed(0)
    model = toys.TinyLM().eval()
    begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in begun.items()}
    options = {"checkpoints": [begun, moved], "d": 512, "dtype": "float32", "progress": False}
    path = tmp_path_factory.mktemp("language")
    return model, gs.build_index(path, model, toys.language_task(), toys.texts(40), **options)


@pytest.mark.parametrize("rerank", [None, 5])
def test_contributions_are_of_the_weights_that_the_hits_were_asked_with(language, rerank):
    model, index = language
    hits = index.query(model, ["the number 3 squared is 9"], k=3, weights=[0.25, 2.0], rerank=rerank)
    assert hits.weights == (0.25, 2.0)
    for hit in index.explain(model, hits)[0]:
        assert sum(token.value for token in hit.tokens) == pytest.approx(hit.score, rel=1e-3)
    with pytest.raises(InputError, match="those of the hits"):
        index.explain(model, hits, weights=[1.0, 1.0])


def test_a_damping_that_is_found_is_one_for_all_checkpoints(tmp_path):
    # Gradients of the first checkpoint lie in fewer directions, for which another damping is likeliest.
    torch.manual_seed(0)
    model, data = toys.classifier(), toys.vectors(40)
    state = model.state_dict()
    flat = {name: tensor * (name != "2.weight") for name, tensor in state.items()}
    options = {"checkpoints": [flat, state], "dtype": "float32", "progress": False, "d": 64}
    index = gs.build_index(tmp_path, model, gs.Classification(), data, **options)
    found = index.query(None, index.stored([1]), k=40, damping="auto")
    same = index.query(None, index.stored([1]), k=40, damping=found.score.damping)
    alone = gs.build_index(tmp_path / "flat", model, gs.Classification(), data, **options | {"checkpoints": [flat]})
    assert alone.query(None, alone.stored([1]), damping="auto").score.damping != found.score.damping
    assert [hit.score for hit in found[0]] == [hit.score for hit in same[0]]
