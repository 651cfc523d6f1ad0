"""Columns line up whatever stands in them, and colour stays out of files."""

import io

from gradsketch.cli.terminal import Terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_columns_line_up_with_wide_letters_accents_and_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal(Screen())
    out.table(["name", "score", "x"], [["日本", "0.5", "a"], [out.good("Bogota\u0301"), "12", "b"]])
    lines = out.stream.getvalue().strip("\n").split("\n")
    assert lines[1] == "  日本       0.5   a"
    assert lines[2].replace("\x1b[32m", "").replace("\x1b[0m", "") == "  Bogota\u0301      12   b"
    assert lines[0] == "  \x1b[2mname     score   x\x1b[0m"


def test_no_escapes_in_files_or_where_colour_is_unwanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    for stream in (io.StringIO(), Screen()):
        out = Terminal(stream)
        out.table(["a"], [[out.bad("b")]])
        out.title("c")
        assert "\x1b" not in stream.getvalue()


def test_a_stage_leaves_one_line_with_its_seconds():
    stream = io.StringIO()
    with Terminal(stream).stage("Count", 3) as advance:
        for _ in range(3):
            advance(1)
    assert stream.getvalue().startswith("  ✓ Count  0.0 s\n")


def test_a_stage_that_fails_says_nothing_of_success():
    stream = io.StringIO()
    try:
        with Terminal(stream).stage("Count", 3):
            raise ValueError
    except ValueError:
        pass
    assert "✓" not in stream.getvalue()
