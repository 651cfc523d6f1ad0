"""Candidates that are scored again by whole gradients, against scores written out in float64."""

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution import rerank
from gradsketch.attribution.build import build_index
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.per_example.directions import Directions

N = 40
QUESTIONS = ["the number 7 squared is 49", "something else entirely"]


def build(path, **options):
    rows = options.pop("data", toys.texts(N))
    settings = {"d": 16, "dtype": "float32", "shard_rows": 16, "progress": False} | options
    return build_index(path, toys.TinyLM(), toys.language_task(), rows, **settings)


def flat(model, texts):
    model.eval()
    task, rows = toys.language_task(), []
    for text in texts:
        loss = task.losses(model, task.collate([text])).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def formula(model, questions, *, rows=None, damping=0.001):
    """Scores [questions, rows] by EK-FAC, whose inverse has tests of its own."""
    rows = toys.texts(N) if rows is None else rows
    inverse = gs.inverse_fisher(model.eval(), toys.language_task(), rows, damping=damping)
    return inverse(flat(model, questions)) @ flat(model, rows).T / len(rows)


def check(query, expected, *, k):
    assert [hit.row for hit in query.proponents] == expected.topk(k).indices.tolist()
    scores = torch.tensor([hit.score for hit in query.proponents])
    torch.testing.assert_close(scores, expected.topk(k).values, rtol=1e-3, atol=1e-6)


def test_all_rows_again_are_ranked_by_ekfac(tmp_path):
    index, model = build(tmp_path), toys.TinyLM()
    hits = index.query(model, QUESTIONS, k=4, opponents=3, rerank=N)
    assert hits.score.name == "ekfac"
    assert hits.score.damping == 0.001
    assert hits.cost.rerank > 0
    for query, row in zip(hits, formula(toys.TinyLM(), QUESTIONS), strict=True):
        check(query, row, k=4)
        assert [hit.row for hit in query.opponents] == (-row).topk(3).indices.tolist()
    again = index.query(model, QUESTIONS, k=4, opponents=3, rerank=N)  # the estimate is kept
    assert [hit.score for hit in again[0]] == [hit.score for hit in hits[0]]


def test_another_damping_takes_the_same_estimate(tmp_path, monkeypatch):
    index, model, questions = build(tmp_path), toys.TinyLM(), QUESTIONS
    fresh = build(tmp_path).query(model, questions, k=4, rerank=N, damping=0.01)
    index.query(model, questions, k=4, rerank=N)
    monkeypatch.setattr(rerank, "inverse_fisher", None)
    again = index.query(model, questions, k=4, rerank=N, damping=0.01)
    assert again.score.damping == 0.01
    assert [hit.score for hit in again[0]] == [hit.score for hit in fresh[0]]
    for wrong in (0.0, -1.0, float("nan"), 1e45):
        with pytest.raises(InputError, match="damping"):
            index.query(model, questions, k=4, rerank=N, damping=wrong)


def test_only_the_candidates_of_the_sketches_are_ranked(tmp_path):
    index, few = build(tmp_path), 6
    found = index.query(toys.TinyLM(), QUESTIONS, k=few)
    hits = index.query(toys.TinyLM(), QUESTIONS, k=3, rerank=few)
    for before, query, row in zip(found, hits, formula(toys.TinyLM(), QUESTIONS), strict=True):
        rows = sorted(hit.row for hit in before.proponents)
        best = [rows[i] for i in row[rows].topk(3).indices.tolist()]
        assert [hit.row for hit in query.proponents] == best
        assert [hit.rank for hit in query.proponents] == [1, 2, 3]


def test_a_group_asks_with_its_mean_and_a_condition_holds(tmp_path):
    rows = [{"text": text, "even": i % 2 == 0} for i, text in enumerate(toys.texts(N))]
    index = build(tmp_path, data=rows)
    hits = index.query(toys.TinyLM(), QUESTIONS, k=3, rerank=N, groups=[[0, 1]], where={"even": True})
    mean = formula(toys.TinyLM(), QUESTIONS).mean(0)[::2]
    assert [hit.row for hit in hits[0].proponents] == (2 * mean.topk(3).indices).tolist()


def test_checkpoints_add_up_with_their_weights(tmp_path):
    first, second = toys.TinyLM(), toys.TinyLM()
    with torch.no_grad():
        second.head.weight.mul_(-0.5)
    states = [{n: t.clone() for n, t in m.state_dict().items()} for m in (first, second)]
    index = build(tmp_path, checkpoints=states, weights=[2.0, 0.5])
    model = toys.TinyLM()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    hits = index.query(model, QUESTIONS, k=4, rerank=N)
    expected = 2.0 * formula(first, QUESTIONS) + 0.5 * formula(second, QUESTIONS)
    for query, row in zip(hits, expected, strict=True):
        check(query, row, k=4)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_tokens_add_up_to_an_exact_score(tmp_path):
    index = build(tmp_path)
    hits = index.query(toys.TinyLM(), QUESTIONS, k=2, opponents=1, rerank=N)
    for query in index.explain(toys.TinyLM(), hits, top=2):
        for hit in (*query.proponents, *query.opponents):
            assert abs(hit.beyond_tokens) < 1e-3 * abs(hit.score)


def vector_index(path, count=20):
    data, model = toys.vectors(count), toys.classifier()
    index = build_index(path, model, toys.vector_task(), data, d=16, progress=False)
    losses = toys.vector_task().losses(model, data)
    parts = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    gradients = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])
    return index, model, data, {name: values[:1] for name, values in data.items()}, gradients


