"""Tables in memory are read by position, whatever their own brackets mean."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pytest

import gradsketch as gs
from gradsketch.attribution.examples import as_examples, fields
from gradsketch.gradients.fingerprints import canonical
from gradsketch.reading import FileRows


def test_a_frame_is_its_rows_by_position():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "text": ["a", None, "c"],
            "n": [1, 2, 3],
            "x": [0.5, np.nan, 2.0],
            "when": pandas.to_datetime(["2020", None, "2021"]),
        },
        index=[7, 1, 1],
    )
    rows = as_examples(frame)
    assert isinstance(rows, FileRows)
    assert [row["text"] for row in rows] == ["a", None, "c"]
    assert rows[1]["n"] == 2
    assert type(rows[1]["n"]) is int
    assert np.isnan(rows[1]["x"])
    assert rows[1]["when"] is None
    assert rows.read_range(1, 3)[1]["x"] == 2.0
    assert rows.where(2) == "row 3 of the DataFrame"
    assert as_examples(frame["text"][[7]]) == ["a"]
    with pytest.raises(gs.InputError, match="two columns called 'n'"):
        as_examples(pandas.concat([frame, frame[["n"]]], axis=1))


def test_arrow_tables_are_their_rows():
    table = pa.table({"text": ["a", "b", "c"], "n": [1, 2, 3]})
    table = pa.concat_tables([table, table])
    assert list(as_examples(table)) == table.to_pylist()
    assert as_examples(table).read_range(2, 4) == table.to_pylist()[2:4]
    assert list(as_examples(table.to_batches()[0])) == table.to_pylist()[:3]


def test_arrays():
    kind = np.dtype([("text", "U5"), ("n", np.int64), ("x", np.float32, (2,)), ("at", "M8[ns]")])
    array = np.array([("a", 1, (1, 2), "2020-01-02"), ("b", 2, (3, 4), "NaT")], dtype=kind)
    first, second = as_examples(array)
    assert (first["text"], first["n"], type(first["n"])) == ("a", 1, int)
    assert second["x"].tolist() == [3, 4]
    assert fields(first)[1]["at"] == "2020-01-02T00:00:00.000000000"
    assert [row.tolist() for row in as_examples(np.arange(6).reshape(3, 2))] == [[0, 1], [2, 3], [4, 5]]
    for wrong in (np.array(3), array.reshape(1, 2)):
        with pytest.raises(gs.InputError, match="an array of"):
            as_examples(wrong)


def test_digests_of_texts_and_times_in_numpy():
    """They raised what torch says of arrays that it cannot take."""
    same, other = ([b"".join(canonical(np.array(v))) for v in values] for values in ((["a"], ["a"]), (["a"], ["b"])))
    assert same[0] == same[1]
    assert other[0] != other[1]
    assert b"".join(canonical(np.datetime64("2020-01-01"))) != b"".join(canonical(np.datetime64("2020-01-02")))


def test_an_index_of_a_frame_has_the_scores_of_its_rows(tmp_path):
    pandas = pytest.importorskip("pandas")
    model = gs_model()
    records = [{"text": "abc", "price": "1.10"}, {"text": "bca", "price": "2"}, {"text": "cab", "price": "3"}]
    task = gs.CausalLM(lambda text: {"input_ids": [ord(letter) - 97 for letter in text]})
    kept = [
        gs.build_index(tmp_path / name, model, task, data, d=16)
        for name, data in (
            ("frame", pandas.DataFrame(records)),
            ("list", records),
            ("arrow", pa.Table.from_pylist(records)),
        )
    ]
    (scores, *others) = [
        [(hit.id, round(hit.score, 6)) for hit in index.query(model, ["abc"], k=3)[0]] for index in kept
    ]
    assert all(other == scores for other in others)


def gs_model():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3))


def test_what_is_no_json_is_kept_as_text():
    import decimal
    import fractions
    import uuid

    row = {
        "decimal": decimal.Decimal("1.10"),
        "date": datetime.date(2020, 1, 2),
        "time": datetime.time(1, 2),
        "span": datetime.timedelta(days=1, seconds=1),
        "uuid": uuid.UUID(int=7),
        "half": fractions.Fraction(1, 2),
        "bytes": b"caf\xc3\xa9",
        "raw": b"\xff\x00",
        "image": {"bytes": b"\xff" * 1000, "path": "a.png"},
        "nanoseconds": np.datetime64("2020-01-02T00:00:00.000000001"),
        "set": {"b", "a"},
        "nan": float("nan"),
        "nested": [{"price": decimal.Decimal("2.0")}],
        "missing": None,
    }
    _, kept = fields({"text": "a", **row})
    assert np.isnan(kept.pop("nan"))
    assert kept.pop("image")["bytes"].startswith("ffffffffffffffff… (1000 bytes, sha256 ")
    assert kept == {
        "text": "a",
        "decimal": "1.10",
        "date": "2020-01-02",
        "time": "01:02:00",
        "span": "1 day, 0:00:01",
        "uuid": "00000000-0000-0000-0000-000000000007",
        "half": "1/2",
        "bytes": "café",
        "raw": "ff00",
        "nanoseconds": "2020-01-02T00:00:00.000000001",
        "set": ["a", "b"],
        "nested": [{"price": "2.0"}],
        "missing": None,
    }
    json.dumps(kept)
