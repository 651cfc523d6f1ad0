"""Examples read from a file: JSON lines, JSON, CSV, Parquet, text, or a folder of texts."""

from __future__ import annotations

import gzip
import json
import mmap
import zlib
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from gradsketch.errors import InputError

__all__ = ["FileRows", "read_examples"]

# Columns of a CSV file that stay text even where every entry looks like a number.
_TEXT_COLUMNS = ("text", "text_pair", "prompt", "answer", "completion", "source", "target")
_TEXT_SUFFIXES = (".txt", ".md")
# What a gzipped file may unpack to: as much as this, or so many times its own size. Texts shrink to a third or a tenth.
_INFLATED_BYTES, _INFLATED_RATIO = 1 << 28, 100


class FileRows(Sequence[Any]):
    """The examples of a file as dicts, parsed when asked for, so that one bad row does not hide the others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> dict[str, Any]:
        """Return row i, 0 ≤ i < len.

        Raises:
            InputError: the row cannot be parsed; the message says where it is.
        """

    @abstractmethod
    def where(self, i: int) -> str:
        """Return where row i stands, as a person finds it: "facts.jsonl, line 17"."""

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self.read(j) for j in range(*i.indices(len(self)))]
        return self.read(range(len(self))[i])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.read(i) for i in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} rows)"


def read_examples(path: str | Path) -> FileRows:
    """Open a data file; its kind is read off its name.

    ``.jsonl`` or ``.ndjson``: one object (or string, read as ``{"text": …}``) a line; ``.json``: a list of them;
    ``.csv`` or ``.tsv`` with a header; ``.parquet``; ``.txt``: one example a line; the line formats may be gzipped
    (``.gz``). Blank lines are skipped. A folder: one example a ``.txt`` or ``.md`` file in it, with its ``path``.

    Example:
        >>> rows = read_examples("facts.jsonl")        # doctest: +SKIP
        >>> rows[0], rows.where(0)                     # doctest: +SKIP
        ({'prompt': 'The capital of France is', 'answer': ' Paris.'}, 'facts.jsonl, line 1')

    Raises:
        InputError: no such file, another kind, no rows, or a file that cannot be parsed as a whole.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"the data {str(path)!r} does not exist", "a file or folder that does", "Check the path")
    if not (path.is_file() or path.is_dir()):
        raise InputError(
            f"the data {str(path)!r} is a pipe, which cannot be read twice",
            "a file or a folder",
            "Save what comes out of it to a file first",
        )
    rows = _Folder(path) if path.is_dir() else _opened(path)
    if len(rows) == 0:
        raise InputError(f"{str(path)!r} holds no example", "at least one row that is not blank", "Check the file")
    return rows


def _opened(path: Path) -> FileRows:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson"):
        return _Lines(path, _from_json)
    if kind in _TEXT_SUFFIXES:
        return _Lines(path, lambda line: {"text": line})
    if kind == ".json":
        return _List(path)
    if kind in (".csv", ".tsv"):
        return _Table(path, *_read_csv(path, "\t" if kind == ".tsv" else ","))
    if kind == ".parquet":
        return _Table(path, _whole(path, lambda: pyarrow.parquet.read_table(path)), {})
    raise InputError(
        f"the data {path.name!r} of a kind that is not known",
        ".jsonl, .json, .csv, .tsv, .parquet, .txt, or a folder of .txt files",
        "Rename it, or convert it: with Hugging Face datasets, dataset.to_json('data.jsonl')",
    )


class _Lines(FileRows):
    """Rows that are lines, found once and parsed one at a time; the file stays on disk."""

    def __init__(self, path: Path, parse: Callable[[str], dict[str, Any]]) -> None:
        super().__init__(path)
        self._parse, self._bytes = parse, _buffer(path)
        self._starts: list[tuple[int, int, int]] = []  # first byte, last byte + 1, line number
        start = number = 0
        while start < len(self._bytes):
            stop = self._bytes.find(b"\n", start)
            stop, number = len(self._bytes) if stop < 0 else stop, number + 1
            if self._bytes[start:stop].strip():
                self._starts.append((start, stop, number))
            start = stop + 1

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, i: int) -> dict[str, Any]:
        start, stop, _ = self._starts[i]
        try:
            return self._parse(self._bytes[start:stop].decode("utf-8-sig").rstrip("\r"))
        except (ValueError, RecursionError) as error:
            raise _bad_row(self.where(i), error) from error

    def where(self, i: int) -> str:
        return f"{self.path.name}, line {self._starts[i][2]}"


