"""The runner: a table that fails is reported and the others go on; what is done is not run again."""

import sys

import pytest

pytest.importorskip("transformers")

from benchmarks.paper import __main__ as runner
from benchmarks.paper import kept, page, registry
from benchmarks.paper.table import Table

ran = []


def works(size):
    ran.append(size)
    return {}


def fails(size):
    raise ValueError("a broken table")


def interrupted(size):
    raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command with tables of these names, and return its exit status."""
    ran.clear()
    monkeypatch.setattr(kept.record, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "write", lambda: tmp_path / "results.md")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tables = {
        made.__name__: Table(made.__name__, "A table", "nothing", 1, made, str, str)
        for made in (fails, works, interrupted)
    }
    monkeypatch.setattr(registry, "TABLES", tables)

    def status(*arguments):
        monkeypatch.setattr(sys, "argv", ["paper", *arguments])
        return runner.main()

    return status


def test_others_go_on_after_a_failure(run, capsys):
    assert run("--quick", "fails", "works") == 1
    assert ran == ["quick"]
    told = capsys.readouterr().err
    assert "a broken table" in told
    assert "without a result: fails" in told


def test_what_is_done_is_not_run_again_unless_asked(run):
    assert run("--quick", "works") == 0
    assert run("--quick", "works") == 0
    assert ran == ["quick"]
    assert run("works") == 0
    assert run("--quick", "--again", "works") == 0
    assert ran == ["quick", "full", "quick"]


def test_an_interruption_keeps_what_is_done(run, capsys):
    with pytest.raises(SystemExit, match="130"):
        run("--quick", "works", "interrupted")
    assert "interrupted, and lost" in capsys.readouterr().err
    assert run("--quick", "works") == 0
    assert ran == ["quick"]


def test_an_unknown_table_is_named(run, capsys):
    assert run("no_such") == 2
    assert "no table no_such; there are fails, works" in capsys.readouterr().err
