"""How a CSV or TSV file is laid out: its header, where its records begin, and how their fields are taken apart."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.csv

from gradsketch.errors import InputError
from gradsketch.reading.marks import newlines, not_blank
from gradsketch.reading.sources import Source

__all__ = ["LONGEST_RECORD", "Format", "SwallowedError", "header_of", "records"]

LONGEST_RECORD = 1 << 26  # bytes: a quote that is never closed would hold the rest of the file


class Format:
    """The names of the columns, and what stands between them."""

    def __init__(self, delimiter: str, *, quoting: bool) -> None:
        self.delimiter, self.quoting, self.names = delimiter, quoting, [""]
        # A quoted field, or one whose quote does not close; a quote elsewhere in a field is a letter like others.
        mark = re.escape(delimiter).encode()
        self._quoted = re.compile(rb'(?:\A|(?<=[%b\n\r]))"[^"]*+(?:""[^"]*+)*+("?)' % mark)
        self._after = (b"", b"\r", b"\n", delimiter.encode())

    def parse(self, data: bytes, names: Iterable[str], *, skip_bad: bool = False) -> pa.Table:
        """Return some of the columns as texts."""
        return pyarrow.csv.read_csv(
            pa.BufferReader(data),
            pyarrow.csv.ReadOptions(column_names=self.names, use_threads=False, block_size=len(data) + 1),
            pyarrow.csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if self.quoting else False,
                newlines_in_values=self.quoting,
                ignore_empty_lines=False,
                invalid_row_handler=(lambda row: "skip") if skip_bad else None,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(self.names, pa.string()), include_columns=list(names)
            ),
        )

    def fields(self, record: bytes) -> int:
        """Return how many fields a record has."""
        unquoted = self._quoted.sub(b"", record) if self.quoting else record
        return unquoted.count(self.delimiter.encode()) + 1

    def ends(self, data: bytes, *, last: bool) -> np.ndarray:
        """Return the line feeds that end records, of data that begins with one, as far as this is known.

        Raises:
            SwallowedError: a quote does not close, or closes in the middle of a text some lines on.
        """
        ends, known = newlines(data), len(data)
        if not self.quoting or b'"' not in data:
            return ends
        inside = []
        for field in self._quoted.finditer(data):
            begin, end = field.span()
            if not field[1] or (end == len(data) and not last):
                if last:
                    raise SwallowedError(begin)
                known = begin
                break
            if data.find(b"\n", begin, end) >= 0:
                if data[end : end + 1] not in self._after:
                    raise SwallowedError(begin)
                inside.append((begin, end))
        if inside:
            begins, stops = np.array(inside).T
            ends = ends[np.searchsorted(begins, ends) == np.searchsorted(stops, ends, "right")]
        return ends[ends < known]


class SwallowedError(ValueError):
    """A quoted field that took lines into it which are none of its own; with the place of its quote."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def header_of(source: Source, delimiter: str) -> tuple[Format, bytes]:
    """Return the format of a file, and its bytes up to the end of the line that names its columns."""
    head = b""
    for piece in source.pieces():
        head += piece
        if b"\n" in head.lstrip() or len(head) > LONGEST_RECORD:
            break
    size = head.find(b"\n", len(head) - len(head.lstrip())) + 1 or len(head)
    line = head[:size].decode("utf-8-sig").strip("\r\n")
    if delimiter == "," and "," not in line and ";" in line:
        delimiter = ";"
    # Whoever quotes the names of the columns quotes what needs it below them too.
    form = Format(delimiter, quoting=delimiter != "\t" or line.lstrip().startswith('"'))
    names = next(
        csv.reader([line], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if form.quoting else csv.QUOTE_NONE), []
    )
    form.names = [name.strip() or f"column {i + 1}" for i, name in enumerate(names)]
    twice = next((name for name in form.names if form.names.count(name) > 1), None)
    if not names or twice is not None:
        raise InputError(
            f"{source.name} with " + ("no names of columns" if not names else f"two columns called {twice!r}"),
            "a first line that names each column once",
            "Change the first line",
        )
    return form, head[:size]


def records(data: bytes, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first bytes, last bytes + 1 and lines, counted from 0, of the records that are not blank."""
    starts = np.concatenate([[0], ends + 1])
    stops = np.concatenate([ends + 1, [len(data)]])
    keep = not_blank(data, starts, stops)
    return starts[keep], stops[keep], np.searchsorted(newlines(data), starts[keep])
