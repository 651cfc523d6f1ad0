"""Rows that are the entries of one JSON list: found in one pass that holds an entry at a time, and parsed when read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from gradsketch.errors import InputError
from gradsketch.reading.blocks import ParsedBlock
from gradsketch.reading.lines import LONGEST, TextRows, json_lines, json_row, refuse_other_text
from gradsketch.reading.marks import Marker, Marks
from gradsketch.reading.rows import FileRows, Row
from gradsketch.reading.sources import PIECE, Source, whole

__all__ = ["json_file"]

_BOM = "\ufeff"
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def json_file(source: Source) -> FileRows:
    """Open a JSON file: a list, or lines under the name of one.

    Raises:
        InputError: it cannot be parsed, or holds something else than a list.
    """
    refuse_other_text(source)
    if _holds_lines(source):
        return json_lines(source)
    marks = whole(source.name, lambda: _mark_entries(source))
    return TextRows(source, marks, partial(_Entries, source))


class _Entries(ParsedBlock):
    """Some bytes of a file that begin with an entry of its list, and hold whole entries."""

    def __init__(self, source: Source, data: bytes, first: int, line: int) -> None:
        self.first, self.nbytes, self._source = first, len(data), source
        self._texts = [text for _, text in _Scan([data]).entries()]
        self.count = len(self._texts)

    def place(self, j: int) -> str:
        return f"{self._source.name}, entry {self.first + j + 1}"

    def parsed(self, j: int) -> Row:
        return json_row(self._texts[j])


class _Scan:
    """Reads a JSON list from pieces of a file, of which little more than an entry is held at a time."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._decoder = iter(pieces), codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._counted = 0  # so many letters of the text are counted in ``bytes``
        self.bytes, self.found = 0, 0

    def letter(self) -> str:
        """Return the next letter that is no white space, or nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = self._at if space is None else space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                self._count()
                return ""

    def take(self, letter: str) -> bool:
        """Go past a letter if it is the next one."""
        taken = self.letter() == letter
        self._at += taken
        return taken

    def entries(self) -> Iterator[tuple[int, str]]:
        """Yield the first byte and the text of every entry up to the end of the list, or of the pieces.

        Raises:
            ValueError: something is no JSON; the message says which entry.
        """
        while self.letter() not in ("", "]"):
            self.found += 1
            byte, end = self._count(), self._end()
            text, self._at = self._text[self._at : end], end
            if self.take(","):
                if self.letter() == "]":
                    raise ValueError(f"a comma behind entry {self.found}, which is the last")
            elif self.letter() not in ("", "]"):
                raise ValueError(f"no comma behind entry {self.found}")
            yield byte, text

    def _end(self) -> int:
        """Return where the entry that begins here ends."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LONGEST or not self._read():
                    raise ValueError(f"entry {self.found}: {error.msg}") from error
            else:
                if end < len(self._text) or not self._read():  # a number may go on in the next piece
                    return end

    def _read(self) -> bool:
        """Read as much again as is left, so that a long entry is not parsed at each of its pieces."""
        self._count()
        self._text, self._at, self._counted = self._text[self._at :], 0, 0
        parts, have = [self._text], 0
        while have <= len(self._text):
            piece = next(self._pieces, None)
            parts.append(self._decoder.decode(piece or b"", final=piece is None))
            have += len(parts[-1])
            if piece is None:
                break
        self._text = "".join(parts)
        return have > 0

    def _count(self) -> int:
        """Return how many bytes come before the present place."""
        self.bytes += len(self._text[self._counted : self._at].encode())
        self._counted = self._at
        return self.bytes


def _mark_entries(source: Source) -> Marks:
    scan, marker = _Scan(source.pieces()), Marker()
    scan.take(_BOM)
    if not scan.take("["):
        holds = {"{": "an object", '"': "a text"}.get(scan.letter(), "no list")
        raise InputError(f"{source.name} holds {holds}", "a list of objects", "Write it as .jsonl")
    starts: list[int] = []
    for byte, _ in scan.entries():
        if starts and byte - starts[0] > PIECE:
            _add(marker, starts)
            starts = []
        starts.append(byte)
    _add(marker, starts)
    if not scan.take("]"):
        raise ValueError(f"the list does not end behind entry {scan.found}")
    if scan.letter():
        raise ValueError("something stands behind the end of the list")
    return marker.marks(scan.bytes)


def _add(marker: Marker, starts: list[int]) -> None:
    marker.add(np.array(starts, dtype=np.int64), np.zeros(len(starts), dtype=np.int64))


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
