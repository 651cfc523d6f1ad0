"""The recorder understands what a terminal is told, and its picture is whole, readable and of no machine."""

import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
RECORDER = runpy.run_path(str(ROOT / "tools/record_demo.py"))
PICTURE = ROOT / "docs/images/demo.svg"
SVG = "{http://www.w3.org/2000/svg}"


def shown(*written):
    screen = RECORDER["Screen"]()
    for when, text in enumerate(written):
        screen.write(text, float(when))
    return ["".join(character for character, _ in line.cells) for line in screen.lines], screen


def test_a_bar_that_is_drawn_over_leaves_nothing():
    lines, screen = shown("  load 10%\r  load 90%", "\r          \r", "done\r\n", "\x1b[1mnext\x1b[0m")
    assert [line.rstrip() for line in lines] == ["done", "next"]
    assert [line.changed for line in screen.lines] == [2.0, 3.0]
    assert {style for _, style in screen.lines[1].cells} == {"bold"}


def test_erasing_to_the_end_of_a_line():
    lines, _ = shown("abcdef\rxy\x1b[K")
    assert lines == ["xy"]


def test_the_picture_has_columns_where_the_terminal_had_them(tmp_path):
    screen = RECORDER["Screen"]()
    screen.write(f"  a <b>   c & d\r\n{tmp_path.resolve()}/page.html\r\nNext, with your own\r\nleft out", 24.0)
    root = ElementTree.fromstring(RECORDER["drawn"](screen, "make demo", tmp_path))
    texts = {element.text: element.attrib for element in root.iter(f"{SVG}text")}
    assert list(texts) == ["$ make demo", "a <b>", "c & d", "page.html"]
    margin, width = RECORDER["MARGIN"], RECORDER["WIDTH"]
    assert float(texts["c & d"]["x"]) == margin + 10 * width
    assert float(texts["c & d"]["textLength"]) == 5 * width
    delays = [element.attrib["style"] for element in root.iter(f"{SVG}g")]
    assert delays == ["animation-delay:0.00s", *["animation-delay:12.00s"] * 2]


def test_a_command_that_fails_is_no_recording(tmp_path):
    with pytest.raises(SystemExit, match="ended with 3"):
        RECORDER["recorded"]([sys.executable, "-c", "print('x'); raise SystemExit(3)"], tmp_path)


def test_what_runs_in_the_terminal_takes_it_for_one(tmp_path):
    code = "import sys, os; print(sys.stdout.isatty(), os.get_terminal_size().columns)"
    screen = RECORDER["recorded"]([sys.executable, "-c", code], tmp_path)
    assert "".join(c for c, _ in screen.lines[0].cells) == f"True {RECORDER['COLUMNS']}"


def test_the_committed_picture_is_of_a_whole_run_and_of_no_machine():
    text = PICTURE.read_text(encoding="utf-8")
    said = "\n".join(element.text for element in ElementTree.fromstring(text).iter(f"{SVG}text"))
    assert "Who taught it that?" in said
    assert "6 of 6 answers are true" in said
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(?<!gradsketch-demo)/(?:root|home|tmp|work|Users)\b", said)
