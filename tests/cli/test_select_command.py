"""gradsketch select, as typed."""

import json

import pytest

from gradsketch.cli.main import main

TEXTS = [f"the capital of {'abcdefghij'[i]} is {i}" for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("select")
    words = sorted({word for text in TEXTS for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path / "model")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(words) + 1}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path / "model")
    rows = [{"text": text, "half": i % 2} for i, text in enumerate(TEXTS)]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    (path / "target.jsonl").write_text(json.dumps({"text": TEXTS[3]}) + "\n")
    command = [
        "index",
        str(path / "i"),
        "--model",
        str(path / "model"),
        "--data",
        str(path / "data.jsonl"),
        "--d",
        "256",
    ]
    assert main(command) == 0
    return path


def select(folder, *more):
    return main(["select", str(folder / "i"), "--for", str(folder / "target.jsonl"), "--score", "cosine", *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_keep(folder, capsys):
    assert select(folder, "--keep", "20%", "--out", str(folder / "kept.jsonl")) == 0
    kept = lines(folder / "kept.jsonl")
    assert len(kept) == 2
    assert {"text": TEXTS[3], "half": 1} in kept
    assert kept[0] != kept[1]  # the copy was passed over
    assert "2 of 11 rows" in capsys.readouterr().out
    assert select(folder, "--keep", "2", "--alike", "1", "--out", str(folder / "both.jsonl")) == 0
    assert [row["text"] for row in lines(folder / "both.jsonl")] == [TEXTS[3]] * 2


def test_drop(folder, capsys):
    assert select(folder, "--drop", "3", "--json", "--out", str(folder / "rest.jsonl")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["harmful"]
    assert len(lines(folder / "rest.jsonl")) == 11 - 3
    assert TEXTS[3] in [row["text"] for row in lines(folder / "rest.jsonl")]


def test_tokens(folder, capsys):
    assert select(folder, "--tokens", "13", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 2  # of six tokens each


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "no budget"),
        (["--keep", "5%", "--drop", "2"], "several budgets"),
        (["--keep", "many"], "a budget of 'many'"),
        (["--keep", "200%"], "a budget of share=2.0"),
        (["--keep", "1", "--data", "/nowhere.jsonl", "--out", "x.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_wrong_options(folder, capsys, more, message):
    assert select(folder, *more) == 1
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
