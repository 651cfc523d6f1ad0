"""What a person sees: one line for whatever goes wrong, nothing that a terminal would obey, and no traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import tyro

import gradsketch as gs
from gradsketch.attribution.results import Cost, Hit, Hits, QueryHits, SelfInfluence, TokenContribution
from gradsketch.attribution.scores import KINDS
from gradsketch.cli import Command, main, register
from gradsketch.plain import as_json
from gradsketch.table import Painted, aligned, one_line, printable

SRC = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
HOSTILE = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202eevil\u2066\nFAKE LINE\r\u2028\u0085\x7f\ud800\u200f."
OBEYED = {
    *map(chr, (*range(32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)))
}


@dataclass(frozen=True)
class Nothing:
    """Fail."""

    word: tyro.conf.Positional[str] = "x"
    """Which."""


@pytest.fixture
def raising(monkeypatch):
    """A command that raises what it is given."""
    command_line = sys.modules["gradsketch.cli.main"]
    monkeypatch.setattr(command_line, "COMMANDS", dict(command_line.COMMANDS))

    def install(error):
        def run(options):
            raise error

        register(Command("fail", "fail", Nothing, run))

    return install


def harmless(text):
    return not OBEYED & set(text.replace("\n", "")) and text.encode()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        RuntimeError("enforce fail at alloc_cpu.cpp:127\n. you tried to allocate 96000000 bytes.\nC++ stack"),
        KeyError("x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ValueError(HOSTILE),
    ],
)
def test_any_exception_is_one_line(error, raising, capsys, monkeypatch):
    raising(error)
    monkeypatch.delenv("GRADSKETCH_DEBUG", raising=False)
    assert main(["fail"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gradsketch fail: {type(error).__name__}")
    assert line.endswith("GRADSKETCH_DEBUG=1 shows the traceback.")
    assert harmless(line)
    monkeypatch.setenv("GRADSKETCH_DEBUG", "1")
    assert main(["fail"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_too(raising, capsys):
    raising(gs.InputError(f"no folder {HOSTILE}", "a folder", "Check the path"))
    assert main(["fail"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "GRADSKETCH_DEBUG" not in line
    assert harmless(line)


def test_interrupted(raising, capsys):
    raising(KeyboardInterrupt())
    assert main(["fail"]) == 130
    assert capsys.readouterr().err == "\ngradsketch fail: interrupted\n"


def test_version_and_a_word_that_is_nearly_a_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gradsketch {gs.__version__}\n"
    assert main(["qury"]) == 2  # codespell:ignore qury
    assert "no command 'qury'. Did you mean query?" in capsys.readouterr().err


def run(command, **options):
    environment = {**ENVIRONMENT, **options.pop("env", {})}
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, **options)


@pytest.mark.parametrize("words", ["--help", "index --help", "--version"])
def test_a_reader_that_leaves_is_no_error(words):
    """The pipe is closed before the first word is written, so that writing fails in any case."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gradsketch", *words.split()]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_behind_the_output():
    done = run(["bash", "-c", f"{sys.executable} -m gradsketch --help > /dev/full"])
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert "No space left" in line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_output_of_few_letters(encoding):
    done = run([sys.executable, "-m", "gradsketch", "index", "--help"], env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"classification" in done.stdout


def test_json_survives_an_output_of_few_letters():
    program = (
        "import sys; from gradsketch.cli.main import _escape_what_the_terminal_lacks as e; from gradsketch.plain import"
        " as_json; e(); print(as_json({'text': 'Chișinău 🗼 日本'}))"
    )
    done = run([sys.executable, "-c", program], env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout) == {"text": "Chișinău 🗼 日本"}


@pytest.mark.parametrize("command", ["", *sys.modules["gradsketch.cli.main"].COMMANDS])
def test_help_fits_forty_columns(command):
    done = run([sys.executable, "-m", "gradsketch", *command.split(), "--help"], env={"COLUMNS": "40"})
    assert done.returncode == 0
    long = [line for line in done.stdout.decode().splitlines() if len(line) > 40 and not line.startswith("usage:")]
    assert not long


def test_ctrl_c_while_it_starts():
    """Imported by a module of ours; Python's own start, some hundredths of a second, has its own ways."""
    for delay in (0.2, 0.3, 0.4, 0.5):
        command = [sys.executable, "-m", "gradsketch", "index", "x", "--model", "./none", "--data", "none.jsonl"]
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert "Traceback" not in errors or "gradsketch/cli" not in errors
        assert process.returncode in (130, -signal.SIGINT)


def hostile_hits():
    tokens = (TokenContribution(HOSTILE, 0.5),)
    hit = Hit(1, 0, HOSTILE, 0.5, HOSTILE, 0.1, 1.0, {HOSTILE: HOSTILE}, tokens)
    nothing = Hit(2, 1, HOSTILE, 0.5, None, 0.1, 1.0, {HOSTILE: HOSTILE})
    query = QueryHits(HOSTILE, HOSTILE, 0.1, 1.0, (hit, nothing), (hit,))
    return Hits((query,), KINDS["ridge"].described(0.1), "runs/x", 2, 8, Cost(0.1, 0.1, 0.1, 1, 2))


def test_data_is_made_printable_in_every_table():
    hits = hostile_hits()
    influence = SelfInfluence((HOSTILE,), torch.ones(1), torch.ones(1), hits.score, 0.1)
    for text in (str(hits), hits.summary(), str(influence), influence.summary(), *aligned([HOSTILE], [[HOSTILE]])):
        assert harmless(text)
    assert not any(line.startswith("FAKE") for line in str(hits).splitlines())
    assert "evil" in str(hits)


def test_json_for_a_terminal_loses_nothing():
    text = hostile_hits().to_json()
    assert harmless(text)
    assert json.loads(text)["queries"][0]["text"] == HOSTILE
    assert json.loads(as_json([float("nan"), HOSTILE])) == ["NaN", HOSTILE]


def test_printable():
    assert printable("a\tb\x1b\x9b\x7f") == "a␉b␛\ufffd␡"
    assert printable("a\tb\nc\r", lines=True) == "a\tb\nc␍"
    assert printable("日本 🗼 عاصمة\u200d") == "日本 🗼 عاصمة\u200d"
    assert printable(Painted("\x1b[1mx\x1b[0m")) == "\x1b[1mx\x1b[0m"
    assert one_line(" a \n b ", 3) == "a b"
    assert one_line("abcdef", 4) == "abc…"


def test_a_command_to_copy_is_quoted():
    from gradsketch.cli.index import _sentence

    sentence = _sentence(
        {"index": "runs/my facts; rm -rf", "rows": 1, "bad_rows": 1, "d": 4, "seconds": 0.1}, ["row 7: \x1b[2J"]
    )
    command = shlex.split(sentence.split("Now ask: ")[1])
    assert command == ["gradsketch", "query", "runs/my facts; rm -rf", "--text", "..."]
    assert "1 row, d = 4, 1 bad row left out" in sentence
    assert "left out: row 7: " in sentence
    assert "\x1b" not in sentence
