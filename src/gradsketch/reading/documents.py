"""Data that is read whole: a JSON list, and a folder of texts, of which each file is a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gradsketch.errors import InputError
from gradsketch.reading.lines import json_lines, refuse_other_text
from gradsketch.reading.rows import FileRows, Row, as_row, bad_row, each_key_once
from gradsketch.reading.sources import Source, whole

__all__ = ["TextFiles", "json_document"]


class _List(FileRows):
    """Rows of a JSON file that is one list."""

    def __init__(self, source: Source, values: list[Any]) -> None:
        super().__init__(source.name)
        self._source, self._values = source, values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, i: int) -> Row:
        try:
            return as_row(self._values[i])
        except ValueError as error:
            raise bad_row(self.where(i), error) from error

    def where(self, i: int) -> str:
        return f"{self._source.name}, entry {i + 1}"


class TextFiles(FileRows):
    """One row a text file, with its path, in the order of their paths."""

    def __init__(self, folder: str, sources: Sequence[Source]) -> None:
        super().__init__(folder)
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    def read(self, i: int) -> Row:
        source = self._sources[i]
        try:
            text = b"".join(source.pieces()).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise bad_row(self.where(i), error) from error
        return {"text": text.replace("\r\n", "\n"), "path": source.name.partition("/")[2] or source.name}

    def where(self, i: int) -> str:
        return self._sources[i].name


def json_document(source: Source) -> FileRows:
    """Open a JSON file: a list, or lines under the name of one.

    Raises:
        InputError: it cannot be parsed, or holds something else than a list.
    """
    refuse_other_text(source)
    if _holds_lines(source):
        return json_lines(source)
    values = whole(source.name, lambda: _parsed(b"".join(source.pieces())))
    if not isinstance(values, list):
        raise InputError(f"{source.name} holds a {type(values).__name__}", "a list of objects", "Write it as .jsonl")
    return _List(source, values)


def _parsed(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=each_key_once)


def _holds_lines(source: Source) -> bool:
    """Whether the first line is an object by itself, and something follows it."""
    head = whole(source.name, lambda: next(source.pieces(), b"")).removeprefix(b"\xef\xbb\xbf").lstrip()
    first, _, rest = head.partition(b"\n")
    if not (head.startswith(b"{") and rest.strip()):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False