def test_gauss_newton_by_conjugate_gradients(tmp_path):
    index, model, data, question, gradients = vector_index(tmp_path)
    hits = index.query(model, question, k=20, rerank=20, exact="gauss-newton", damping=0.5, data=data)
    dense = gs.gauss_newton(model, toys.vector_task(), data).dense()
    shift = 0.5 * float(dense.trace()) / len(dense) * torch.eye(len(dense)).double()
    expected = torch.linalg.solve(dense + shift, gradients[0].double()) @ gradients.double().T / 20
    scores = {hit.row: hit.score for hit in hits[0]}
    found = torch.tensor([scores[row] for row in range(20)]).double()
    # λ comes from the mean eigenvalue of eight random vectors, which is not that of the whole matrix.
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.99


def test_products_that_are_wrong_are_told(tmp_path, monkeypatch):
    right = Directions.add_outer

    def wrong(self, out, name, left, right_side):
        right(self, out, name, 1.02 * left, right_side)

    index, model = build(tmp_path), toys.TinyLM()
    index.query(model, QUESTIONS, k=2, rerank=N)
    monkeypatch.setattr(Directions, "add_outer", wrong)
    # Products of this kind were held against whole gradients above; now one row is, at every question.
    with pytest.warns(GradsketchWarning, match="row 0: its products with whole gradients are off by"):
        index.query(model, QUESTIONS, k=2, rerank=N)
    with pytest.raises(InputError, match="rows that differ"):
        index.query(toys.TinyLM(), QUESTIONS, k=2, rerank=N)


def test_an_inverse_that_did_not_settle_is_told(tmp_path):
    index, model, data, question, _ = vector_index(tmp_path)
    with pytest.warns(GradsketchWarning, match="conjugate gradients left"):
        index.query(model, question, k=3, rerank=20, exact="gauss-newton", damping=1e-12, data=data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rerank": 0}, "rerank=0"),
        ({"rerank": 5, "exact": "kronecker"}, "exact='kronecker'"),
        ({"rerank": 5, "damping": "auto"}, "damping='auto'"),
    ],
    ids=["no rows", "unknown", "auto"],
)
def test_what_cannot_be_is_refused(tmp_path, options, words):
    index = build(tmp_path)
    with pytest.raises(InputError, match=words):
        index.query(toys.TinyLM(), QUESTIONS, **options)


@pytest.mark.parametrize("which", ["all", "none of the candidates"])
def test_other_data_leave_no_estimate_behind(tmp_path, which):
    """What was estimated is kept for later queries; rows of other data must not get into it."""
    index, model, data, question, _ = vector_index(tmp_path / "index")
    right = index.query(model, question, k=5, rerank=5, data=data)
    other = torch.ones(20, dtype=torch.bool)
    if which != "all":
        other[[hit.row for hit in right[0]]] = False
    wrong = {"x": torch.where(other[:, None], 9 * data["x"].flip(0), data["x"]), "labels": data["labels"]}
    again = gs.Index.open(tmp_path / "index", task=toys.vector_task())
    with pytest.raises(InputError, match="with which it was indexed"):
        again.query(model, question, k=5, rerank=5, data=wrong)
    scores = [hit.score for hit in again.query(model, question, k=5, rerank=5, data=data)[0]]
    assert scores == [hit.score for hit in right[0]]


def test_other_data_are_told_also_where_the_first_checkpoint_does_not_count(tmp_path):
    """The losses of the rows were stored at the first one."""
    model, data = toys.classifier(), toys.vectors(20)
    states = [{name: scale * value for name, value in model.state_dict().items()} for scale in (1.0, 1.5)]
    index = build_index(tmp_path, model, toys.vector_task(), data, d=16, checkpoints=states, progress=False)
    question, options = (
        {name: values[:1] for name, values in data.items()},
        {"k": 3, "rerank": 5, "weights": [0.0, 1.0]},
    )
    wrong = {"x": 9 * data["x"].flip(0), "labels": data["labels"]}
    with pytest.raises(InputError, match="with which it was indexed"):
        index.query(model, question, data=wrong, **options)
    assert len(index.query(model, question, data=data, **options)[0].proponents) == 3


def test_nothing_to_rank_is_no_hit(tmp_path):
    index = build(tmp_path)
    for exact in ("ekfac", "gauss-newton"):
        hits = index.query(toys.TinyLM(), QUESTIONS, k=3, rerank=6, exact=exact, where=lambda record: False)
        assert [len(query.proponents) for query in hits] == [0, 0]


def test_every_kind_takes_a_model_in_training_mode(tmp_path):
    """It has dropout, and is used in evaluation mode as it is everywhere else."""
    index = build(tmp_path)
    for exact in ("ekfac", "gauss-newton"):
        options = {"k": 3, "rerank": 6, "exact": exact, "damping": 3.0}
        training = toys.TinyLM().train()
        one, other = (index.query(model, QUESTIONS, **options) for model in (training, toys.TinyLM().eval()))
        assert [[hit.score for hit in query] for query in one] == [[hit.score for hit in query] for query in other]
        assert training.dropout.training


def test_rows_that_are_no_texts_need_the_data(tmp_path):
    index, model, data, question, gradients = vector_index(tmp_path)
    with pytest.raises(InputError, match="data="):
        index.query(model, question, k=3, rerank=20)
    hits = index.query(model, question, k=20, rerank=20, data=data)
    inverse = gs.inverse_fisher(model, toys.vector_task(), data, damping=0.001)
    check(hits[0], inverse(gradients[0]) @ gradients.T / 20, k=20)
