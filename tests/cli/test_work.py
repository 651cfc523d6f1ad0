"""One command, several processes: by torchrun, by shares of the shards, by Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsketch.cli.main import main
from gradsketch.cli.work import WorkOptions
from gradsketch.errors import InputError

SRC = Path(__file__).parents[2] / "src"
TEXTS = [f"the capital of {'abcdefghij'[i]} is {i}" for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("work")
    words = sorted({word for text in TEXTS for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path / "model")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(words) + 1}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path / "model")
    (path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def arguments(folder, index, *more):
    given = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--d", "256", "--shard-rows", "2"]
    return ["index", str(index), *given, *more]


def shards(index):
    return {file.name: file.read_bytes() for file in index.glob("checkpoint-0/*.arrow")}


@pytest.fixture(scope="module")
def alone(folder):
    assert main(arguments(folder, folder / "alone")) == 0
    return shards(folder / "alone")


def test_a_share_is_of_torchrun_only_where_it_runs():
    assert WorkOptions().share({}) == (0, 1)
    assert WorkOptions().share({"RANK": "1", "WORLD_SIZE": "2"}) == (0, 1)  # some clusters set them everywhere
    assert WorkOptions().share({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}) == (1, 2)
    assert WorkOptions(worker=(0, 3)).share({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}) == (0, 3)


def test_torchrun_shares_the_shards_and_one_rank_speaks(folder, alone):
    # Behind the dashes, or torchrun takes --d for the beginning of an option of its own.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "gradsketch"]
    done = subprocess.run(
        [*command, *arguments(folder, folder / "torchrun")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert shards(folder / "torchrun") == alone
    assert done.stdout.count("Now ask:") == 1


def test_a_share_says_what_is_still_to_come(folder, alone, capsys):
    path = folder / "shares"
    assert main(arguments(folder, path, "--worker", "0", "2")) == 0
    assert "6 rows, d = 256, 4 still to come from other processes" in capsys.readouterr().out
    assert main(arguments(folder, path, "--worker", "1", "2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10
    assert shards(path) == alone


def test_options_that_need_another(folder, monkeypatch):
    assert WorkOptions().chosen() is None
    for lonely in (WorkOptions(workers=2), WorkOptions(gpus_per_worker=1.0), WorkOptions(address="auto")):
        with pytest.raises(InputError, match="--engine ray"):
            lonely.chosen()
    with pytest.raises(InputError, match="Leave out --worker"):
        WorkOptions(worker=(0, 2), engine="ray").chosen()
    chosen = WorkOptions(engine="ray", workers=2, gpus_per_worker=0.5, address="auto").chosen()
    assert (chosen.workers, chosen.gpus_per_worker, chosen.address) == (2, 0.5, "auto")


def test_without_ray(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments(folder, folder / "none", "--engine", "ray")) == 1
    assert "no module named ray" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_starts_and_ends_with_the_command(folder, alone):
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-m", "gradsketch", *arguments(folder, folder / "ray", "--engine", "ray", "--workers", "2")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert shards(folder / "ray") == alone
    assert done.stdout.count("Now ask:") == 1
    left = subprocess.run(["pgrep", "-f", "raylet.*session"], capture_output=True, text=True).stdout.split()
    assert not left
