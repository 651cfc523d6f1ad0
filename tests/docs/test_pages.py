"""Every block of code in the README and the documentation runs, and prints what the page says it prints.

* A ``python`` block stands alone: it is pasted into a fresh interpreter, in an empty folder.
* The ``bash`` blocks of a page are typed one after another, in one folder.
* A ``text`` block right after a block is what that prints, with ``...`` for what may differ.
* A block whose first line is ``# needs: `` and a reason is not run. The few reasons are ``NOT_HERE``.

By default Python's blocks run in this process, each with names and a folder of its own, all but the ``LONG`` ones, and
commands are parsed. ``-m slow`` starts an interpreter for every block, and runs the commands.
"""

import contextlib
import doctest
import functools
import io
import os
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from gradsketch.cli.main import COMMANDS
from gradsketch.cli.run_file import parse
from gradsketch.demo import animals, clouds, digits, invented
from gradsketch.demo.packages import AbsentError
from pasted import paste

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
NOT_HERE = {"a cluster", "the network", "a browser", "this repository, and some minutes"}
LANGUAGES = {"python", "bash", "text", "{eval-rst}", "{toctree}", "{glossary}"}
OPTIONAL = {"transformers", "pandas", "matplotlib", "scikit-learn", "sklearn", "peft", "jax"}
_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"# needs: (.*)\n")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECONDS = 300  # for one block in its own interpreter
LONG = ("removal_check", "dimension_curve", "Trainer(", "retrained(")  # what a block does that trains several models


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    output: str | None

    @property
    def needs(self) -> str | None:
        found = _NEEDS.match(self.code)
        return found and found[1]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    blocks = []
    for match, following in zip_longest(found, found[1:]):
        adjacent = following and following[1] == "text" and not text[match.end() : following.start()].strip()
        output = following[2] if following and adjacent else None
        line = text.count("\n", 0, match.start()) + 2
        blocks.append(Block(page.stem, line, match[1], match[2], output))
    return [block for block in blocks if not languages or block.language in languages]


def pythons(without: tuple[str, ...] = ()):
    blocks = [block for page in PAGES for block in blocks_of(page, "python") if not block.needs]
    short = [block for block in blocks if not any(text in block.code for text in without)]
    return [pytest.param(block, id=block.place) for block in short]


def shell_pages():
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks_of(page, "bash")]


def require_printed(block: Block, printed: str) -> None:
    if block.output is not None:
        same = doctest.OutputChecker().check_output(block.output, printed, _FLAGS)
        assert same, f"{block.place} printed\n{printed}instead of\n{block.output}"


def run(block: Block) -> None:
    """Paste a block into this process; skip it where an optional package is not installed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            paste(block.code, {"__name__": "__main__"})
    except (ImportError, AbsentError) as error:
        if absent := missing(f"{type(error).__name__}: {error}"):
            pytest.skip(absent)
        raise
    require_printed(block, printed.getvalue())


def missing(said: str) -> str | None:
    """Return the last line of an error if it is that an optional package is not installed."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    found = re.search(r"No module named '(\w+)|AbsentError: no ([\w-]+)|gradsketch\.jax needs (\w+)", last)
    return last if found and (found[1] or found[2] or found[3]).lower() in OPTIONAL else None


@pytest.fixture
def ready(monkeypatch):
    """Train the models of the demonstrations once, and hand out copies."""
    names = {invented: "invented_capitals", digits: "taught_digits", clouds: "three_clouds", animals: "taught_animals"}
    for module, name in names.items():
        monkeypatch.setattr(module, name, functools.partial(copied, getattr(module, name)))


@functools.cache
def made(make):
    return make()


def copied(make, *arguments):
    return make(*arguments) if arguments else deepcopy(made(make))


