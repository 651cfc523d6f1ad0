"""gradsketch index, query, verify and export, as typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradsketch.cli import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SRC = Path(__file__).parents[2] / "src"
WORDS = ["[unk]", "the", "capital", "of", "is", *"abcdefghij", *"0123456789"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random GPT-2 with a tokenizer of words, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("model")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[unk]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[unk]").save_pretrained(path)
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    config.bos_token_id = config.eos_token_id = 0
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    rows = [{"prompt": f"the capital of {a} is", "answer": f" {i}", "half": i % 2} for i, a in enumerate("abcdefghij")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def arguments(model, data, path, *more):
    return ["index", str(path), "--model", str(model), "--data", str(data), "--d", "256", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def index(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "facts"
    assert main(arguments(model, data, path)) == 0
    return path


def test_index_and_query(index, capsys):
    assert main(["query", str(index), "--prompt", "the capital of c is", "--answer", " 2", "--k", "3", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    first = hits["queries"][0]["proponents"][0]
    assert (first["row"], first["text"], first["metadata"]) == (2, "the capital of c is 2", {"half": 0})
    assert hits["score"]["name"] == "ridge"


def test_query_options(index, capsys, tmp_path):
    page = tmp_path / "why.html"
    more = ["--where", "half=1", "--opponents", "1", "--explain", "1", "--html", str(page), "--score", "cosine"]
    assert main(["query", str(index), "--text", "the capital of c is 2", "of of", "--group", *more]) == 0
    shown = capsys.readouterr().out
    assert "1 more" in shown
    assert "opponents" in shown
    assert "of c is" not in shown.split("Query")[1].split("\n", 1)[1]
    assert "<html" in page.read_text(encoding="utf-8")


def test_an_index_in_a_metric(model, data, tmp_path, capsys):
    assert main(arguments(model, data, tmp_path / "facts", "--precondition", "kfac")) == 0
    assert (tmp_path / "facts" / "factors-checkpoint-0.pt").is_file()
    question = ["--prompt", "the capital of c is", "--answer", " 2", "--k", "3", "--explain", "1", "--json"]
    capsys.readouterr()
    assert main(["query", str(tmp_path / "facts"), *question]) == 0
    first = json.loads(capsys.readouterr().out)["queries"][0]["proponents"][0]
    assert first["text"] == "the capital of c is 2"
    assert sum(t["value"] for t in first["tokens"]) + first["beyond_tokens"] == pytest.approx(first["score"])
    assert main(["verify", str(tmp_path / "facts")]) == 0


def test_a_run_file_replays_the_run(index, tmp_path, capsys):
    run = json.loads((index / "run.json").read_text())
    assert run["options"]["d"] == 256
    run["options"]["path"] = str(tmp_path / "again")
    for name, text in (("run.json", json.dumps(run)), ("run.yaml", json.dumps(run))):
        (tmp_path / name).write_text(text)
        assert main(["index", "--config", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == 10
    shards = [sorted(path.glob("checkpoint-0/*.arrow")) for path in (index, tmp_path / "again")]
    assert [a.read_bytes() for a in shards[0]] == [b.read_bytes() for b in shards[1]]
    assert main(["index", "--config", str(tmp_path / "run.json"), "--seed", "1"]) == 1  # a flag overrides
    assert "seed is now 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{}", "[" * 100_000, "[]", '{"command": "query", "options": {}}', '{"command": "index", "options": 3}']
)
def test_unusable_run_files(tmp_path, text, capsys):
    (tmp_path / "run.json").write_text(text)
    assert main(["index", "--config", str(tmp_path / "run.json")]) == 1
    assert "run.json" in capsys.readouterr().err


def test_aliases_and_malformed_yaml_are_refused(tmp_path, capsys):
    pytest.importorskip("yaml")
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    for text in ("\n".join(bomb), "a: [1", "a: !!python/object/apply:os.system ['true']", "- ]"):
        (tmp_path / "run.yaml").write_text(text)
        assert main(["index", "--config", str(tmp_path / "run.yaml")]) == 1
        told = capsys.readouterr().err
        assert "run.yaml cannot be used" in told
        assert len(told.splitlines()) == 1


def test_dry_run(model, data, tmp_path, capsys):
    assert main(arguments(model, data, tmp_path / "i", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows"], plan["missing"]) == (10, 10)
    assert plan["seconds"] > 0
    assert not (tmp_path / "i").exists()


def test_verify(model, data, tmp_path, capsys):
    path = tmp_path / "i"
    main(arguments(model, data, path))
    assert main(["verify", str(path)]) == 0
    assert "sound" in capsys.readouterr().out
    shard = next(path.rglob("*.arrow"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert main(["verify", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["stores"][0]["damaged"][0]["file"] == str(shard)
    assert not found["sound"]
    assert not found["stores"][0]["sound"]


def test_a_damaged_index_is_repaired(model, data, tmp_path, capsys):
    path = tmp_path / "i"
    main(arguments(model, data, path, "--shard-rows", "5"))
    shards = sorted(path.rglob("*.arrow"))
    sound = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(b"")
    shards[1].unlink()
    assert main(["verify", str(path)]) == 1
    assert main(["verify", str(path), "--repair"]) == 0
    assert [shard.read_bytes() for shard in shards] == sound
    shards[1].write_bytes(sound[1][:-9])
    assert main(arguments(model, data, path, "--shard-rows", "5")) == 0
    assert [shard.read_bytes() for shard in shards] == sound
    (path / "run.json").unlink()
    capsys.readouterr()
    assert main(["verify", str(path), "--repair"]) == 1
    assert "without a run.json" in capsys.readouterr().err


def test_a_damaged_run_file_is_told(model, data, tmp_path, capsys):
    main(arguments(model, data, tmp_path / "i"))
    file = tmp_path / "i/run.json"
    file.write_text(file.read_text().replace('"max_length": null', '"max_length": 5'))
    for words in (["verify"], ["query", "--text", "the capital"]):
        assert main([words[0], str(tmp_path / "i"), *words[1:]]) == 1
        told = capsys.readouterr()
        assert "run.json is damaged" in told.out + told.err


def test_a_refused_run_leaves_the_run_file_as_it_is(model, data, tmp_path):
    main(arguments(model, data, tmp_path / "i"))
    file = tmp_path / "i/run.json"
    before = file.read_bytes()
    assert main(arguments(model, data, tmp_path / "i", "--seed", "1")) == 1
    assert file.read_bytes() == before
    file.unlink()
    assert main(arguments(model, data, tmp_path / "i", "--seed", "1")) == 1
    assert not file.exists()


@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
@pytest.mark.parametrize("command", ["spectrum", "dimension"])
def test_refused_work_leaves_another_runs_file_as_it_is(command, model, data, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text("\n".join(data.read_text().splitlines()[:4]))
    words = {
        "spectrum": ["--examples", "2", "--k", "1", "--steps", "4", "--data"],
        "dimension": [
            "--target",
            "3",
            "--test",
            str(data),
            "--d-min",
            "2",
            "--d-max",
            "2",
            "--check-every",
            "1",
            "--train",
        ],
    }[command]
    base = [command, "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "out"), *words]
    assert main([*base, str(data)]) == 0
    before = (tmp_path / "out/run.json").read_bytes()
    assert main([*base, str(tmp_path / "other.jsonl")]) == 1
    told = capsys.readouterr().err
    assert "is now" in told
    assert "delete" in told
    assert (tmp_path / "out/run.json").read_bytes() == before


def test_a_row_that_is_refused_names_the_options_of_the_command_line(model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "the capital"}\n{"text": ""}\n')
    assert main(arguments(model, tmp_path / "rows.jsonl", tmp_path / "i")) == 1
    told = capsys.readouterr().err
    assert "rows.jsonl, line 2" in told
    assert "--skip-bad" in told
    assert "skip_bad" not in told


def test_export(index, tmp_path, capsys):
    pytest.importorskip("pyarrow.parquet")
    assert main(["export", str(index), "--parquet", str(tmp_path / "x.parquet")]) == 0
    assert (tmp_path / "x.parquet").stat().st_size > 0
    assert main(["export", str(index)]) == 1
    assert "--parquet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query", "/nowhere", "--text", "a"], "index.json"),
        (["query", "INDEX", "--text", "a", "--model", "./nowhere"], "no folder './nowhere'"),
        (["query", "INDEX", "--text", "a", "--device", "gpu"], "--device cpu"),
        (["query", "INDEX"], "no query"),
        (["query", "INDEX", "--prompt", "a"], "--answer"),
        (["query", "INDEX", "--text", "a", "--where", "half"], "column=value"),
        (["query", "INDEX", "--text", "a", "--where", "half=x"], "half=x"),
        (["query", "INDEX", "--text", "a", "--damping", "much"], "--damping"),
        (["query", "INDEX", "--text", "a", "--k", "0"], "k=0"),
        (["verify", "/nowhere"], "index.json"),
        (["export", "INDEX", "--checkpoint", "7", "--parquet", "x"], "--checkpoint 7"),
        (["export", "INDEX", "--parquet", "INDEX"], "cannot write"),
        (["export", "INDEX", "--parquet", "/proc/x.parquet"], "cannot write"),
    ],
)
def test_mistakes_are_explained(index, words, message, capsys):
    assert main([str(index) if word == "INDEX" else word for word in words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("default::gradsketch.errors.GradsketchWarning")
def test_a_warning_is_one_line_without_code(model, data, tmp_path, capsys):
    main(arguments(model, data, tmp_path / "i", "--shard-rows", "5"))
    next((tmp_path / "i").rglob("*.arrow")).unlink()
    assert main(["query", str(tmp_path / "i"), "--text", "the capital of c is 2"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "5 of 10 rows" in line]
    assert line.startswith(f"gradsketch query: {tmp_path / 'i'} holds 5 of 10 rows")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nothing.jsonl"], "'nothing.jsonl' does not exist"),
        (["--model", "/nowhere"], "no folder '/nowhere'"),
        (["--task", "classification"], "without weights for score.weight"),
        (["--d", "0"], "d=0. Wanted: a positive integer. Type d=1024"),
        (["--include", "nothing.*"], "matches no parameter"),
        (["--shard-rows", "0"], "shard_rows=0"),
        (["--checkpoints", "/nowhere.pt"], "holds no weights"),
        (["--device", "gpu"], "Type --device cpu"),
        (["--data", "COLUMNS"], "keys question, reply). Wanted: a text, (prompt, answer)"),
    ],
)
def test_mistakes_of_a_new_index_are_explained_and_leave_no_shard(model, data, tmp_path, more, message, capsys):
    (tmp_path / "columns.csv").write_text("question,reply\nthe capital,of\n")
    more = [str(tmp_path / "columns.csv") if word == "COLUMNS" else word for word in more]
    assert main(arguments(model, data, tmp_path / "i", *more)) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("path", ["file", "file/inside", "/proc/gradsketch"])
def test_a_folder_that_cannot_be_made(model, data, tmp_path, path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(arguments(model, data, tmp_path / path)) == 1
    assert re.search("cannot (write|list)", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_an_index_that_goes_on(model, data, tmp_path, sent, code, word):
    """A real process, a real SIGINT or a scheduler's SIGTERM, and the same command again."""
    rows = tmp_path / "many.jsonl"
    rows.write_text("\n".join(data.read_text().splitlines() * 40))
    command = [sys.executable, "-m", "gradsketch", *arguments(model, rows, tmp_path / "i", "--shard-rows", "25")]
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    shards = tmp_path / "i/checkpoint-0"
    deadline = time.monotonic() + 120
    while not (shards.is_dir() and any(shards.glob("*.arrow"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert word in errors
    assert "type the same command to go on" in errors
    assert 1 <= len(list(shards.glob("*.arrow"))) < 16
    assert not list(shards.glob("*.tmp-*"))
    assert main(command[3:]) == 0
    assert main(["verify", str(tmp_path / "i")]) == 0


@pytest.mark.parametrize("command", ["index", "query", "verify", "export"])
def test_help_does_not_wait_for_torch(command):
    program = (
        "import sys\nfrom gradsketch.cli import main\n"
        f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "usage" in done.stdout
