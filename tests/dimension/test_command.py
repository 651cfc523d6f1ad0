"""gradsketch dimension, as typed."""

import json
from pathlib import Path

import pytest
import torch

from gradsketch.cli.main import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "a", "the", "very", "film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    for name, start in (("train", 0), ("test", 30)):
        rows = [
            {"text": f"{WORDS[6 + i % 3]} {WORDS[i % 6]} film", "label": int(i % 6 > 2)}
            for i in range(start, start + 30)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    files = ["--train", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl")]
    search = ["--full-steps", "30", "--full-lr", "0.01", "--lr", "0.02", "--check-every", "10", "--d-max", "256"]
    return ["dimension", "--model", str(folder / "model"), *files, *search, *more]


def test_finds_a_dimension_and_leaves_result_figure_and_run_file(folder, tmp_path, capsys) -> None:
    assert main(arguments(folder, "--out", str(tmp_path), "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reached"]
    assert printed["target"] == pytest.approx(0.9 * printed["full"])
    assert json.loads((tmp_path / "result.json").read_text()) == printed
    assert json.loads((tmp_path / "run.json").read_text())["options"]["full_steps"] == 30
    assert (tmp_path / "figure.png").stat().st_size > 5000

    assert main(arguments(folder, "--out", str(tmp_path))) == 0  # again: nothing is computed twice
    assert f"\nd = {printed['d']:,}, " in capsys.readouterr().out
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["seconds"] == printed["seconds"]


def test_a_model_in_shares_is_refused_at_once(folder, capsys) -> None:
    assert main(arguments(folder, "--fsdp")) == 1
    assert "a model in one piece" in capsys.readouterr().err


def test_a_target_met_before_training_is_told(folder, capsys) -> None:
    assert main(arguments(folder, "--target", "0.01")) == 0
    assert "d = 0: the target 0.01 was met before any training (metric 0." in capsys.readouterr().out


def test_the_learning_rate_is_measured_where_none_is_given(folder, capsys) -> None:
    line = arguments(folder, "--json", "--target", "0.9")
    place = line.index("--lr")
    assert main(line[:place] + line[place + 2 :]) == 0
    printed = json.loads(capsys.readouterr().out)
    checks = printed["searches"][0]["checks"]
    assert 1e-4 < printed["settings"]["lr"] < 1
    assert max(check["value"] for check in checks) > checks[0]["value"] + 0.2, checks


def test_a_target_out_of_reach(folder, capsys) -> None:
    assert main(arguments(folder, "--target", "1.5", "--d-min", "2", "--d-max", "4")) == 0
    assert "target 1.5 not reached up to d = 4: best" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metric", "rouge1"], "Type --metric accuracy"),
        (["--include", "nothing*"], "matches no parameter"),
        (["--d-max", "99999999", "--full-steps", "100000"], "d=99999999"),
        (["--test", "/nowhere.jsonl"], "does not exist"),
        (["--metric", "loss", "--full-lr", "100"], "did not improve the metric: from 0."),
        (["--full-lr", "1e-12"], "lower --full-lr, such as 1e-13"),
    ],
)
def test_wrong_usage_is_told_in_one_message(folder, capsys, more: list[str], words: str) -> None:
    assert main(arguments(folder, *more)) == 1
    error = capsys.readouterr().err
    assert "gradsketch dimension: " in error
    assert words in error
    assert "Traceback" not in error
