"""Rows under other names: which column of the data is the text, the prompt or the answer, and in which format it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsketch.errors import InputError
from gradsketch.reading.formats import FORMATS
from gradsketch.reading.open import read_examples
from gradsketch.reading.rows import rows_or_errors

__all__ = ["MappedRows", "mapped_rows"]

# What a column can be named to be, and the columns that are read with it.
_READ_WITH: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "text_pair"),
    "messages": ("messages",),
    "prompt": ("prompt", "answer", "completion"),
    "answer": ("prompt", "answer"),
    "id": (),
    "label": (),
}
_READ = ("text", "messages", "prompt", "answer", "completion")
_ASIDE = "_column"
_LOOKED_AT = 100  # rows, before a column is said to be in none


def mapped_rows(data: Any, *, columns: Mapping[str, str] | None = None, format: str | None = None) -> MappedRows:
    """Return data whose rows are read under other names, or from another format, as the task is to see them.

    Args:
        data: a path, or rows with a length and positions: a list of dicts, a dataset.
        columns: the column of the data by what it is: text, messages, prompt, answer, id or label. What else could be
            read as the example is set aside: a ``text`` beside a named prompt becomes the fact ``text_column``.
        format: "alpaca" (instruction, input, output) or "sharegpt" (conversations of from and value): their turns
            become ``messages``.

    Example:
        >>> rows = gs.mapped_rows([{"q": "Capital of France?", "a": " Paris"}], columns={"prompt": "q", "answer": "a"})
        >>> rows[0]
        {'prompt': 'Capital of France?', 'answer': ' Paris'}
        >>> gs.mapped_rows([{"instruction": "Say hi", "output": "Hi"}], format="alpaca")[0]["messages"][1]
        {'role': 'assistant', 'content': 'Hi'}

    Raises:
        InputError: data without positions, an unknown name or format, a column that none of the first rows has. A row
            that lacks one, or has both the column and its new name, is refused when it is read.
    """
    return MappedRows(read_examples(data) if isinstance(data, str | Path) else data, dict(columns or {}), format)


class MappedRows(Sequence[Any]):
    """Rows under other names; everything else is that of the rows themselves. See :func:`mapped_rows`."""

    def __init__(self, rows: Any, columns: Mapping[str, str], format: str | None) -> None:
        if isinstance(rows, Mapping) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise InputError(
                f"data of type {type(rows).__name__}",
                "rows with a length and positions",
                "Pass a path, or wrap it in list(...)",
            )
        for names, known, what in ((columns, _READ_WITH, "columns"), ([format] if format else [], FORMATS, "format")):
            if other := [name for name in names if name not in known]:
                raise InputError(f"{what} with {other[0]!r}", f"one of {', '.join(known)}", "Check the name")
        if format and (read := [name for name in columns if _READ_WITH[name]]):
            raise InputError(
                f"the format {format} and a column for {read[0]}", "one of them", "The format says what a row's text is"
            )
        self.rows, self.columns, self.format = rows, columns, format
        self._require_columns()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._mapped(row) for row in self.rows[i]]
        return self._mapped(self.rows[i])

    def __iter__(self) -> Iterator[Any]:
        return map(self._mapped, iter(self.rows))

    def read_range(self, start: int, stop: int) -> list[Any]:
        """Return rows start … stop - 1; a row that cannot be read or mapped is its error."""
        return list(map(self._mapped_or_error, rows_or_errors(self.rows, start, stop)))

    def __getattr__(self, name: str) -> Any:
        if name in ("rows", "columns", "format") or name.startswith("__"):  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self.rows, name)

    def __repr__(self) -> str:
        named = [f"{target}={name!r}" for target, name in self.columns.items()]
        return f"{self.rows!r} as ({', '.join([*([self.format] if self.format else []), *named])})"

    def _mapped_or_error(self, row: Any) -> Any:
        try:
            return row if isinstance(row, InputError) else self._mapped(row)
        except InputError as error:
            return error

    def _mapped(self, row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise InputError(f"a row of type {type(row).__name__}", "a dict of columns", "Map its parts in Python")
        chosen = {target: self._chosen(row, target, name) for target, name in self.columns.items()}
        rest = {name: value for name, value in row.items() if name not in self.columns.values()}
        read = {name for target in self.columns for name in _READ_WITH[target]}
        if read or self.format:
            rest = {f"{n}{_ASIDE}" if n in _READ and n not in read else n: value for n, value in rest.items()}
        if self.format:
            rest = FORMATS[self.format](rest)
        for target, name in self.columns.items():
            if target in rest:
                raise InputError(
                    f"a row with the columns {name} and {target}, of which the first was named to be the other",
                    f"one {target}",
                    f"Rename or drop the column {target} in the data",
                )
        return {**chosen, **rest}

    def _chosen(self, row: Mapping[str, Any], target: str, name: str) -> Any:
        if name not in row:
            raise self._missing(target, name, row)
        value = row[name]
        if target in ("text", "prompt", "answer") and isinstance(value, int | float):
            raise InputError(
                f"the {target} {value!r}, a number",
                "a text",
                f"Write the values of {name} as texts (quoted in JSON), or call the column {target} in a CSV file",
            )
        return value

    def _require_columns(self) -> None:
        """Refuse a column that none of the first rows has: with a model to load first, that would be told late."""
        first = rows_or_errors(self.rows, 0, min(len(self.rows), _LOOKED_AT))
        rows = [row for row in first if isinstance(row, Mapping)]  # a bad row is told when its turn comes
        for target, name in self.columns.items():
            if rows and not any(name in row for row in rows):
                raise self._missing(target, name, rows[0])

    def _missing(self, target: str, name: str, row: Mapping[str, Any]) -> InputError:
        return InputError(
            f"no column {name!r}, which was to be the {target}",
            f"one of {', '.join(map(str, row))}",
            f"Type --{target}-column with one of these names",
        )
