"""Commands and kinds of task from outside the package."""

import json
import sys
from dataclasses import dataclass

import pytest
import tyro

import gradsketch as gs
from gradsketch.cli import Command, main, register
from gradsketch.cli.loading import ModelOptions, load
from gradsketch.gradients.tasks import kinds
from gradsketch.gradients.tasks.kinds import TaskKind


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Copies of both registries, so that toys are forgotten after the test."""
    command_line = sys.modules["gradsketch.cli.main"]
    monkeypatch.setattr(command_line, "COMMANDS", dict(command_line.COMMANDS))
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))


@dataclass(frozen=True)
class Greeting:
    """Greet somebody."""

    name: tyro.conf.Positional[str]
    """Whom."""
    times: int = 1
    """How often."""


def greet(options: Greeting) -> int:
    if options.times < 1:
        raise gs.InputError(f"--times {options.times}", "at least 1", "Leave it out")
    print(" ".join(["hello", options.name] * options.times))
    return 3


def test_a_command_from_outside_is_like_any_other(capsys, tmp_path):
    register(Command("greet", "say hello", Greeting, greet))
    assert main(["greet", "you", "--times", "2"]) == 3
    assert capsys.readouterr().out == "hello you hello you\n"
    run = {"command": "greet", "options": {"name": "me", "times": 3}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert main(["greet", "--config", str(tmp_path / "run.json"), "--times", "1"]) == 3
    assert capsys.readouterr().out == "hello me\n"
    assert main(["greet", "you", "--times", "0"]) == 1
    assert "gradsketch greet: --times 0. Wanted: at least 1." in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "greet      say hello" in capsys.readouterr().out
    with pytest.raises(gs.InputError, match="Choose another name"):
        register(Command("greet", "again", Greeting, greet))


class LastHidden(gs.Task):
    """A toy: the model's hidden states shall be small."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def collate(self, examples):
        return self.tokenizer([example["text"] for example in examples], padding=True, return_tensors="pt")

    def losses(self, model, batch):
        sizes = model(**batch).last_hidden_state.square().mean(2)
        return (sizes * batch["attention_mask"]).sum(1)  # padding does not count


def test_a_task_from_outside_is_like_any_other(tmp_path, capsys):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=3, **sizes)).save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": "a b " * i}) for i in range(1, 7)))

    options = ModelOptions(str(tmp_path / "model"))
    with pytest.raises(gs.InputError, match="of which no task follows"):
        load(options)
    kinds.register(TaskKind("small", "AutoModel", ("BertModel",), lambda tokenizer, model, most: LastHidden(tokenizer)))
    _, task = load(options)
    assert isinstance(task, LastHidden)
    command = ["check", "--model", options.model, "--data", str(tmp_path / "data.jsonl"), "--task", "small"]
    assert main([*command, "--d", "64", "--include", "*output*"]) == 0
    assert "agree with autograd" in capsys.readouterr().out
    assert main([*command[:-1], "large"]) == 1
    assert "auto, causal-lm, seq2seq-lm, masked-lm, classification, small" in capsys.readouterr().err
    with pytest.raises(gs.InputError, match="Choose another name"):
        kinds.register(kinds.task_kind("small"))
