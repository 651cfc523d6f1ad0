"""The example for DATE-LM writes what that benchmark reads, for a checkpoint in a folder."""

import json
import runpy
from pathlib import Path

import pytest

from gradsketch.demo.files import write_files

EXAMPLE = Path(__file__).parents[2] / "examples/date_lm.py"


@pytest.fixture
def files(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_files()
    rows = [json.loads(line) for line in Path("facts.jsonl").read_text().splitlines()]
    for name, part in (("train", rows[:12]), ("reference", rows[12:15])):
        lines = [json.dumps({"prompt": row["prompt"], "response": row["answer"]}) for row in part]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(("task", "shape"), [("facts", (3, 12)), ("filtering", (12,)), ("selection", (12,))])
def test_scores_are_written_as_they_are_read(files, task, shape):
    example = runpy.run_path(str(EXAMPLE))
    arguments = ["--model", "my-model", "--train", "train.jsonl", "--reference", "reference.jsonl", "--task", task]
    example["main"]([*arguments, "scores.json"])
    scores = json.loads(Path("scores.json").read_text())
    assert len(scores) == shape[0]
    assert all(len(row) == shape[1] for row in scores) if len(shape) == 2 else all(map(float.__float__, scores))
