"""Rows that help a target set: scores as a formula has them, within the budget, and no copies."""

import json
import math
from dataclasses import replace

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.errors import InputError

D, ROWS = 128, 60
DATA = [{"id": f"r{i}", "text": text} for i, text in enumerate(toys.texts(ROWS))]
TARGETS = [DATA[7]["text"], DATA[31]["text"], "the number 99 squared is 9801"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("select"), DATA)


def build(path, data, **options):
    given = {"d": D, "shard_rows": 8, "dtype": "float32", "progress": False} | options
    return gs.build_index(path, toys.TinyLM(), toys.language_task(), data, **given)


def products(index, score="dot"):
    """Return the score of every row for every target, from the queries themselves."""
    hits = index.query(toys.TinyLM(), TARGETS, k=ROWS, score=score)
    out = torch.zeros(len(TARGETS), ROWS)
    for number, answer in enumerate(hits):
        for hit in answer:
            out[number, hit.row] = hit.score
    return out


@pytest.mark.parametrize("score", ["dot", "ridge"])
@pytest.mark.parametrize(("aggregate", "formula"), [
    ("mean", lambda s: s.mean(0)),
    ("max", lambda s: s.amax(0)),
    ("rank", lambda s: (s.argsort(1).argsort(1) / (ROWS - 1)).mean(0)),
])  # fmt: skip
def test_scores_and_order(index, score, aggregate, formula):
    expected = formula(products(index, score))
    found = index.select(toys.TinyLM(), TARGETS, rows=10, score=score, aggregate=aggregate, alike=None)
    torch.testing.assert_close(found.values, expected[list(found.rows)], rtol=1e-4, atol=1e-7)
    assert set(found.rows) == set(expected.topk(10).indices.tolist())
    assert (found.values.diff() <= 0).all()
    assert found.ids == tuple(DATA[row]["id"] for row in found.rows)
    assert (found.of, found.targets, found.copies) == (ROWS, 3, 0)


@pytest.mark.parametrize(("aggregate", "formula"), [("mean", lambda s: s.mean(0)), ("max", lambda s: s.amin(0))])
def test_harmful_rows_are_those_of_lowest_score(index, aggregate, formula):
    expected = formula(products(index))
    options = {"score": "dot", "aggregate": aggregate, "alike": None}
    found = index.select(toys.TinyLM(), TARGETS, rows=5, harmful=True, **options)
    assert set(found.rows) == set((-expected).topk(5).indices.tolist())
    torch.testing.assert_close(found.values, expected[list(found.rows)], rtol=1e-4, atol=1e-7)
    assert "harm 3 targets" in found.summary()


def test_rows_of_one_score_share_a_rank(tmp_path):
    data = [DATA[3]["text"]] * 4 + [row["text"] for row in DATA[10:16]] + [DATA[3]["text"]] * 4
    alike = build(tmp_path, data)
    found = alike.select(toys.TinyLM(), TARGETS, rows=len(data), aggregate="rank", alike=None, score="dot")
    values = dict(zip(found.rows, found.values.tolist(), strict=True))
    copies = [values[row] for row in (0, 1, 2, 3, 10, 11, 12, 13)]
    assert max(copies) - min(copies) < 1e-6
    assert sum(values.values()) == pytest.approx(len(data) / 2, rel=1e-5)


def test_budgets(index):
    model, lengths = toys.TinyLM(), [len(row["text"]) for row in DATA]
    assert len(index.select(model, TARGETS, share=0.05, alike=None).rows) == 3
    found = index.select(model, TARGETS, tokens=100, alike=None)
    assert [lengths[row] for row in found.rows] == found.tokens.tolist()
    assert 100 - max(lengths) < float(found.tokens.sum()) <= 100
    assert len(index.select(model, TARGETS, rows=10**6, alike=None).rows) == ROWS
    for wrong in ({}, {"rows": True}, {"rows": 0}, {"share": 1.5}, {"rows": 3, "share": 0.1}, {"tokens": -1}):
        with pytest.raises(InputError, match="a budget of"):
            index.select(model, TARGETS, **wrong)
    with pytest.raises(InputError, match="aggregate="):
        index.select(model, TARGETS, rows=3, aggregate="median")
    with pytest.raises(InputError, match="alike="):
        index.select(model, TARGETS, rows=3, alike=1.5)


def test_one_of_five_copies_is_chosen(tmp_path):
    """Wherever they stand, in one block of candidates or in several."""
    copies = [{"id": f"copy {i}", "text": DATA[7]["text"]} for i in range(5)]
    index = build(tmp_path, [*copies[:2], *DATA, *copies[2:]])
    model = toys.TinyLM()
    found = index.select(model, [DATA[7]["text"]], rows=10, score="cosine", alike=0.9999)
    alike = [id_ for id_ in found.ids if id_ == "r7" or id_.startswith("copy")]
    assert len(alike) == 1
    assert found.copies == 5
    assert len(set(found.rows)) == 10
    every = index.select(model, [DATA[7]["text"]], rows=10, score="cosine", alike=None)
    assert len([id_ for id_ in every.ids if id_ == "r7" or id_.startswith("copy")]) == 6


def test_copies_in_another_block_of_candidates(index, monkeypatch):
    from gradsketch.attribution import select

    options = {"rows": 20, "score": "dot", "alike": 0.9}
    whole = index.select(toys.TinyLM(), TARGETS, **options)
    assert whole.copies > 0
    monkeypatch.setattr(select, "_COMPARED", 3)
    pieces = index.select(toys.TinyLM(), TARGETS, **options)
    assert pieces.rows == whole.rows
    assert pieces.copies == whole.copies


def test_rows_that_were_left_out_are_not_chosen(tmp_path):
    data = [*DATA[:10], {"text": ""}, *DATA[10:20]]
    index = build(tmp_path, data, skip_bad=True)
    found = index.select(toys.TinyLM(), TARGETS, rows=100, alike=None)
    assert len(found.rows) == 20
    assert 10 not in found.rows
    assert not math.isnan(float(found.values.sum()))


def test_what_is_written(index, tmp_path):
    found = index.select(toys.TinyLM(), TARGETS, rows=6, alike=None)
    rows = [json.loads(line) for line in found.write(tmp_path / "kept.jsonl", DATA).read_text().splitlines()]
    assert rows == [DATA[row] for row in sorted(found.rows)]
    rows = [json.loads(line) for line in found.write(tmp_path / "rest.jsonl", DATA, drop=True).read_text().splitlines()]
    assert rows == [row for i, row in enumerate(DATA) if i not in found.rows]
    with pytest.raises(InputError, match="data of 5 rows"):
        found.write(tmp_path / "none.jsonl", DATA[:5])
    with pytest.raises(InputError, match="row 0, which is no JSON"):
        replace(found, data="").write(tmp_path / "none.jsonl", [torch.zeros(2)] * ROWS, drop=True)
    assert not (tmp_path / "none.jsonl").exists()
