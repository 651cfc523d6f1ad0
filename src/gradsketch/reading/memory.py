"""Tables in memory by position: pandas, Arrow, polars, numpy and Hugging Face data sets.

Iterated or indexed as they are, a DataFrame gives its columns, an Arrow table too, and a Series what has that label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from gradsketch.errors import InputError
from gradsketch.reading.rows import FileRows, Row, bad_row
from gradsketch.reading.tables import python_rows

__all__ = ["by_position"]


class _Positions(FileRows):
    """Rows of something in memory, by two functions: of its first row, and of a range."""

    def __init__(self, name: str, count: int, rows: Callable[[int, int], list[Row]], columns: list[str]) -> None:
        super().__init__(name)
        self._count, self._rows, self._columns = count, rows, columns

    def __len__(self) -> int:
        return self._count

    def read(self, i: int) -> Row:
        (row,) = self._rows(i, i + 1)
        return row

    def read_range(self, start: int, stop: int) -> list[Row | InputError]:
        return list(self._rows(start, stop))

    def where(self, i: int) -> str:
        return f"row {i + 1} of the {self.path}"


class DatasetRows(FileRows):
    """Rows of a Hugging Face data set, which keeps its own files."""

    def __init__(self, path: str, dataset: Any) -> None:
        super().__init__(path)
        self._dataset = dataset
        self._in_ranges = dataset.format["type"] in (None, "python")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> Row:
        try:
            return dict(self._dataset[i])
        except Exception as error:  # an image that cannot be decoded raises what its decoder likes
            raise bad_row(self.where(i), error) from error

    def read_range(self, start: int, stop: int) -> list[Row | InputError]:
        if self._in_ranges and start < stop:
            with suppress(Exception):  # one row of them is bad: which one shows alone
                part = self._dataset[start:stop]
                return [dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)]
        return super().read_range(start, stop)

    def where(self, i: int) -> str:
        return f"{self.path}, row {i + 1}"


def by_position(data: Any) -> Any:
    """Return a table in memory as rows, a pandas Series as a list, and anything else as it is.

    What pandas counts as missing is None, but NaN among floats stays NaN.

    Raises:
        InputError: two columns have the same name, or an array is none of rows.
    """
    package, kind = type(data).__module__.partition(".")[0], type(data).__name__
    if isinstance(data, np.ndarray):
        return _of_array(data)
    if hasattr(data, "iloc"):
        return _of_frame(data) if hasattr(data, "columns") else data.tolist()
    if isinstance(data, pa.RecordBatch):
        data = pa.Table.from_batches([data])
    if package == "polars" and hasattr(data, "columns") and hasattr(data, "__arrow_c_stream__"):
        data = pa.table(data)
    if isinstance(data, pa.Table):
        names = _each_once(data.column_names, kind)
        return _Positions(kind, data.num_rows, lambda a, b: _of_table(data.slice(a, b - a)), names)
    if package == "datasets" and hasattr(data, "format") and hasattr(data, "__len__"):
        return DatasetRows(f"{kind} {data.split or ''}".strip(), data)
    return data


def _of_array(array: np.ndarray) -> Any:
    if array.ndim == 0 or (array.dtype.names and array.ndim != 1):
        raise InputError(
            f"an array of {array.ndim} dimensions" + " with fields" * bool(array.dtype.names),
            "one example a place along the first",
            "Reshape it, such as array.reshape(-1)",
        )
    if not array.dtype.names:
        return array
    names = array.dtype.names
    return _Positions(
        "array",
        len(array),
        lambda a, b: [{name: _scalar(row[name]) for name in names} for row in array[a:b]],
        list(names),
    )


def _scalar(value: Any) -> Any:
    """Return a field as Python has it; times stay numpy's, whose nanoseconds Python would take for integers."""
    return value.item() if isinstance(value, np.generic) and value.dtype.kind not in "mM" else value


def _of_frame(frame: Any) -> FileRows:
    names = _each_once([str(name) for name in frame.columns], "DataFrame")
    floats = [dtype.kind == "f" for dtype in frame.dtypes]

    def rows(start: int, stop: int) -> list[Row]:
        part = frame.iloc[start:stop]
        columns = [part.iloc[:, k].tolist() for k in range(len(names))]
        kept = [c if f else [_present(v) for v in c] for c, f in zip(columns, floats, strict=True)]
        return [dict(zip(names, row, strict=True)) for row in zip(*kept, strict=True)]

    return _Positions("DataFrame", len(frame), rows, names)


def _present(value: Any) -> Any:
    """Return a value, or None where it is NaN, NaT or NA, by which pandas says that nothing is there."""
    is_missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))
    return None if is_missing else value


def _of_table(table: pa.Table) -> list[Row]:
    return [row for batch in table.to_batches() for row in python_rows(batch)]


def _each_once(names: list[str], kind: str) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"a {kind} with two columns called {twice!r}", "one of each name", "Rename one of them")
    return names
