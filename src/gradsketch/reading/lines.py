"""Rows that are lines: JSON lines and plain text, packed or not."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradsketch.errors import InputError
from gradsketch.reading.blocks import Block, BlockRows, ParsedBlock
from gradsketch.reading.marks import Marks, mark_lines, newlines, not_blank
from gradsketch.reading.rows import Row, as_row, each_key_once
from gradsketch.reading.sources import Source, local, room_for, whole

__all__ = ["LONGEST", "LineBlock", "TextRows", "json_lines", "json_row", "refuse_other_text", "text_lines"]

# A longer line is a bad row, and a longer entry of a list is refused: without an end it would take all memory.
LONGEST = 1 << 28
# So often a packed file is unpacked from its beginning; who goes back more often gets an unpacked temporary copy.
_PASSES = 4

Parse = Callable[[str], Row]


class LineBlock(ParsedBlock):
    """Some bytes of a file that hold whole lines."""

    def __init__(self, source: Source, parse: Parse, data: bytes, first: int, line: int) -> None:
        self.first, self._source, self._data, self._parse = first, source, data, parse
        ends = newlines(data)
        starts = np.concatenate([[0], ends + 1])
        stops = np.concatenate([ends, [len(data)]])
        keep = not_blank(data, starts, stops)
        self._starts, self._stops = starts[keep], stops[keep]
        self.lines = np.flatnonzero(keep) + line
        self.count, self.nbytes = len(self.lines), len(data)

    def place(self, j: int) -> str:
        return f"{self._source.name}, line {self.lines[j]}"

    def parsed(self, j: int) -> Row:
        start, stop = self._starts[j], self._stops[j]
        if stop - start > LONGEST:
            raise ValueError(f"a line of more than {LONGEST:,} bytes")
        return self._parse(self._data[start:stop].decode("utf-8-sig").rstrip("\r"))


class TextRows(BlockRows):
    """Rows of a text file, found by marks; how the bytes between two marks are parsed is the block's."""

    def __init__(self, source: Source, marks: Marks, block: Callable[[bytes, int, int], Block]) -> None:
        # A stream that must be unpacked can only begin at its beginning.
        super().__init__(source, marks.count, marks.rows if source.packing is None else marks.rows[:1])
        self._marks, self._make, self._unpacked, self._passes = marks, block, source, 0
        self._copy: Any = None

    def blocks(self, restart: int) -> Iterator[Block]:
        self._passes += 1
        if self._unpacked.packing is not None and self._passes > _PASSES and room_for(self._marks.size):
            self._unpack()
        mark = int(np.searchsorted(self._marks.rows, self.restarts[restart]))
        start, _ = self._marks.span(mark)
        pieces = _Window(self._unpacked.pieces(start))
        for k in range(mark, len(self._marks.rows)):
            start, stop = self._marks.span(k)
            data = pieces.take(stop - start, LONGEST + 2)
            yield self._make(data, int(self._marks.rows[k]), int(self._marks.lines[k]))

    def where(self, i: int) -> str:
        try:
            block = self.block(i)
        except (InputError, OSError, ValueError):
            return self._place(i)
        return block.place(i - block.first)

    def _unpack(self) -> None:
        self._copy = tempfile.NamedTemporaryFile(prefix="gradsketch-")  # noqa: SIM115 - lives as long as the rows do
        for piece in self._unpacked.pieces():
            self._copy.write(piece)
        self._copy.flush()
        self._unpacked, self.restarts = local(Path(self._copy.name), "unpacked"), self._marks.rows


class _Window:
    """Takes so many bytes at a time from pieces of any size."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def take(self, size: int, most: int) -> bytes:
        """Return the next ``size`` bytes, or of more than ``most`` the first; the others are passed over."""
        parts, have = [self._left], len(self._left)
        kept = have
        while have < size:
            piece = next(self._pieces, b"")
            if not piece:
                raise ValueError("the file is shorter than when it was opened")
            have += len(piece)
            if kept < most or have >= size:
                parts.append(piece)
                kept += len(piece)
        data = b"".join(parts)
        over = have - size
        self._left = data[len(data) - over :] if over else b""
        return data[: min(len(data) - over, most)]


def json_lines(source: Source) -> TextRows:
    """Open a file of one JSON object, or string, a line."""
    return _by_lines(source, json_row)


def text_lines(source: Source) -> TextRows:
    """Open a file of one text a line."""
    return _by_lines(source, _text_row)


def json_row(text: str) -> Row:
    """Return the row that a text in JSON is.

    Raises:
        ValueError: it is none, or names a key twice.
    """
    return as_row(json.loads(text, object_pairs_hook=each_key_once))


def _text_row(line: str) -> Row:
    return {"text": line}


def _by_lines(source: Source, parse: Parse) -> TextRows:
    refuse_other_text(source)
    marks = whole(source.name, lambda: mark_lines(source.pieces()))
    return TextRows(source, marks, partial(LineBlock, source, parse))


def refuse_other_text(source: Source) -> None:
    """Refuse what is no text in UTF-8 with line feeds, where the first bytes of a file say so.

    Raises:
        InputError: the file is in UTF-16, or has the line ends of old Macs.
    """
    head = whole(source.name, source.head)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{source.name} is in UTF-16", "UTF-8", "Type: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    if b"\r" in head and b"\n" not in head and head.count(b"\r") > 1:
        raise InputError(
            f"{source.name} ends its lines with carriage returns alone, as old Macs did",
            "line feeds",
            "Type: tr '\\r' '\\n' < OLD > NEW",
        )
