"""The rows of any data: a sequence of dicts, each read when asked for, so that a bad row does not hide the others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from gradsketch.errors import InputError

__all__ = ["FileRows", "Row", "as_row", "bad_row", "each_key_once", "rows_or_errors", "sound"]

Row = dict[str, Any]
_AT_ONCE = 256  # rows that are read together by who goes through many


class FileRows(Sequence[Any]):
    """Examples as dicts, from a file, many files, a hub data set or a table in memory.

    ``path`` is what they were opened by. Reading in order costs one pass; reading anywhere else costs a block more.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.again: Callable[[], FileRows] | None = None  # opens the same data in another process

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.again is None else (self.again, ())

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> Row:
        """Return row i, 0 ≤ i < len.

        Raises:
            InputError: the row cannot be parsed; the message says where it is.
        """

    @abstractmethod
    def where(self, i: int) -> str:
        """Return where row i stands, as a person finds it: "facts.jsonl, line 17"."""

    def read_range(self, start: int, stop: int) -> list[Row | InputError]:
        """Return rows start … stop - 1, 0 ≤ start ≤ stop ≤ len; a row that cannot be parsed is its error."""
        return [self._row_or_error(i) for i in range(start, stop)]

    def release(self) -> None:
        """Close files and drop what is held of them; the next read opens them again."""
        return

    def _row_or_error(self, i: int) -> Row | InputError:
        try:
            return self.read(i)
        except InputError as error:
            return error

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            places = range(*i.indices(len(self)))
            if places.step == 1:
                return [sound(row) for row in self.read_range(places.start, max(places.start, places.stop))]
            return [self.read(j) for j in places]
        return self.read(range(len(self))[i])

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _AT_ONCE):
            yield from map(sound, self.read_range(start, min(start + _AT_ONCE, len(self))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} rows)"


def rows_or_errors(data: Any, start: int, stop: int) -> Iterator[Any]:
    """Yield rows start … stop - 1 of any data with positions; one that cannot be read is the error that says so."""
    if hasattr(data, "read_range"):
        for first in range(start, stop, _AT_ONCE):
            yield from data.read_range(first, min(first + _AT_ONCE, stop))
        return
    for i in range(start, stop):
        try:
            yield data[i]
        except InputError as error:
            yield error
        except Exception as error:  # a data set of the user's own raises whatever it likes where a file is damaged
            came = f"an example that cannot be read ({type(error).__name__}: {str(error)[:200]})"
            yield InputError(came, "data whose examples can be read", "Repair or drop it")


def sound(row: Any) -> Any:
    """Return a row, or raise the error that says why it cannot be read."""
    if isinstance(row, InputError):
        raise row
    return row


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of some JSON, for ``json.loads(…, object_pairs_hook=…)``.

    Raises:
        ValueError: it has a key twice, of which a parser would take the last without a word.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object with two values of {next(key for key in keys if keys.count(key) > 1)!r}")
    return found


def as_row(value: Any) -> Row:
    """Return a JSON value as a row; a string is a text.

    Raises:
        ValueError: it is neither an object nor a string.
    """
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} where an object was wanted")
    return value


def bad_row(where: str, error: Exception) -> InputError:
    """Return the error of a row that cannot be parsed."""
    return InputError(f"{where}: {error}", "a row that can be parsed, in UTF-8", "Repair or remove the row")
