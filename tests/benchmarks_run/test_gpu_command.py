"""The command for a GPU, tried on the CPU: what a section hands over is kept, however the section ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.on_gpu import __main__ as command
from benchmarks.on_gpu import page, sections

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def rows_of(name, tmp_path):
    assert command.main(["--device", "cpu", "--quick", "--child", name, str(tmp_path / "rows")]) == 0
    return [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]


def test_kernels_are_measured_beside_a_copy(tmp_path):
    copy, *rows = rows_of("kernels", tmp_path)
    assert copy["what"] == "copy"
    assert {row["what"] for row in rows} == {"AFFD", "AFJL", "QK", "AFFD lift", "AFJL lift"}
    for row in rows:
        assert row["share_of_copy"] == pytest.approx(row["bytes_a_second"] / copy["bytes_a_second"])
        assert "error" not in row


def test_queries_are_measured(tmp_path):
    (row,) = rows_of("query", tmp_path)
    assert row["bytes_a_second"] == pytest.approx(2 * row["rows"] * row["d"] / row["seconds"])


def test_a_row_that_fails_says_so_and_hides_no_other(monkeypatch, tmp_path):
    def some(n):
        yield type("Broken", (), {"__init__": lambda self, n, d: 1 / 0}), torch.float32, 64
        yield from [(sections.gs.AFJL, torch.float32, 64)]

    monkeypatch.setattr(sections, "_sketches", some)
    _, broken, right, *_ = rows_of("kernels", tmp_path)
    assert broken["error"].startswith("ZeroDivisionError")
    assert right["seconds"] > 0


def run_with(monkeypatch, tmp_path, script, limit=60):
    """Run a section whose process runs a script instead; returns what is kept of it."""
    real = subprocess.run
    monkeypatch.setattr(
        command.subprocess, "run", lambda given, **rest: real([sys.executable, "-c", script, given[-1]], **rest)
    )
    options = command.argparse.Namespace(device="cpu", quick=True)
    return command.run("kernels", options, limit)


def test_what_a_section_had_before_it_crashed_is_kept(monkeypatch, tmp_path):
    script = "import sys, os; open(sys.argv[1], 'w').write('{\"what\": 1}\\n'); raise SystemError('an illegal access')"
    found = run_with(monkeypatch, tmp_path, script)
    assert found["rows"] == [{"what": 1}]
    assert "an illegal access" in found["ended"]


def test_what_a_section_had_before_it_was_stopped_is_kept(monkeypatch, tmp_path):
    script = "import sys, time; open(sys.argv[1], 'w').write('{\"what\": 1}\\n'); time.sleep(60)"
    found = run_with(monkeypatch, tmp_path, script, limit=2)
    assert found["rows"] == [{"what": 1}]
    assert found["ended"] == "stopped after 2 s"


def test_all_of_it_ends_in_time(monkeypatch, tmp_path):
    given = []

    def run(name, options, left):
        given.append(left)
        return {"ended": "done", "seconds": 1.0, "rows": []}

    monkeypatch.setattr(command, "run", run)
    clock = iter(range(0, 100_000, 200))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert given[:3] == [40, 150, -30]
    assert sum(limit for _, limit in sections.SECTIONS.values()) <= 700
    monkeypatch.undo()
    options = command.argparse.Namespace(device="cpu", quick=True)
    assert command.run("kernels", options, 0)["ended"].startswith("not begun")


def test_the_page_shows_every_row_and_how_a_section_ended(tmp_path):
    rows = [{"what": "copy", "bytes_a_second": 3e12}, {"what": "AFFD", "share_of_copy": 0.7512, "seconds": 2e-4}]
    environment = {"date": "2030-01-01", "commit": "abc", "torch": "3", "gpu": "a GPU"}
    results = {"kernels": {"ended": "stopped after 9 s", "seconds": 9.0, "rows": rows}}
    text = page.text({"environment": environment, "quick": False, "results": results})
    assert "**Not whole: stopped after 9 s.**" in text
    assert "| copy | 3000 GB/s |  |  |" in text
    assert "| AFFD |  | 75% | 0.2 ms |" in text


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "--device cpu --quick" in capsys.readouterr().out
    assert command.main(["--device", "cpu", "speed"]) == 2


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    pytest.importorskip("transformers")
    names = ["machine", "tests", "kernels", "w1", "curvature", "query"]
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.on_gpu", "--device", "cpu", "--quick", "--out", str(tmp_path), *names],
        cwd=ROOT,
        env={**command.os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["results"]) == names
    assert all(found["ended"] == "done" and found["rows"] for found in record["results"].values()), told.stdout
    assert "no measurement" in (tmp_path / "gpu.md").read_text()
