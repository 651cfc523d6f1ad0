"""The benchmark of chosen rows runs whole at a tiny size, and its parts say what they mean."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def selection(monkeypatch):
    """Import the script as it imports itself: beside record.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import selection

    yield selection
    sys.modules.pop("selection", None)


def test_digits_are_dropped_by_every_way(selection):
    results = selection.drop(selection.TINY)
    assert set(results) == {"at random", "nines called fours"}
    for found in results.values():
        assert set(found["share_found"]) == {"influence", "ridge", "loss", "random", "the planted"}
        assert found["share_found"]["the planted"] == 1
        assert set(found["gain_over"]) == set(found["accuracy"]) - {"influence"}


def test_mails_are_kept_by_every_choice(selection):
    try:
        mails = selection.read_mails(selection.TINY.mails)
    except selection.gs.InputError as error:
        pytest.skip(str(error).splitlines()[0])
    size = selection.TINY
    for setting in selection.SETTINGS:
        pool, targets, held = selection.split(mails, setting, 0, size)
        assert (len(targets), len(held)) == (size.targets, size.held_out)
        assert not {id(mail) for mail in targets} & {id(mail) for mail in held}
        assert not {mail["text"] for mail in pool} & {mail["text"] for mail in targets + held}
        assert (setting == selection.SETTINGS[1]) <= all(mail["group"] != "hard-ham-1" for mail in pool)
        chosen = selection.choices(pool, targets, 0, size)
        assert {len(set(rows)) for rows in chosen.values()} == {len(pool) // 10}


def test_words_that_few_rows_hold_count_more(selection):
    rows = [{"text": text} for text in ("the rare word", "the the the", "the other thing", "nothing of it")]
    scores = selection.bm25(rows, [{"text": "the rare"}, {"text": "unseen"}])
    assert int(scores[:, 0].argmax()) == 0
    assert scores[3, 0] == 0
    assert torch.equal(scores[:, 1], torch.zeros(4, dtype=torch.float64))


def test_an_interval_is_that_of_pairs(selection):
    found = selection.compared({"ours": [0.5, 0.7, 0.9], "other": [0.4, 0.6, 0.8]}, "ours")
    low, high = found["gain_over"]["other"]["interval"]
    assert found["gain_over"]["other"]["mean"] == pytest.approx(0.1)
    assert high - low < 1e-9
    low, high = found["accuracy"]["ours"]["interval"]
    assert (low, high) == pytest.approx((0.7 - 4.3027 * 0.2 / 3**0.5, 0.7 + 4.3027 * 0.2 / 3**0.5), abs=1e-4)
