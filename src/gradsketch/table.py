"""Columns of text, as wide as their widest cell on a screen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["aligned"]

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"[-+±]?[\d.,]+(e[-+]?\d+)?|[-+]?inf|nan|[-–]|")


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the header and the rows as lines of one width per column; columns of numbers stand to the right."""
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
