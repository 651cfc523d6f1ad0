"""Questions: scores against their formulas, refusals, filters, groups, explanations."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution.build import build_index
from gradsketch.attribution.index import Index
from gradsketch.attribution.scoring import Scorer
from gradsketch.errors import FingerprintError, GradsketchWarning, InputError, StoreError
from unchecked import errors_of

D, N = 128, 40
KINDS = ("ridge", "influence", "cosine", "dot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An index of sentences with metadata, in float32 so that formulas hold to rounding."""
    path = tmp_path_factory.mktemp("index")
    rows = [{"text": text, "parity": i % 2, "kind": f"k{i % 5}"} for i, text in enumerate(toys.texts(N))]
    build_index(path, toys.TinyLM(), toys.language_task(), rows, d=D, dtype="float32", shard_rows=16, progress=False)
    return path


@pytest.fixture
def index(folder):
    return Index.open(folder, task=toys.language_task())


def matrices(index, queries):
    """Sketches of rows and queries in float64."""
    x = torch.cat([shard.decoded() for shard in index.stores[0]]).double()
    model, task = toys.TinyLM().eval(), toys.language_task()
    phi = gs.BlockSum(gs.Parameters(model), D)
    q = torch.cat([gs.sketch_gradients(model, task, task.collate([t]), phi, method="loop") for t in queries]).double()
    return x, q


def formula(kind, x, q, damping=1.0):
    if kind in ("ridge", "cosine"):
        x, q = (m / m.norm(dim=-1, keepdim=True) for m in (x, q))
    if kind in ("ridge", "influence"):
        f = x.T @ x / len(x)
        shift = damping * f.trace() / min(x.shape)
        q = torch.linalg.solve(f + shift * torch.eye(len(f)).double(), q.T).T / len(x)
    return q @ x.T


