"""gradsketch select, as typed."""

import json

import pytest
from small_model import TEXTS, save_model, write_rows

from gradsketch.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("select")
    save_model(path / "model")
    rows = [{"text": text, "half": i % 2} for i, text in enumerate(TEXTS)]
    write_rows(path / "data.jsonl", [*rows, rows[3]])
    write_rows(path / "target.jsonl", [{"text": TEXTS[3]}])
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


def test_the_data_stays_where_it_is_and_other_data_is_refused(folder, capsys, tmp_path):
    before = (folder / "data.jsonl").read_bytes()
    assert select(folder, "--keep", "1", "--out", str(folder / "data.jsonl")) == 1
    assert "from which the data is read" in capsys.readouterr().err
    assert (folder / "data.jsonl").read_bytes() == before
    (tmp_path / "other.jsonl").write_bytes(b"".join(before.splitlines(keepends=True)[::-1]))
    out = tmp_path / "kept.jsonl"
    assert select(folder, "--keep", "1", "--data", str(tmp_path / "other.jsonl"), "--out", str(out)) == 1
    assert "another content or order" in capsys.readouterr().err
    assert not out.exists()


def test_rows_are_written_under_their_own_names(folder, tmp_path):
    rows = [{"question": text.rsplit(" ", 1)[0], "reply": f" {text[-1]}"} for text in TEXTS]
    write_rows(tmp_path / "qa.jsonl", rows)
    named = ["--prompt-column", "question", "--answer-column", "reply", "--d", "64"]
    data = str(tmp_path / "qa.jsonl")
    assert main(["index", str(tmp_path / "i"), "--model", str(folder / "model"), "--data", data, *named]) == 0
    out = tmp_path / "kept.jsonl"
    assert main(["select", str(tmp_path / "i"), "--for", data, "--keep", "2", "--out", str(out)]) == 0
    assert all(row in rows for row in lines(out))


def test_a_run_file_of_another_program_is_left_alone(folder, capsys, tmp_path):
    (tmp_path / "run.json").write_text('{"mine": true}')
    command = ["index", str(tmp_path), "--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    assert main(command) == 1
    assert "which is no run file of gradsketch" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": '{"mine": true}'}


def test_a_folder_of_the_home_is_where_it_was_typed(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["index", "~/i", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--d", "64"]
    assert main(command) == 0
    assert main(["verify", "~/i"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i"]
    assert (tmp_path / "i" / "run.json").is_file()
