"""Models and tokenizers as they lie in folders: what is missing, made up or hostile is named, and nothing is run."""

import json
import os
from pathlib import Path

import pytest
import torch

from gradsketch.attribution.checkpoints import _read
from gradsketch.cli import main
from gradsketch.cli.loading import ModelOptions, load
from gradsketch.errors import InputError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def classifier(folder):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SMALL)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def words(folder):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return words(classifier(tmp_path / "base"))


@pytest.fixture
def data(tmp_path):
    rows = [{"text": "a b c", "label": 0}, {"text": "x y z", "label": 1}, {"text": "a y q", "label": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_folder_without_a_tokenizer_is_refused_or_takes_the_one_that_is_named(tmp_path, base):
    """transformers makes one of five words then, to which every text is unknown."""
    bare = classifier(tmp_path / "bare")
    with pytest.raises(InputError, match=r"bare', which holds no tokenizer.*--tokenizer"):
        load(ModelOptions(str(bare)))
    _, task = load(ModelOptions(str(bare), tokenizer=str(base)))
    assert len(task.processor) == len(WORDS)


@pytest.mark.parametrize(
    "files", [{"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}, {"vocab.txt": ""}]
)
def test_a_tokenizer_of_hardly_a_word_is_refused(tmp_path, files):
    bare = classifier(tmp_path / "bare")
    for name, text in files.items():
        (bare / name).write_text(text)
    with pytest.raises(InputError, match="tokenizer"):
        load(ModelOptions(str(bare)))


@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_checkpoints_of_a_spectrum_use_the_tokenizer_of_the_model(tmp_path, base, data, capsys):
    """A training run whose learning rate is zero: the same weights have the same spectrum."""
    classifier(tmp_path / "run/checkpoint-2")
    command = ["spectrum", "--model", str(base), "--data", str(data), "--checkpoints", str(tmp_path / "run")]
    assert main([*command, "--k", "2", "--include", "classifier.*", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["spectra"]
    assert first["eigenvalues"] == second["eigenvalues"]


class Program:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickled_programs_do_not_run_and_get_our_sentence(tmp_path, base, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (base / "model.safetensors").unlink()
    torch.save({"x": Program()}, base / "pytorch_model.bin")
    assert main(["index", "i", "--model", str(base), "--data", str(data)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "could run any program" in line
    assert "weights_only" not in line
    with pytest.raises(InputError, match="could run any program"):
        _read(base / "pytorch_model.bin")
    assert not Path("ran").exists()


def test_code_beside_a_model_is_never_run_nor_asked_about(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("odd").mkdir()
    config = {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
    Path("odd/config.json").write_text(json.dumps(config))
    Path("odd/odd.py").write_text("open('ran', 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    assert main(["index", "i", "--model", "./odd", "--data", str(data)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "custom code" in line
    assert not Path("ran").exists()


def test_files_that_are_damaged_are_one_line(base, data, capsys):
    weights = base / "model.safetensors"
    for harm in (b"", b"junk", weights.read_bytes()[:-40]):
        weights.write_bytes(harm)
        assert main(["index", "i", "--model", str(base), "--data", str(data)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot load" in line
        assert "GRADSKETCH_DEBUG" not in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["check", "--data", "DATA", "--examples", "-3"], "--examples -3. Wanted: at least 1"),
        (["spectrum", "--data", "DATA", "--batch-size", "0"], "--batch-size 0. Wanted: at least 1"),
        (["dimension", "--train", "DATA", "--test", "DATA", "--seeds"], "--seeds without a number"),
    ],
)
def test_numbers_that_mean_nothing(base, data, command, message, capsys):
    command = [str(data) if word == "DATA" else word for word in command]
    assert main([command[0], "--model", str(base), *command[1:]]) == 1
    assert message in capsys.readouterr().err
