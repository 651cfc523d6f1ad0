"""gradsketch check, as a user types it."""

import json
import subprocess
import sys

import pytest
import torch

from gradsketch.cli import main

TEXTS = [f"The capital of {c} is {c[::-1]}." for c in ("France", "Japan", "Egypt", "Canada", "Italy", "Kenya")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and data files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("check")
    letters = {token: i for i, token in enumerate(["<pad>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path / "model")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=len(letters), n_positions=64)
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(path / "model")
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (path / "bad.jsonl").write_text('{"text": "a text"}\n{"question": "?"}\n')
    return path


def test_prints_a_table(folder, capsys):
    code = main(["check", "--model", f"{folder}/model", "--data", f"{folder}/data.jsonl", "--d", "512"])
    table = capsys.readouterr().out
    assert code == 0
    assert "agree with autograd" in table
    assert "recommended  d = " in table


def test_prints_json(folder, capsys):
    options = ["--examples", "4", "--include", "*.weight", "--exclude", "*.wpe.*", "--max-length", "16", "--json"]
    code = main(["check", "--model", f"{folder}/model", "--data", f"{folder}/data.jsonl", "--d", "256", *options])
    numbers = json.loads(capsys.readouterr().out)
    assert code == 0
    assert numbers["right"]
    assert numbers["examples"] == 4
    assert [quality["d"] for quality in numbers["qualities"]] == [256]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "{}/none", "--data", "{}/data.jsonl"], "no folder"),
        (["--model", "{}/model", "--data", "{}/none.jsonl"], "does not exist"),
        (["--model", "{}/model", "--data", "{}/bad.jsonl"], "example 1: .*keys question"),
        (["--model", "{}/model", "--data", "{}/data.jsonl", "--include", "nrom.*"], "matches no parameter"),
    ],
)
def test_what_goes_wrong_is_named(folder, capsys, options, words):
    import re

    assert main(["check", *(option.format(folder) for option in options)]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_help_does_not_wait_for_torch():
    program = (
        "import sys\nfrom gradsketch.cli import main\n"
        "try:\n    main(['check', '--help'])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_wrong_usage_is_2():
    with pytest.raises(SystemExit) as exit_:
        main(["check", "--data", "x"])
    assert exit_.value.code == 2
