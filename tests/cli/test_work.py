"""One command, several processes: by torchrun, by shares of the shards, by Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import TEXTS, save_model, write_rows
from torch import nn

from gradsketch.attribution.engine import Local, Ray
from gradsketch.cli.main import main
from gradsketch.cli.sharing import layers_of
from gradsketch.cli.work import ReadingOptions, WorkOptions
from gradsketch.errors import InputError
from processes import left_behind

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}

# Options stand behind the dashes, or torchrun takes --d for the beginning of one of its own.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "gradsketch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    save_model(path / "model")
    write_rows(path / "data.jsonl", [{"text": text} for text in TEXTS])
    return path


def arguments(folder, index, *more):
    given = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--d", "256", "--shard-rows", "2"]
    return ["index", str(index), *given, *more]


def shards(index):
    return {file.name: file.read_bytes() for file in index.glob("checkpoint-0/*.arrow")}


def assert_builds(command, index, expected):
    """Run a command, which must make the very shards, and speak once."""
    env = {**ENVIRONMENT, "GRADSKETCH_TEST": str(index)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert shards(index) == expected
    assert done.stdout.count("Now ask:") == 1


@pytest.fixture(scope="module")
def alone(folder):
    assert main(arguments(folder, folder / "alone")) == 0
    return shards(folder / "alone")


def test_a_share_is_of_torchrun_only_where_it_runs():
    assert WorkOptions().share({}) == (0, 1)
    assert WorkOptions().share({"RANK": "1", "WORLD_SIZE": "2"}) == (0, 1)  # some clusters set them everywhere
    assert WorkOptions().share({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}) == (1, 2)
    assert WorkOptions(worker=(0, 3)).share({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}) == (0, 3)


def test_ranks_of_torchrun_share_the_shards_and_one_speaks(folder, alone, monkeypatch, capsys):
    """What torchrun sets, in this process: a start of torch for every rank is for -m slow."""
    for name, value in {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments(folder, folder / "ranks")) == 0
    assert shards(folder / "ranks") == alone
    assert capsys.readouterr().out.count("Now ask:") == 1


@pytest.mark.slow
def test_torchrun_shares_the_shards_and_one_rank_speaks(folder, alone):
    assert_builds([*TORCHRUN, *arguments(folder, folder / "torchrun")], folder / "torchrun", alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ranks_that_share_out_the_model_make_the_very_shards(tmp_path, kind):
    """transformers shares out a Llama layer by layer as it loads; a GPT-2 is loaded whole and then shared out."""
    save_model(tmp_path / "model", kind)
    write_rows(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    assert main(arguments(tmp_path, tmp_path / "alone")) == 0
    assert_builds(
        [*TORCHRUN, *arguments(tmp_path, tmp_path / "shared", "--fsdp")],
        tmp_path / "shared",
        shards(tmp_path / "alone"),
    )
    ask = ["query", "--text", TEXTS[3], "--k", "2", "--json"]
    answers = [
        subprocess.run([*command, str(tmp_path / "shared")], capture_output=True, text=True, env=ENVIRONMENT).stdout
        for command in ([sys.executable, "-m", "gradsketch", *ask], [*TORCHRUN, *ask, "--fsdp"])
    ]
    alone, together = (json.loads(answer)["queries"] for answer in answers)
    assert together == alone


@pytest.mark.slow
def test_ranks_that_split_layers_make_the_index_of_one_process(tmp_path):
    save_model(tmp_path / "model", "llama", key_value_heads=2)
    write_rows(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    assert main(arguments(tmp_path, tmp_path / "alone", "--store", "float32")) == 0
    command = [*TORCHRUN, *arguments(tmp_path, tmp_path / "split", "--store", "float32", "--tp")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Now ask:") == 1
    ask = ["--text", TEXTS[3], "--k", "2", "--json"]
    answers = [
        subprocess.run([*command, *ask], capture_output=True, text=True, env=ENVIRONMENT).stdout
        for command in (
            [sys.executable, "-m", "gradsketch", "query", str(tmp_path / "alone")],
            [sys.executable, "-m", "gradsketch", "query", str(tmp_path / "split")],
            [*TORCHRUN, "query", str(tmp_path / "split"), "--tp"],
        )
    ]
    hits = [
        [(h["row"], pytest.approx(h["score"], rel=1e-4)) for h in json.loads(a)["queries"][0]["proponents"]]
        for a in answers
    ]
    assert hits[0] == hits[1] == hits[2]
    for kind, words in (("llama", "num_key_value_heads = 1 on 2 ranks"), ("gpt2", "transformers has no plan")):
        save_model(tmp_path / kind, kind)
        command = [*TORCHRUN, *arguments(tmp_path, tmp_path / "none", "--tp", "--model", str(tmp_path / kind))]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode != 0
        assert words in done.stderr


def test_layers_are_shared_out_whole():
    experts = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    model = nn.Sequential(nn.Embedding(3, 2), nn.Sequential(nn.ModuleList([experts, nn.Linear(2, 2)])))
    assert layers_of(model) == [experts, model[1][0][1]]


@pytest.mark.parametrize("flag", ["--fsdp", "--tp"])
def test_what_goes_not_with_ranks_that_share_a_model(folder, capsys, flag):
    for more, words in (
        ((), f"{flag} without torchrun"),
        (("--device", "cpu"), f"{flag} with --device cpu"),
        (("--device-map", "auto"), f"{flag} with --device-map"),
    ):
        assert main(arguments(folder, folder / "none", flag, *more)) == 1
        assert words in capsys.readouterr().err
    assert main(arguments(folder, folder / "none", "--fsdp", "--tp")) == 1
    assert "--fsdp with --tp" in capsys.readouterr().err


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


def test_who_reads_the_shards(monkeypatch):
    assert ReadingOptions().chosen() == Local()
    assert ReadingOptions("ray", 2, "auto").chosen() == Ray(workers=2, address="auto")
    for lonely in (ReadingOptions(workers=2), ReadingOptions(address="auto")):
        with pytest.raises(InputError, match="--engine ray"):
            lonely.chosen()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--engine ray under torchrun"):
        ReadingOptions("ray").chosen()


def questions(folder, index, *more):
    """Return the arguments of a query and of a selection."""
    query = ["query", str(index), "--text", TEXTS[0], "--k", "3", "--device", "cpu", "--json"]
    select = ["select", str(index), "--for", str(folder / "data.jsonl"), "--keep", "3", "--device", "cpu", "--json"]
    return [*query, *more], [*select, *more]


def test_without_ray(folder, alone, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    commands = [arguments(folder, folder / "none"), *questions(folder, folder / "alone")]
    for command in commands:
        assert main([*command, "--engine", "ray"]) == 1
        assert capsys.readouterr().err.count("no module named ray") == 1


def test_the_options_reach_the_readers(folder, alone, monkeypatch, capsys):
    """Parts are done in this process: that tasks of a cluster do them is seen in tests/attribution/test_engine.py."""
    for command in questions(folder, folder / "alone"):
        assert main(command) == 0
        expected, engines = json.loads(capsys.readouterr().out), []
        monkeypatch.setattr(Ray, "reading", lambda engine, seen=engines: (seen.append(engine), Local().reading())[1])
        assert main([*command, "--engine", "ray", "--workers", "2"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {k: v for k, v in found.items() if k not in ("cost", "crc32")} == {
            k: v for k, v in expected.items() if k not in ("cost", "crc32")
        }
        assert set(engines) == {Ray(workers=2)}


@pytest.mark.slow
def test_ray_starts_and_ends_with_the_command(folder, alone):
    pytest.importorskip("ray")
    more = ("--engine", "ray", "--workers", "2")
    command = [sys.executable, "-m", "gradsketch", *arguments(folder, folder / "ray", *more)]
    assert_builds(command, folder / "ray", alone)
    assert not left_behind(f"GRADSKETCH_TEST={folder / 'ray'}")