QUERIES = ["the number 7 squared is 49", "something else entirely", "1 2 3"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_their_formulas(index, kind):
    exact = formula(kind, *matrices(index, QUERIES))
    hits = index.query(toys.TinyLM(), QUERIES, k=5, opponents=3, score=kind)
    scale = float(exact.abs().max())
    for query, row in zip(hits, exact, strict=True):
        best, worst = row.sort(descending=True), row.sort()
        assert [hit.row for hit in query.proponents] == best.indices[:5].tolist()
        assert [hit.row for hit in query.opponents] == worst.indices[:3].tolist()
        found = torch.tensor([hit.score for hit in query.proponents]).double()
        torch.testing.assert_close(found, best.values[:5], rtol=0, atol=1e-4 * scale)
        found = torch.tensor([hit.score for hit in query.opponents]).double()
        torch.testing.assert_close(found, worst.values[:3], rtol=0, atol=1e-4 * scale)
    assert hits.score.name == kind
    assert hits.score.damping == (1.0 if kind in ("ridge", "influence") else None)


def test_a_hit_says_everything_about_its_row(index):
    hit = index.query(toys.TinyLM(), "the number 7 squared is 49", k=1)[0][0]
    assert (hit.rank, hit.row, hit.id, hit.text) == (1, 7, "7", "the number 7 squared is 49")
    assert hit.metadata == {"parity": 1, "kind": "k2"}
    assert hit.loss > 0
    assert hit.gradient_norm > 0
    assert hit.score > 0


def test_metadata_is_what_the_text_does_not_show(tmp_path):
    """A column called source is metadata, unless it is the input."""
    rows = [{"prompt": f"square {i}:", "answer": f" {i * i}", "source": "table", "n": None} for i in range(3)]
    model, task = toys.TinyLM(), toys.language_task()
    hit = build_index(tmp_path, model, task, rows, d=D, progress=False).query(model, rows[:1], k=1)[0][0]
    assert (hit.text, hit.metadata) == ("square 0: 0", {"source": "table", "n": None})


def test_the_sign_is_that_of_a_gradient_step():
    """Training on the strongest proponent lowers the query's loss, on the strongest opponent raises it."""
    model, task, data = toys.classifier(), toys.vector_task(), toys.vectors(60)
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        index = build_index(path, model, task, data, d=90, progress=False)
        query = {name: values[:1] for name, values in data.items()}
        hits = index.query(model, query, k=1, opponents=1, score="dot")[0]
    for hit, direction in ((hits.proponents[0], -1), (hits.opponents[0], 1)):
        stepped = copy.deepcopy(model)
        batch = {name: values[hit.row : hit.row + 1] for name, values in data.items()}
        before = float(task.losses(stepped, query))
        parts = torch.autograd.grad(task.losses(stepped, batch).sum(), list(stepped.parameters()))
        with torch.no_grad():
            for parameter, part in zip(stepped.parameters(), parts, strict=True):
                parameter -= 1e-3 * part
        assert (float(task.losses(stepped, query)) - before) * direction > 0
        assert hit.score * direction < 0


@pytest.mark.parametrize("kind", KINDS)
def test_more_hits_than_rows(index, kind):
    hits = index.query(toys.TinyLM(), QUERIES[:1], k=1000, opponents=1000, score=kind)[0]
    assert sorted(hit.row for hit in hits.proponents) == list(range(N))
    assert [hit.row for hit in hits.proponents] == [hit.row for hit in reversed(hits.opponents)]
    assert [hit.rank for hit in hits.proponents] == list(range(1, N + 1))


class TestFilters:
    def test_by_value_values_and_function(self, index):
        model = toys.TinyLM()
        rows = lambda where: {h.row for h in index.query(model, QUERIES[0], k=N, where=where)[0]}  # noqa: E731
        assert rows({"parity": 1}) == set(range(1, N, 2))
        assert rows({"parity": 0, "kind": ["k1", "k3"]}) == {i for i in range(0, N, 2) if i % 5 in (1, 3)}
        assert rows({"id": "3"}) == {3}
        assert rows(lambda record: record["text"].endswith("9")) == {3, 7, 13, 17, 23, 27, 33, 37}
        assert rows({"kind": "absent"}) == set()

    def test_an_unknown_column_is_named(self, index):
        with pytest.raises(InputError, match=r"'colour'.*parity"):
            index.query(toys.TinyLM(), QUERIES, where={"colour": 1})

    @pytest.mark.parametrize(
        "where",
        [
            {"parity": "1"},
            {"parity": True},
            {"parity": 0.5},
            {"parity": float("inf")},
            {"parity": float("nan")},
            {"kind": 3},
            {"id": 3},
            {"kind": []},
        ],
    )
    def test_a_condition_that_no_row_can_meet_is_told(self, index, where):
        with pytest.raises(InputError, match="no row can meet"):
            index.query(toys.TinyLM(), QUERIES, where=where)
        assert len(index.query(toys.TinyLM(), QUERIES[0], where={"parity": [1.0, None, torch.tensor(1)]})[0])


def test_a_number_of_hits_that_is_none(folder):
    wrong = [("k", k) for k in (1.5, "3", True, 0, None)] + [("opponents", True), ("opponents", -1), ("coarse", 2.0)]
    asked = [f"gs.Index.open({str(folder)!r}).query(None, None, {name}={value!r})" for name, value in wrong]
    for (name, value), said in zip(wrong, errors_of(asked), strict=True):
        assert said.startswith(f"InputError: {name}={value!r}. Wanted: an integer, at least"), said


class TestSmallGradients:
    """A question's loss times any number has the same cosines, down to where float32 has no direction left."""

    @pytest.fixture(scope="class")
    def asked(self, tmp_path_factory):
        torch.manual_seed(3)
        model, x = torch.nn.Linear(8, 4), torch.randn(30, 8)
        loss = gs.Function(lambda m, b: torch.nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none") * b["w"])
        data = [{"x": x[i], "y": torch.tensor(i % 4), "w": torch.ones(())} for i in range(30)]
        index = build_index(tmp_path_factory.mktemp("w"), model, loss, data, d=36, dtype="float32", progress=False)

        def asked(weight, kind):
            question = [dict(data[0], w=torch.tensor(weight))]
            return [(h.row, h.score) for h in index.query(model, question, k=3, score=kind)[0]]

        return asked

    @pytest.mark.parametrize("kind", ["cosine", "ridge"])
    @pytest.mark.parametrize("weight", [1e-18, 1e-22, 1e-24, 1e18, 1e20])
    def test_scores_do_not_depend_on_the_size(self, asked, kind, weight):
        for (row, score), (right, expected) in zip(asked(weight, kind), asked(1.0, kind), strict=True):
            assert row == right
            assert score == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("kind", ["cosine", "ridge"])
    @pytest.mark.parametrize("weight", [0.0, 1e-38, 1e-44])
    def test_no_direction_is_refused(self, asked, kind, weight):
        with pytest.raises(InputError, match="query 0, whose gradient has the norm"):
            asked(weight, kind)
        assert len(asked(weight, "dot")) == 3


def test_a_group_scores_the_mean_of_its_members(index):
    model = toys.TinyLM()
    alone = index.query(model, QUERIES, k=N)
    grouped = index.query(model, QUERIES, k=N, groups=[[0, 2], [1]])
    scores = [{hit.row: hit.score for hit in query} for query in alone]
    for hit in grouped[0]:
        assert hit.score == pytest.approx((scores[0][hit.row] + scores[2][hit.row]) / 2, abs=1e-5)
    assert [hit.row for hit in grouped[1]] == [hit.row for hit in alone[1]]
    assert grouped[0].members == 2
    assert "1 more" in grouped[0].text
    for groups in ([], [[]], [[5]]):
        with pytest.raises(InputError, match="groups"):
            index.query(model, QUERIES, groups=groups)


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_give_exact_scores(index, kind):
    """With fewer rows than candidates the coarse stage cannot lose any."""
    model = toys.TinyLM()
    one = index.query(model, QUERIES, k=6, opponents=2, score=kind)
    two = index.query(model, QUERIES, k=6, opponents=2, score=kind, coarse=32)
    for a, b in zip(one, two, strict=True):
        for x, y in zip((*a.proponents, *a.opponents), (*b.proponents, *b.opponents), strict=True):
            assert x.row == y.row
            assert x.score == pytest.approx(y.score, rel=1e-4, abs=1e-6)


def test_checkpoints_add_up(tmp_path):
    """TracIn: the score is the weighted sum of the checkpoints' scores, each with its own preconditioner."""
    states, alone, model = [], [], toys.TinyLM()
    for i in range(2):
        with torch.no_grad():
            model.mix.weight.mul_(1 + i)
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        index = build_index(
            tmp_path / f"{i}", copy.deepcopy(model), toys.language_task(), toys.texts(12), d=D, progress=False
        )
        alone.append({h.row: h.score for h in index.query(model, QUERIES[0], k=12)[0]})
    task = toys.language_task()
    both = build_index(
        tmp_path / "both", model, task, toys.texts(12), d=D, checkpoints=states, weights=[0.3, 0.7], progress=False
    )
    hits = both.query(model, QUERIES[0], k=12)
    for hit in hits[0]:
        assert hit.score == pytest.approx(0.3 * alone[0][hit.row] + 0.7 * alone[1][hit.row], rel=1e-3, abs=1e-5)
    explained = both.explain(model, hits, top=2)[0][0]
    assert sum(t.value for t in explained.tokens) == pytest.approx(explained.score, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_add_up_to_the_score(index, kind):
    model = toys.TinyLM()
    hits = index.query(model, QUERIES, k=4, opponents=2, score=kind)
    explained = index.explain(model, hits, top=2)
    for before, after in zip(hits, explained, strict=True):
        for old, new in zip(
            (*before.proponents, *before.opponents), (*after.proponents, *after.opponents), strict=True
        ):
            assert (old.row, old.score) == (new.row, new.score)
            if new.rank > 2:
                assert new.tokens == ()
                continue
            assert [t.token for t in new.tokens] == list(new.text)
            total = sum(t.value for t in new.tokens)
            assert total + new.beyond_tokens == pytest.approx(new.score, abs=1e-7)
            assert new.beyond_tokens == pytest.approx(0, abs=2e-4 * max(1.0, abs(new.score)))


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_a_hit_without_a_gradient_can_be_explained(tmp_path, kind):
    """Nothing of the row is counted, so that its gradient and all its contributions are zero."""
    model, task = toys.TinyLM(), toys.language_task()
    rows = [{"input_ids": [i, i + 1, 5]} for i in (3, 4, 5)]
    rows.append({"input_ids": [7, 8, 9], "labels": [-100] * 3})
    index = build_index(tmp_path, model, task, rows, d=D, progress=False)
    hits = index.explain(model, index.query(model, rows[:1], k=4, score=kind), top=4, data=rows)
    (silent,) = (hit for hit in hits[0] if hit.row == 3)
    assert (silent.gradient_norm, silent.score, silent.beyond_tokens) == (0, 0, 0)
    assert [t.value for t in silent.tokens] == [0, 0, 0]


def test_a_question_that_cannot_be_read_is_named(index):
    with pytest.raises(InputError, match="query 1: an empty text"):
        index.query(toys.TinyLM(), ["fine", ""])


@pytest.mark.parametrize("parameters", ["head.*", "*"])
def test_only_the_answers_tokens_contribute(tmp_path, parameters):
    """A prompt's tokens are predicted by nobody, whichever layers take part."""
    rows = [{"prompt": f"square {i}:", "answer": f" {i * i}"} for i in range(10)]
    model, task = toys.TinyLM(), toys.language_task()
    index = build_index(tmp_path, model, task, rows, d=D, parameters=parameters, dtype="float32", progress=False)
    hits = index.explain(model, index.query(model, [("square 3:", " 9")], k=1, score="dot"), top=1)
    assert hits[0].answer == " 9"
    assert hits[0][0].text == "square 3: 9"
    values = [t.value for t in hits[0][0].tokens]
    predicted = range(len("square 3:"), len("square 3: 9"))
    assert [i for i, value in enumerate(values) if value != 0] == list(predicted)


def test_tensors_cannot_be_explained(tmp_path):
    model, task, data = toys.classifier(), toys.vector_task(), toys.vectors(8)
    index = build_index(tmp_path, model, task, data, d=40, progress=False)
    hits = index.query(model, {name: values[:1] for name, values in data.items()}, k=2)
    with pytest.raises(InputError, match="data"):
        index.explain(model, hits)


def changed(model):
    with torch.no_grad():
        model.norm.bias[3] += 1e-6
    return model


class TestRefusals:
    def test_another_model_task_or_parameters(self, index, folder):
        with pytest.raises(FingerprintError, match=r"model is now .*what .* was made with: model"):
            index.query(changed(toys.TinyLM()), QUERIES)
        with pytest.raises(FingerprintError, match=rf"{folder} was made with"):
            index.query(changed(toys.TinyLM()), QUERIES)
        with pytest.raises(FingerprintError, match="task is now"):
            Index.open(folder, task=toys.language_task(reduction="sum")).query(toys.TinyLM(), QUERIES)
        with pytest.raises(FingerprintError, match="no parameter"):
            index.query(toys.classifier(), QUERIES)
        with pytest.raises(FingerprintError, match="model is now"):
            index.query(toys.TinyLM(width=13), QUERIES)

    def test_no_task(self, folder):
        with pytest.raises(InputError, match=r"task=CausalLM"):
            Index.open(folder).query(toys.TinyLM(), QUERIES)

    @pytest.mark.parametrize(
        "options",
        [{"k": 0}, {"opponents": -1}, {"coarse": 0}, {"coarse": D + 1}, {"score": "best"}, {"damping": -1.0},
         {"damping": "best"}],
    )  # fmt: skip
    def test_options_out_of_range(self, index, options):
        with pytest.raises(InputError, match=next(iter(options))):
            index.query(toys.TinyLM(), QUERIES, **options)

    def test_no_query(self, index):
        with pytest.raises(InputError, match="no query"):
            index.query(toys.TinyLM(), [])

    def test_no_index(self, tmp_path, folder):
        with pytest.raises(StoreError, match=r"holds no index\.json"):
            Index.open(tmp_path)
        with pytest.raises(StoreError, match="not one of its checkpoints"):
            Index.open(folder / "checkpoint-0")


def test_an_unfinished_index_says_so(tmp_path):
    model, task = toys.TinyLM(), toys.language_task()
    index = build_index(tmp_path, model, task, toys.texts(20), d=D, shard_rows=8, progress=False)
    (tmp_path / "checkpoint-0/part-000000000008-000008.arrow").unlink()
    with pytest.warns(GradsketchWarning, match="12 of 20 rows"):
        hits = index.query(model, QUERIES[0], k=20)
    assert sorted(h.row for h in hits[0]) == [*range(8), *range(16, 20)]
    with pytest.warns(GradsketchWarning):
        values = index.self_influence().values
    assert torch.isnan(values).nonzero().flatten().tolist() == list(range(8, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_self_influence(index, kind):
    x, _ = matrices(index, QUERIES)
    found = index.self_influence(kind)
    expected = formula(kind, x, x).diagonal()
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    row, id_, value = found.top(1)[0]
    assert id_ == str(row)
    assert value == float(found.values.max()) == float(found.values[row])
    if kind != "cosine":  # the cosine of a gradient with itself is 1: every row ties
        assert row == int(expected.argmax())
    assert list(found.to_pandas()["row"]) == list(range(N))


def test_self_influence_that_no_query_finds_is_refused(index, monkeypatch):
    solved = Scorer._solved

    def wrong_for_many(self, number, q, *arguments):
        return solved(self, number, q, *arguments) * (1.01 if len(q) > 3 else 1)

    monkeypatch.setattr(Scorer, "_solved", wrong_for_many)
    with pytest.raises(gs.GradsketchError, match="queries with those rows find"):
        index.self_influence("ridge")


def test_automatic_damping_is_reported(index):
    hits = index.query(toys.TinyLM(), QUERIES, damping="auto")
    again = index.query(toys.TinyLM(), QUERIES, damping=hits.score.damping)
    assert [h.row for h in hits[0]] == [h.row for h in again[0]]


def test_the_model_is_left_as_found(index):
    model = toys.TinyLM().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    index.explain(model, index.query(model, QUERIES))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_every_way_out(index, tmp_path):
    model = toys.TinyLM()
    hits = index.explain(model, index.query(model, QUERIES, opponents=1), top=1)
    assert len(hits.to_pandas()) == 3 * 11
    page = hits.to_html(tmp_path / "why.html").read_text(encoding="utf-8")
    assert "the number 7 squared is 49" in page
    assert "the number 7" in str(hits)
    assert '"tokens"' in hits.to_json()


def test_half_precision_and_int8_find_the_same(tmp_path):
    model, task = toys.TinyLM(), toys.language_task()
    for dtype in ("float16", "bfloat16", "int8"):
        index = build_index(tmp_path / dtype, model, task, toys.texts(N), d=D, dtype=dtype, progress=False)
        hit = index.query(model, QUERIES[0], k=1)[0][0]
        assert hit.row == 7


def test_another_process_finds_the_same(index, folder):
    """Nothing about a score depends on the process that built the index."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import toys; from gradsketch.attribution.index import Index\n"
        "hits = Index.open(sys.argv[1], task=toys.language_task()).query(toys.TinyLM(), 'the number 7', k=3)\n"
        "print([(h.row, round(h.score, 5)) for h in hits[0]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(Path(__file__).parent)],
        capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    hits = index.query(toys.TinyLM(), "the number 7", k=3)
    assert eval(done.stdout) == [(h.row, round(h.score, 5)) for h in hits[0]]
