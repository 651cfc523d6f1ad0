"""Every script of benchmarks/paper runs at a tiny size, and the page says what its JSON says."""

import gc
import json
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.paper import kept, page
from benchmarks.paper.registry import TABLES
from benchmarks.paper.table import Table


@pytest.fixture
def quick_collection():
    """Keep a collection, which every measure of peak memory makes, from looking through all that has been imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize("name", TABLES)
def test_tiny_size_runs_and_is_shown(name):
    table = TABLES[name]
    results = json.loads(json.dumps(table.run("tiny")))  # as the page reads them
    text = table.show(results)
    assert "|" in text
    assert "nan" not in text
    assert all(table.short(results))
    if table.draw is not None:
        assert table.draw(results).axes


def test_page_is_of_its_json():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "type: python -m benchmarks.paper --page"


def test_readme_is_of_its_json():
    readme = page.README.read_text(encoding="utf-8")
    assert readme == page.with_summary(readme), "type: python -m benchmarks.paper --page"


def test_pictures_are_there():
    drawn = [table for table in TABLES.values() if table.draw is not None and kept.kept(table) is not None]
    assert [table.name for table in drawn if not page.picture(table).exists()] == []


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(kept.record, "RESULTS", tmp_path)
    return Table(
        "one",
        "A table",
        "nothing",
        1,
        lambda size: {"size": size},
        lambda results: results["size"],
        lambda results: ("", ""),
    )


def test_a_table_is_done_once_its_json_is_of_its_script(table):
    assert not kept.is_done(table, "quick")
    kept.measured(table, "quick")
    assert kept.is_done(table, "quick")
    assert not kept.is_done(table, "full")


SCRIPT = """
LIMIT = 3
def run(size):
    return helper(size)
def helper(size):
    return {"size": LIMIT}
def show(results):
    return "words"
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [('"words"', '"other words"', True), ("LIMIT = 3", "LIMIT = 4", False), ("(size)\ndef", "(size + 1)\ndef", False)],
    ids=["shown", "constant", "helper"],
)
def test_only_what_run_uses_makes_it_another_script(monkeypatch, old, new, same):
    def run(size):
        return {}

    def fingerprint(text):
        monkeypatch.setattr(kept.inspect, "getsource", lambda module: text)
        return kept.fingerprint(Table("one", "A table", "nothing", 1, run, str, str), "quick")

    assert old in SCRIPT
    assert (fingerprint(SCRIPT) == fingerprint(SCRIPT.replace(old, new))) == same


def test_the_largest_size_is_shown(table):
    assert kept.kept(table) is None
    kept.measured(table, "quick")
    assert kept.kept(table)["results"] == {"size": "quick"}
    kept.measured(table, "full")
    record = kept.kept(table)
    assert record["results"] == {"size": "full"}
    assert {"commit", "torch", "processor"} <= record["environment"].keys()
    assert record["load_average"]["before"] is None or math.isfinite(record["load_average"]["before"])
