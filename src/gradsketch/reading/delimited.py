"""Rows of CSV and TSV files: every entry is text, but for columns of numbers that are written as numbers are.

``pyarrow.csv`` parses. Where records begin is found by code of our own, because only then can a bad one be named: a
quote that does not close takes the lines behind it into its field, and no parser says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.reading.blocks import Block
from gradsketch.reading.lines import TextRows, refuse_other_text
from gradsketch.reading.marks import Marker, Marks
from gradsketch.reading.numbers import Kind, converted, joined, seen
from gradsketch.reading.records import LONGEST_RECORD, Format, SwallowedError, header_of, records
from gradsketch.reading.rows import Row, bad_row
from gradsketch.reading.sources import Source, whole

__all__ = ["DelimitedRows", "delimited", "share_numbers"]

# Columns that stay text even where every entry is a number.
_TEXTS = re.compile(r"(.*_)?(id|text|text_pair|prompt|answer|completion|source|target|question|context)", re.IGNORECASE)
_LIKE_QUOTED = re.compile(rb'(?:\A|(?<=[\t\n]))"(?:[^"\t\n]|"")*+"(?=[\t\r\n]|\Z)')


class DelimitedRows(TextRows):
    """Rows of one CSV or TSV file; ``kinds`` says which columns are numbers."""

    def __init__(self, source: Source, marks: Marks, form: Format, kinds: dict[str, Kind]) -> None:
        super().__init__(source, marks, self._records)
        self.kinds, self._form = kinds, form

    def _records(self, data: bytes, first: int, line: int) -> Block:
        return _Records(self.source, data, first, line, self._form, self.kinds)


class _Records(Block):
    """Some bytes of a file that hold whole records."""

    def __init__(
        self, source: Source, data: bytes, first: int, line: int, form: Format, kinds: dict[str, Kind]
    ) -> None:
        self.first, self._source, self._form, self._kinds = first, source, form, kinds
        starts, stops, lines = records(data, form.ends(data, last=True))
        self._records = [data[start:stop] for start, stop in zip(starts, stops, strict=True)]
        self.lines, self.count, self.nbytes = lines + line, len(lines), 2 * len(data)  # as bytes and as a table

    def rows(self, start: int, stop: int) -> list[Row | InputError]:
        if self._table is None:  # a record among them is bad: which one shows alone
            return [self._alone(j) for j in range(start, stop)]
        return list(self._table.slice(start, stop - start).to_pylist())

    def place(self, j: int) -> str:
        return f"{self._source.name}, line {self.lines[j]}"

    @cached_property
    def _table(self) -> pa.Table | None:
        try:
            return self._parsed(b"".join(self._records), self.count)
        except (ValueError, pa.ArrowException):
            return None

    def _alone(self, j: int) -> Row | InputError:
        try:
            (row,) = self._parsed(self._records[j], 1).to_pylist()
        except (ValueError, pa.ArrowException) as error:
            reason = re.sub(r"^(CSV parse error: |In CSV column #\d+: )*(Row #\d+: )?", "", str(error))
            return bad_row(self.place(j), ValueError(reason[:200]))
        return dict(row)

    def _parsed(self, data: bytes, count: int) -> pa.Table:
        table = self._form.parse(data, self._form.names)
        if table.num_rows != count:
            raise ValueError("a carriage return in the middle of a line")
        return pa.table({name: converted(self._kinds.get(name, Kind()), table[name]) for name in self._form.names})


def delimited(source: Source, delimiter: str = ",") -> DelimitedRows:
    """Open a CSV file, or with tabs a TSV file, whose first line names the columns.

    An entry stays the text it is: "007", "1.10" and "NA" too. A column becomes numbers where every entry of the file is
    written as Python writes that int or float, or is empty (then None), and its name is none of an id or a text. In CSV
    a field may be quoted, and then hold line feeds. In TSV a quote is a letter, unless the header is quoted. A header
    without commas but with semicolons is split at these.

    Raises:
        InputError: no column has a name, two have the same, or a quoted field swallowed lines.
    """
    refuse_other_text(source)
    return whole(source.name, lambda: _Scan(source, *header_of(source, delimiter)).rows())


def share_numbers(tables: Sequence[DelimitedRows]) -> None:
    """Let a column be numbers only where it is in all files."""
    names = {name for table in tables for name in table.kinds}
    shared = {name: joined(table.kinds[name] for table in tables if name in table.kinds) for name in names}
    for table in tables:
        table.kinds = shared


class _Scan:
    """One pass over a file: where its records begin, and which of its columns are numbers."""

    def __init__(self, source: Source, form: Format, header: bytes) -> None:
        self._source, self._form, self._marker = source, form, Marker()
        self._kinds = {name: Kind("text" if _TEXTS.fullmatch(name) else "empty") for name in form.names}
        self._has_warned = False
        self._offset, self._line, self._left = len(header), 1 + header.count(b"\n"), b""

    def rows(self) -> DelimitedRows:
        for piece in self._source.pieces(self._offset):
            self._take(self._left + piece, last=False)
        self._take(self._left, last=True)
        return DelimitedRows(self._source, self._marker.marks(self._offset), self._form, self._kinds)

    def _take(self, data: bytes, *, last: bool) -> None:
        """Mark the records that end in the data, and keep what is left of it."""
        try:
            ends = self._form.ends(data, last=last)
        except SwallowedError as error:
            raise self._swallowed(data, error.place) from error
        known = len(data) if last else int(ends[-1]) + 1 if len(ends) else 0
        if len(data) - known > LONGEST_RECORD:
            if not self._form.quoting or b'"' not in data[known:]:
                line = self._line + data.count(b"\n", 0, known)
                raise ValueError(f"line {line} is longer than {LONGEST_RECORD:,} bytes")
            raise self._swallowed(data, known)
        starts, stops, lines = records(data[:known], ends)
        self._refuse_swallowed(data, starts, stops)
        self._marker.add(starts + self._offset, lines + self._line)
        self._note_numbers(data[:known])
        self._warn_of_quotes(data[:known])
        self._offset, self._line, self._left = (
            self._offset + known,
            self._line + data.count(b"\n", 0, known),
            data[known:],
        )

    def _refuse_swallowed(self, data: bytes, starts: np.ndarray, stops: np.ndarray) -> None:
        """Refuse a record of many lines and another number of fields than the header: its lines are records."""
        if not self._form.quoting or b'"' not in data:
            return
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            is_one_line = data.find(b"\n", start, stop - 1) < 0
            if not is_one_line and self._form.fields(data[start:stop]) != len(self._form.names):
                raise self._swallowed(data, start)

    def _note_numbers(self, data: bytes) -> None:
        names = [name for name, kind in self._kinds.items() if kind.name != "text"]
        if not names or not data.strip():
            return
        try:
            table = self._form.parse(data, names, skip_bad=True)
        except pa.ArrowException:  # not in UTF-8: its row will be a bad one
            table = self._form.parse(data.decode("utf-8", "replace").encode(), names, skip_bad=True)
        for name in names:
            self._kinds[name] = seen(self._kinds[name], table[name])

    def _warn_of_quotes(self, data: bytes) -> None:
        """Say once where a field of a TSV file looks as if it had been quoted: its quotes are read as letters."""
        if self._form.quoting or self._has_warned or b'""' not in data:
            return
        field = next((f for f in _LIKE_QUOTED.finditer(data) if b'""' in f[0][1:-1]), None)
        if field is not None:
            self._has_warned = True
            line = self._line + data.count(b"\n", 0, field.start())
            warnings.warn(
                f"{self._source.name}, line {line}: "
                "a field that looks quoted is read with its quotes, which are letters in TSV; if the file is quoted, "
                "save it with commas, as .csv",
                GradsketchWarning,
                stacklevel=2,
            )

    def _swallowed(self, data: bytes, place: int) -> InputError:
        line = self._line + data.count(b"\n", 0, place)
        return InputError(
            f"{self._source.name}, line {line}: a quote opens a field that takes the following lines into it",
            "a quote that closes where its field ends",
            "Close the quote, double it, or save the file without quoting, as .tsv",
        )
