"""An index in the metric of K-FAC: what its rows are, what its questions are, and that nothing else is taken for it."""

from pathlib import Path

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution import metric
from gradsketch.attribution.build import Build, build_index
from gradsketch.attribution.metric import COORDINATES
from gradsketch.attribution.verify import verify_index
from gradsketch.errors import DamageError, FingerprintError, InputError, StoreError
from gradsketch.store.folder import open_folder

D, N = 128, 40
FACTORS = "factors-checkpoint-0.pt"


def build(path, **options):
    rows = options.pop("data", toys.texts(N))
    settings = {"d": D, "dtype": "float32", "shard_rows": 16, "progress": False, "precondition": "kfac"} | options
    return build_index(path, toys.TinyLM(), toys.language_task(), rows, **settings)


def sketches(texts, factors):
    model, task = toys.TinyLM().eval(), toys.language_task()
    phi = gs.BlockSum(gs.Parameters(model), D, coordinates=COORDINATES)
    return gs.sketch_gradients(model, task, task.collate(texts), phi, precondition=factors)


def formula(x, q, damping=1.0):
    x, q = (m.double() / m.double().norm(dim=-1, keepdim=True) for m in (x, q))
    f = x.T @ x / len(x)
    shift = damping * f.trace() / min(x.shape)
    return torch.linalg.solve(f + shift * torch.eye(len(f)).double(), q.T).T / len(x) @ x.T


def test_rows_and_questions_are_sketched_in_the_metric(tmp_path):
    index = build(tmp_path)
    factors = gs.Factors.load(tmp_path / FACTORS)
    assert factors.fingerprint == gs.kfac(toys.TinyLM().eval(), toys.language_task(), toys.texts(N)).fingerprint
    stored = torch.cat([shard.decoded() for shard in index.stores[0]])
    expected = sketches(toys.texts(N), factors)
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-4)
    questions = ["the number 7 squared is 49", "something else entirely"]
    exact = formula(stored, sketches(questions, factors))
    for found in (index, gs.Index.open(tmp_path, task=toys.language_task())):
        for query, row in zip(found.query(toys.TinyLM(), questions, k=4), exact, strict=True):
            assert [hit.row for hit in query.proponents] == row.topk(4).indices.tolist()
            scores = torch.tensor([hit.score for hit in query.proponents]).double()
            torch.testing.assert_close(scores, row.topk(4).values, rtol=1e-3, atol=1e-6)


def test_tokens_of_a_hit_add_up_to_its_score(tmp_path):
    index = build(tmp_path)
    hits = index.query(toys.TinyLM(), ["the number 7 squared is 49"], k=3, score="dot")
    for hit in index.explain(toys.TinyLM(), hits, top=3)[0].proponents:
        assert abs(hit.beyond_tokens) < 1e-3 * abs(hit.score)
        assert sum(token.value for token in hit.tokens) == pytest.approx(hit.score, rel=1e-3)


def test_each_checkpoint_has_its_own(tmp_path):
    states = [toys.TinyLM().state_dict(), {n: 1.5 * t for n, t in toys.TinyLM().state_dict().items()}]
    index = build(tmp_path, checkpoints=states)
    hashes = [store.manifest.facts["metric"]["hash"] for store in index.stores]
    assert len(set(hashes)) == 2
    assert len(index.query(toys.TinyLM(), toys.texts(1), k=3)[0].proponents) == 3


def test_an_index_of_another_metric_is_left_alone(tmp_path):
    build(tmp_path)
    for other in (None, "empirical-kfac"):
        with pytest.raises(FingerprintError, match="precondition"):
            build(tmp_path, precondition=other)
    with pytest.raises(InputError, match="precondition='shampoo'"):
        build(tmp_path / "new", precondition="shampoo")
    assert not (tmp_path / "new").exists()


def test_factors_that_were_made_before(tmp_path):
    model, task = toys.TinyLM().eval(), toys.language_task()
    given = gs.kfac(model, task, toys.texts(20), damping=0.03)
    index = build(tmp_path, precondition=given)
    assert index.stores[0].manifest.facts["metric"]["hash"] == given.fingerprint
    index.query(model, toys.texts(1))
    build(tmp_path, precondition=given)
    with pytest.raises(FingerprintError, match="damping"):
        build(tmp_path)  # estimated otherwise
    for wrong in ([given, given], []):
        with pytest.raises(InputError, match="1 checkpoints"):
            build(tmp_path / "new", precondition=wrong)