class _List(FileRows):
    """Rows of a JSON file that is one list."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        values = _whole(path, lambda: json.loads(bytes(_buffer(path)[:]).decode("utf-8-sig")))
        if not isinstance(values, list):
            raise InputError(f"{path.name} holds a {type(values).__name__}", "a list of objects", "Write it as .jsonl")
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, i: int) -> dict[str, Any]:
        try:
            return _as_row(self._values[i])
        except ValueError as error:
            raise _bad_row(self.where(i), error) from error

    def where(self, i: int) -> str:
        return f"{self.path.name}, entry {i + 1}"


class _Table(FileRows):
    """Rows of an Arrow table, and between them those that could not be parsed."""

    def __init__(self, path: Path, table: pa.Table, bad: dict[int, str]) -> None:
        super().__init__(path)
        self._table, self._bad, self._bad_rows = table, bad, sorted(bad)

    def __len__(self) -> int:
        return int(self._table.num_rows) + len(self._bad)

    def read(self, i: int) -> dict[str, Any]:
        if i in self._bad:
            raise _bad_row(self.where(i), ValueError(self._bad[i]))
        row: dict[str, Any] = self._table.slice(i - bisect_left(self._bad_rows, i), 1).to_pylist()[0]
        return row

    def where(self, i: int) -> str:
        return f"{self.path.name}, row {i + 1}"


class _Folder(FileRows):
    """One row a text file, in the order of their paths."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _TEXT_SUFFIXES)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, i: int) -> dict[str, Any]:
        try:
            return {"text": self._files[i].read_text(encoding="utf-8"), "path": self._name(i)}
        except (OSError, ValueError) as error:
            raise _bad_row(self.where(i), error) from error

    def where(self, i: int) -> str:
        return f"{self.path.name}/{self._name(i)}"

    def _name(self, i: int) -> str:
        return self._files[i].relative_to(self.path).as_posix()


def _buffer(path: Path) -> bytes | mmap.mmap:
    """Return a file's bytes, mapped where it is not compressed."""
    if path.suffix.lower() == ".gz":
        return bytes(_whole(path, lambda: _inflated(path)))
    if path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _inflated(path: Path) -> bytes:
    """Return what a gzipped file holds, unless no data shrinks so much: a few kilobytes can stand for terabytes."""
    most = max(_INFLATED_BYTES, _INFLATED_RATIO * path.stat().st_size)
    with gzip.open(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {most:,} bytes; unpack it yourself if that is right")
    return content


def _from_json(line: str) -> dict[str, Any]:
    return _as_row(json.loads(line))


def _as_row(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} where an object was wanted")
    return value


def _bad_row(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: {error}", "a row that can be parsed, in UTF-8", "Repair or remove the row")


def _whole(path: Path, read: Callable[[], Any]) -> Any:
    """Read a whole file; a failure becomes an error that names it."""
    try:
        return read()
    except (pa.ArrowException, ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise InputError(
            f"{path.name} cannot be read: {error}", "a sound file of that kind", "Check the file"
        ) from error


def _read_csv(path: Path, delimiter: str) -> tuple[pa.Table, dict[int, str]]:
    """Return the rows that fit the header, and by position those that do not."""
    bad: dict[int, str] = {}

    def remember(row: Any) -> str:
        bad[row.number - 2] = f"{row.actual_columns} fields under a header of {row.expected_columns}"
        return "skip"

    read = pyarrow.csv.ReadOptions(use_threads=False)  # with threads, bad rows have no number
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=remember)
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(_TEXT_COLUMNS, pa.string()))
    return _whole(path, lambda: pyarrow.csv.read_csv(path, read, parse, convert)), bad
