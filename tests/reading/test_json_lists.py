"""A JSON list of any size: the entries of json.loads, with little more than one of them in memory."""

import gzip
import json
import random
import tracemalloc

import pytest

from gradsketch.reading import read_examples


def entry(randoms, deep=3):
    """Return a random object, long and short, in letters of one to four bytes and of JSON's own."""
    letters = ['"', "\\", "é", "日", "😀", "]", "}", ",", " ", "\n", "a"]
    return {
        "text": "".join(randoms.choices(letters, k=randoms.choice([0, 1, 30, 2000]))),
        "n": randoms.choice([0, -12, 1.5e300, True, None]),
        "within": [entry(randoms, deep - 1) for _ in range(randoms.randrange(3))] if deep else [],
    }


@pytest.mark.parametrize("piece", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_entries_are_those_of_json(tmp_path, monkeypatch, piece, packed):
    monkeypatch.setattr("gradsketch.reading.sources.PIECE", piece)
    monkeypatch.setattr("gradsketch.reading.json_lists.PIECE", piece)
    randoms = random.Random(piece)
    rows = [entry(randoms, deep=2 if piece > 3 else 0) for _ in range(300 if piece > 3 else 40)]
    text = json.dumps(rows, indent=randoms.choice([None, 1]), ensure_ascii=randoms.choice([False, True]))
    data = b"\xef\xbb\xbf \n" + text.encode() + b"\n "
    path = tmp_path / ("a.json.gz" if packed else "a.json")
    path.write_bytes(gzip.compress(data) if packed else data)
    found = read_examples(path)
    assert list(found) == rows
    for i in (len(rows) - 1, 7, 0):  # in any order
        assert found[i] == rows[i]
        assert found.where(i) == f"{path.name}, entry {i + 1}"


def test_memory_is_that_of_some_entries(tmp_path):
    row = json.dumps({"text": "x" * 2000})
    (tmp_path / "a.json").write_text("[" + ",\n".join([row] * 20_000) + "]")  # 40 MB
    tracemalloc.start()
    try:
        rows = read_examples(tmp_path / "a.json")
        assert len(rows) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 15e6
    finally:
        tracemalloc.stop()
