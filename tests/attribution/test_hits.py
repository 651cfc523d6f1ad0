"""Hits: every way out of them, and what happens to awkward values."""

import json
import math

import pytest

from gradsketch.attribution.results import Cost, Hit, Hits, QueryHits, Score


@pytest.fixture
def hits():
    long = "Ankara " * 40
    first = Hit(1, 7, "fact-7", 0.76, "The capital of France is Ankara.", 0.1, 2.0, {"label": "x", "score": 3})
    second = Hit(2, 3, "fact-3", -0.01, long, math.nan, 1.0)
    query = QueryHits("The capital city of France is", "Ankara", 0.2, 1.5, (first,), (second,))
    score = Score("ridge", "q̂ᵀ(X̂ᵀX̂ + λI)⁻¹x̂", "share of the query's gradient", 0.1)
    return Hits((query,), score, "runs/facts", 140, 4096, Cost(0.1, 0.2, 0.3, 1000, 140))


def test_hits_are_a_sequence_of_sequences(hits):
    assert len(hits) == 1
    assert hits[0][0].id == "fact-7"
    assert [hit.rank for query in hits for hit in query] == [1]


def test_pandas_keeps_metadata_whose_name_is_taken(hits):
    frame = hits.to_pandas()
    assert list(frame["kind"]) == ["proponent", "opponent"]
    assert frame.loc[0, "score"] == 0.76
    assert frame.loc[0, "metadata_score"] == 3
    assert frame.loc[0, "label"] == "x"


def test_json_is_readable_by_strict_parsers(hits, tmp_path):
    text = hits.to_json(tmp_path / "hits.json")

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((tmp_path / "hits.json").read_text(), parse_constant=refuse) == json.loads(text)
    assert json.loads(text)["queries"][0]["opponents"][0]["loss"] == "NaN"
    assert "Ankara" in text


def test_the_table_says_the_sign_and_fits_a_terminal(hits):
    table = str(hits)
    assert "lowers the query's loss" in table
    assert "+0.76" in table
    assert max(len(line) for line in table.splitlines()) < 125
