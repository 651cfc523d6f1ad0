"""gradsketch spectrum, run as a user would: one model, a run folder, checkpoints."""

import json
import subprocess
import sys

import pytest

transformers = pytest.importorskip("transformers")

from gradsketch.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("cli")
    words = {w: i for i, w in enumerate(["[UNK]", "[PAD]", "[EOS]", "the", "cat", "sat", "on", "mat", "dog", "ran"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    for number, name in enumerate(["start", "run/checkpoint-5", "run/checkpoint-10"]):
        torch.manual_seed(number)
        config = transformers.GPT2Config(
            n_layer=1, n_head=1, n_embd=8, vocab_size=10, n_positions=16, bos_token_id=2, eos_token_id=2
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    rows = [{"text": t} for t in ("the cat sat on the mat", "the dog ran", "the cat ran on")]
    (root / "texts.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return root


@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_one_model(folder, capsys):
    out = folder / "out"
    base = ["spectrum", "--model", str(folder / "start"), "--data", str(folder / "texts.jsonl"), "--k", "3"]
    assert main([*base, "--out", str(out), "--json", "--density"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["values"]) == 3
    assert printed["eigenvalues"][0]["gradient_share"] >= 0
    names = {p.name for p in out.iterdir()}
    assert {"run.json", "spectrum.json", "spectrum.png", "density.json", "density.png", "spectrum.run"} <= names
    assert main([*base, "--which", "both"]) == 0
    assert "R_NEG" in capsys.readouterr().out
    assert main([*base, "--method", "sketched-basis", "--scratch", str(folder)]) == 0
    assert "of them on disk" in capsys.readouterr().out
    assert main([*base, "--density"]) == 1
    assert "--out" in capsys.readouterr().err
    assert main([*base, "--fsdp", "--out", str(out)]) == 1
    assert "--fsdp with --out" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_that_share_out_the_model_find_the_same_values(folder):
    ask = ["spectrum", "--model", str(folder / "start"), "--data", str(folder / "texts.jsonl"), "--k", "3", "--json"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "gradsketch"]
    alone, together = (
        json.loads(subprocess.run([*command, *ask, *more], capture_output=True, text=True, check=True).stdout)
        for command, more in (([sys.executable, "-m", "gradsketch"], []), (ranks, ["--fsdp"]))
    )
    assert together["values"] == pytest.approx(alone["values"], rel=1e-3)
    assert together["n"] == alone["n"]


@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_checkpoints(folder, capsys):
    base = ["spectrum", "--model", str(folder / "start"), "--data", str(folder / "texts.jsonl"), "--k", "3"]
    assert main([*base, "--checkpoints", str(folder / "run"), "--out", str(folder / "over")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "0", "5", "10"]
    assert (folder / "over" / "evolution.png").stat().st_size > 10_000
    assert main([*base, "--checkpoints", str(folder)]) == 1
    assert "no checkpoint-N folder" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_checkpoints_share_the_tokenizer_of_the_model(folder, tmp_path, capsys):
    """Trainer saves none; the same weights at step 0 and 5 have the same spectrum."""
    checkpoint = tmp_path / "run" / "checkpoint-5"
    transformers.GPT2LMHeadModel.from_pretrained(folder / "start").save_pretrained(checkpoint)
    base = ["spectrum", "--model", str(folder / "start"), "--data", str(folder / "texts.jsonl"), "--k", "2"]
    assert main([*base, "--checkpoints", str(tmp_path / "run")]) == 0
    _, before, after = (line.split() for line in capsys.readouterr().out.splitlines())
    assert before[1:] == after[1:]


@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_a_block_without_gradient(folder, tmp_path, capsys):
    """Behind weights that are zero, as those of a fresh adapter are, the gradient is zero and the Hessian is not."""
    import torch

    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "start")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(folder / "start").save_pretrained(tmp_path / "model")
    block = ["--include", "transformer.h.0.mlp.c_fc.*", "--k", "2"]
    assert main(["spectrum", "--model", str(tmp_path / "model"), "--data", str(folder / "texts.jsonl"), *block]) == 0
    assert "The gradient is zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "answer"),
    [
        ("--batch-size", "0", "Type --batch-size 8"),
        ("--d", "0", "at least one dimension"),
        ("--d", "1", "copies of eigenvalues are not told"),
        ("--k", "0", "1 ≤ k ≤ n"),
        ("--steps", "1", "at least k steps"),
    ],
)
@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_numbers_out_of_range_are_one_line(folder, option, value, answer, capsys):
    base = ["spectrum", "--model", str(folder / "start"), "--data", str(folder / "texts.jsonl")]
    assert main([*base, "--method", "sketched-basis", option, value]) == 1
    error = capsys.readouterr().err.strip()
    assert answer in error
    assert "\n" not in error
