"""gradsketch explore: what it needs, what it prints, and how it ends."""

import builtins
import os
import re
import signal
import threading

import pytest

from cli.small_model import TEXTS, save_model, write_rows
from explorer import desk
from gradsketch.cli import main
from gradsketch.cli.explore import ExploreOptions, opened
from gradsketch.explorer.forms import Question
from gradsketch.explorer.session import Ask

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return desk.stand_in(tmp_path_factory.mktemp("explore"))


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_told_in_one_line(folder, capsys, monkeypatch, package):
    usual = builtins.__import__

    def without(name, *args, **more):
        if name.partition(".")[0] == package:
            raise ImportError(f"no {package}", name=package)
        return usual(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["explore", str(folder)]) == 1
    told = capsys.readouterr().err
    assert f"no module named {package}" in told
    assert "pip install 'gradsketch[web]'" in told
    assert len(told.splitlines()) == 1


def test_a_wrong_folder_is_told_in_one_line(tmp_path, capsys):
    assert main(["explore", str(tmp_path), "--no-browser"]) == 1
    told = capsys.readouterr().err
    assert "index.json" in told
    assert len(told.splitlines()) == 1


def test_a_port_that_is_taken_is_told_in_one_line(folder, capsys):
    with desk.served(desk.session(folder, model=False)) as link:
        port = re.search(r":(\d+)/", link)[1]
        assert main(["explore", str(folder), "--port", port, "--no-browser"]) == 1
    assert main(["explore", str(folder), "--port", "70000", "--no-browser"]) == 1
    assert [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"gradsketch explore: --port {port}",
        "gradsketch explore: --port 70000",
    ]


def test_a_model_that_was_named_and_is_not_there_is_an_error(folder, tmp_path, capsys):
    assert main(["explore", str(folder), "--model", str(tmp_path / "nothing"), "--no-browser"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_it_opens_prints_one_link_and_ends_with_a_line(folder, capsys, monkeypatch):
    seen = {}

    def visit(link):
        def go():
            answer = httpx.get(link, follow_redirects=True)
            seen["page"], seen["place"] = answer.text, str(answer.url)
            os.kill(os.getpid(), signal.SIGINT)

        seen["link"] = link
        threading.Thread(target=go).start()
        return True

    monkeypatch.setattr("webbrowser.open", visit)
    assert main(["explore", str(folder)]) == 130
    told = capsys.readouterr()
    assert "<title>gradsketch explorer</title>" in seen["page"]
    token = seen["link"].partition("?token=")[2]
    assert len(token) >= 40
    assert token not in seen["place"]
    assert re.findall(r"http://\S+", told.out) == [seen["link"]]
    assert "without a model" in told.out
    assert told.err == "\ngradsketch explore: interrupted\n"


def test_the_model_of_the_index_is_asked(tmp_path, capsys):
    save_model(tmp_path / "model")
    write_rows(tmp_path / "data.jsonl", [{"text": text, "kind": str(i % 2)} for i, text in enumerate(TEXTS)])
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--d", "64", "--device", "cpu"]
    assert main(["index", str(tmp_path / "index"), *words]) == 0
    session = opened(ExploreOptions(str(tmp_path / "index"), device="cpu"))
    assert session.about().loaded == f"{tmp_path / 'model'} (CausalLM)"
    asked = Ask((Question("the capital of a is"),), tokens=2, k=3)
    answer = session.ask(asked)
    assert len(answer.asked.questions[0].answer.split()) == 2
    assert len(session.explain(answer.id).hits[0][0].tokens) > 3
    assert main(["query", str(tmp_path / "index"), "--device", "cpu", "--k", "3", "--prompt", "the capital of a is",
                 "--answer", answer.asked.questions[0].answer]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{answer.hits[0][0].score:+.4g}" in printed
