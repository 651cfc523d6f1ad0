"""Texts for a screen: made printable, and in columns as wide as their widest cell."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence

__all__ = ["Painted", "aligned", "one_line", "printable", "wrapped"]

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"[-+±]?[\d.,]+(e[-+]?\d+)?|[-+]?inf|nan|[-–]|")

# Control characters have pictures of their own. C1 controls, line separators, and what turns the order of the letters
# around it have none. The marks of direction have no width, so nothing is seen of them anyway.
_PICTURES: dict[int, int | str | None] = {**{code: 0x2400 + code for code in range(32)}, 0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_PICTURES |= dict.fromkeys([0x061C, 0x200E, 0x200F])
_PICTURES_BUT_LINES = {code: shown for code, shown in _PICTURES.items() if code not in (9, 10)}


class Painted(str):
    """A text with colours of our own, which is printable as it is."""


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text that a terminal or a page shows as it is and obeys in nothing.

    Data may hold escape sequences that move the cursor or rename the window, line ends that fake a line of ours,
    overrides of the reading direction, and halves of surrogate pairs. With ``lines``, line feeds and tabs stay.
    """
    if isinstance(text, Painted):
        return text
    shown = text.translate(_PICTURES_BUT_LINES if lines else _PICTURES)
    return shown.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str, width: int | None = None) -> str:
    """Return a text with its white space as single spaces, made printable, and cut to so many characters."""
    text = " ".join(text.split())
    return printable(text if width is None or len(text) <= width else text[: width - 1] + "…")


def wrapped(text: str, width: int, *, hanging: int = 0) -> str:
    """Return a text whose paragraphs are broken into lines of at most so many characters where words allow it."""
    fill = textwrap.TextWrapper(
        max(width, hanging + 20), subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False
    )
    return "\n\n".join(fill.fill(paragraph) for paragraph in text.split("\n\n"))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the header and the rows as lines of one width per column; columns of numbers stand to the right."""
    header, rows = [printable(cell) for cell in header], [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    right = [all(_NUMBER.fullmatch(_ESCAPE.sub("", cell)) for cell in column) for column in zip(*rows, strict=True)]
    right = right or [False] * len(header)
    return [
        "   ".join(_padded(cell, width, r) for cell, width, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    """Return how many cells a text takes on screen: none for escapes and combining marks, two for wide characters."""
    plain = _ESCAPE.sub("", text)
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in plain
    )