@pytest.mark.parametrize("block", pythons(without=LONG))
def test_a_block_stands_alone(block, tmp_path, monkeypatch, ready):
    monkeypatch.chdir(tmp_path)
    run(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", pythons())
def test_a_block_runs_in_a_fresh_interpreter(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests/pasted.py")],
        input=block.code, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=SECONDS,
    )  # fmt: skip
    if done.returncode and (absent := missing(done.stderr)):
        pytest.skip(absent)
    assert done.returncode == 0, f"{block.place}\n{done.stderr}"
    require_printed(block, done.stdout)


def environment(*first: Path) -> dict[str, str]:
    path = os.pathsep.join([*map(str, first), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")}


_WRITTEN_DOWN = """
PATH=
command_not_found_handle() { :; }
gradsketch() { printf '%s\\0' "$#" "$@" >> "$GIVEN"; }
torchrun() { while [ "$1" != gradsketch ]; do shift; done; shift; gradsketch "$@"; }
"""


def commands_of(block: Block, file: Path) -> list[list[str]]:
    """Return the arguments of every ``gradsketch`` that a shell block types; nothing else in it is run."""
    subprocess.run(
        ["/bin/bash", "-c", _WRITTEN_DOWN + block.code], env={"GIVEN": str(file)}, capture_output=True, cwd=file.parent
    )
    words = file.read_text(encoding="utf-8").split("\0")[:-1] if file.exists() else []
    commands = []
    while words:
        count = 1 + int(words[0])
        commands.append(words[1:count])
        words = words[count:]
    return commands


@pytest.mark.parametrize("page", shell_pages())
def test_commands_are_understood(page, tmp_path):
    """Every command has a name and options that there are, also where it is not run."""
    for block in blocks_of(page, "bash"):
        commands = commands_of(block, tmp_path / f"given-{block.line}")
        assert len(commands) == len(re.findall(r"(?:^|[|-] )gradsketch ", block.code, re.MULTILINE)), block.place
        for name, *arguments in commands:
            parse(COMMANDS[name].options, name, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("page", shell_pages())
def test_commands_run(page, tmp_path):
    program = tmp_path / "bin/gradsketch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gradsketch "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    blocks = [block for block in blocks_of(page, "bash") if not block.needs]
    for block in blocks:
        typed = ["bash", "-e", "-o", "pipefail", "-c", block.code]
        done = subprocess.run(
            typed, capture_output=True, text=True, cwd=folder, env=environment(program.parent), timeout=2 * SECONDS
        )
        assert done.returncode == 0, f"{block.place}\n{done.stdout}{done.stderr}"
        require_printed(block, done.stdout)
    if not blocks:
        pytest.skip("none of its commands can run here")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_nothing_is_hidden_and_every_block_is_of_a_known_kind(page):
    assert "<!-- setup" not in page.read_text(encoding="utf-8")
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    assert {block.needs for block in blocks_of(page)} <= NOT_HERE | {None}


@pytest.mark.parametrize(
    ("said", "skipped"),
    [
        ("ModuleNotFoundError: No module named 'peft'", True),
        ("ModuleNotFoundError: No module named 'pandas.core'", True),
        ("ImportError: gradsketch.jax needs JAX: pip install ...", True),
        ("gradsketch.demo.packages.AbsentError: no scikit-learn, which holds the digits. Wanted: ...", True),
        ("ModuleNotFoundError: No module named 'gradsketch.demos'", False),
        ("ImportError: cannot import name 'peft' from 'gradsketch'", False),
        ("ModuleNotFoundError: No module named 'peft'\nValueError: something else", False),
        ("", False),
    ],
)
def test_only_an_optional_package_may_be_missing(said, skipped):
    assert (missing(said) is not None) == skipped


def test_a_block_that_leans_on_another_is_found_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n```python\nprint(x)\n```\n")
    first, second = blocks_of(page)
    run(first)
    with pytest.raises(NameError):
        run(second)


def test_a_wrong_page_is_found_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\nprint(x, 'and more')\n```\n\n```text\n2 ...\n```\n")
    run(blocks_of(page, "python")[0])
    page.write_text(page.read_text().replace("2 ...", "3 ..."))
    with pytest.raises(AssertionError, match=r"page:2 printed\n\s*2 and more"):
        run(blocks_of(page, "python")[0])


@pytest.mark.parametrize(
    "code", ["for i in range(2):\n    i\nprint(i)", "def f():\n    x = 1\n\n    return x\n", "x = ("]
)
def test_what_cannot_be_pasted_is_found_out(code):
    with pytest.raises(SyntaxError):
        paste(code, {})