def test_the_metric_of_an_optimizer(tmp_path):
    model, task = toys.TinyLM().eval(), toys.language_task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for text in toys.texts(4):
        task.losses(model, task.collate([text])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    index = build(tmp_path, precondition=gs.adafactor(model, optimizer))
    assert index.description.precondition == "adafactor"
    hits = index.query(toys.TinyLM(), ["the number 7 squared is 49"], k=1, score="dot")
    assert hits[0][0].row == 7


def trained(steps=1):
    """The same class and shapes with other weights, and the optimizer that made them."""
    model, task = toys.TinyLM().eval(), toys.language_task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for text in toys.texts(steps):
        task.losses(model, task.collate([text])).sum().backward()
        optimizer.step()
    return model, optimizer


def test_factors_of_other_weights_are_refused(tmp_path):
    model, optimizer = trained()
    of_others = gs.kfac(model, toys.language_task(), toys.texts(20))
    for given in (of_others, gs.adafactor(model, optimizer)):
        with pytest.raises(FingerprintError, match="model"):
            build(tmp_path, precondition=given)
    own = gs.kfac(toys.TinyLM().eval(), toys.language_task(), toys.texts(20))
    states = {"first": toys.TinyLM().state_dict(), "last": model.state_dict()}
    with pytest.raises(FingerprintError, match="first"):
        build(tmp_path, checkpoints=states, precondition=[of_others, own])
    assert len(build(tmp_path / "new", checkpoints=states, precondition=[own, of_others]).stores) == 2


def test_other_factors_than_those_of_the_rows_are_refused(tmp_path):
    index = build(tmp_path)
    rows, model = toys.texts(N), toys.TinyLM().eval()
    gs.kfac(model, toys.language_task(), rows[:20]).save(tmp_path / FACTORS)
    index = gs.Index.open(tmp_path, task=toys.language_task())
    with pytest.raises(FingerprintError, match="metric"):
        index.query(model, rows[:1])
    with pytest.raises(FingerprintError, match="metric"):
        build(tmp_path)
    gs.kfac(model, toys.language_task(), rows, damping=0.3).save(tmp_path / FACTORS)
    with pytest.raises(FingerprintError, match="damping"):
        build(tmp_path)


def test_lost_factors_are_named_and_made_again(tmp_path):
    build(tmp_path)
    whole = (tmp_path / FACTORS).read_bytes()
    folder = open_folder(tmp_path)
    assert verify_index(folder).sound
    for damage, error in ((None, StoreError), (whole[:-40] + b"?" + whole[-39:], DamageError)):
        Path(tmp_path / FACTORS).unlink()
        if damage is not None:
            Path(tmp_path / FACTORS).write_bytes(damage)
        found = verify_index(folder)
        assert not found.sound
        assert FACTORS in str(found)
        with pytest.raises(error, match=FACTORS):
            gs.Index.open(tmp_path, task=toys.language_task()).query(toys.TinyLM(), toys.texts(1))
        build(tmp_path)  # the same bits on the same machine, so that the rows still fit
        assert verify_index(folder).sound


def test_a_run_that_goes_on_estimates_nothing_again(tmp_path, monkeypatch):
    build(tmp_path)
    first = build(tmp_path / "again").query(toys.TinyLM(), toys.texts(1), k=5)
    next((tmp_path / "checkpoint-0").glob("part-000000000016*")).unlink()

    def kfac(*_, **__):
        raise AssertionError("estimated again")

    monkeypatch.setitem(metric.METRICS, "kfac", (kfac, {}))
    hits = build(tmp_path).query(toys.TinyLM(), toys.texts(1), k=5)
    assert [(hit.row, hit.score) for hit in hits[0]] == [(hit.row, hit.score) for hit in first[0]]


def test_losses_that_are_no_log_probability_take_the_labels_of_the_data(tmp_path):
    def losses(model, batch):
        return (model(batch["x"]) - batch["labels"][:, None]).square().sum(1)

    data = toys.vectors(20)
    with pytest.raises(InputError, match="empirical"):
        build_index(tmp_path / "a", toys.classifier(), losses, data, d=32, precondition="kfac", progress=False)
    index = build_index(
        tmp_path / "b", toys.classifier(), losses, data, d=32, precondition="empirical-kfac", progress=False
    )
    assert index.stores[0].manifest.facts["metric"]["labels"] == "empirical"


def test_a_plan_counts_what_the_metric_costs(tmp_path):
    plan = Build(tmp_path, toys.TinyLM(), toys.language_task(), toys.texts(N), d=D, precondition="kfac").plan()
    assert plan.seconds > 0
    assert not list(tmp_path.iterdir())
