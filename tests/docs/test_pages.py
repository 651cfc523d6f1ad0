"""Every Python block of the documentation runs, in order, and prints what the page says it prints.

A page is one program: its blocks share names, and nothing hidden goes before the first. The README's stand alone:
each runs when it is pasted into a fresh interpreter. A ``text`` block right after a ``python`` block is what that block
prints, with ``...`` for what may differ. A block, or a comment ``<!-- setup``, may carry a line ``# needs: package``,
without which the page is skipped.
"""

import contextlib
import doctest
import importlib.util
import io
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE = "README.md"
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
_BLOCK = re.compile(r"^(?:```|<!-- )(\w+)\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    output: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    blocks = []
    for match, following in zip_longest(found, found[1:]):
        if match[1] not in ("python", "setup"):
            continue
        adjacent = following and following[1] == "text" and not text[match.end() : following.start()].strip()
        blocks.append(
            Block(text.count("\n", 0, match.start()) + 2, match[2], following[2] if following and adjacent else None)
        )
    return blocks


def run(page: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if page.name == ALONE:
            names = {"__name__": "__main__"}
        for package in re.findall(r"^# needs: (\w+)$", block.code, re.MULTILINE):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        printed = io.StringIO()
        # Padded with empty lines, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if block.output is not None:
            same = doctest.OutputChecker().check_output(block.output, printed.getvalue(), _FLAGS)
            assert same, f"{page.name}, line {block.line}, printed\n{printed.getvalue()}instead of\n{block.output}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda p: p.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_nothing_hidden_goes_before_a_page(page):
    hidden = re.findall(r"^<!-- setup\n(.*?)^-->$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [line for code in hidden for line in code.splitlines() if not line.startswith("# needs: ")] == []


def test_blocks_of_the_readme_stand_alone(tmp_path):
    page = tmp_path / ALONE
    page.write_text("```python\nx = 2\n```\n```python\nprint(x)\n```\n")
    with pytest.raises(NameError):
        run(page)


def test_a_wrong_page_is_found_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\nwords\n```python\nprint(x, 'and more')\n```\n```text\n2 ...\n```\n")
    run(page)
    page.write_text(page.read_text().replace("2 ...", "3 ..."))
    with pytest.raises(AssertionError, match=r"line 6, printed\n\s*2 and more"):
        run(page)
    page.write_text("```python\nundefined\n```\n")
    with pytest.raises(NameError):
        run(page)
