"""The grammar that all results share: a figure, JSON and back, one line, a table.

Results are equal if they would be written alike, because tensors have no equality of their own and NaN is not NaN. JSON
has no NaN and no infinity; they are the texts of Protocol Buffers' JSON, which lose nothing, where null would.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from gradsketch.durable import record_checksum
from gradsketch.errors import InputError
from gradsketch.plain import as_json, from_plain, to_plain
from gradsketch.report.figure import save
from gradsketch.report.file import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Result"]

_CHECKSUM = "crc32"
_Result = TypeVar("_Result", bound="Result")


class Result(ABC):
    """What a computation gives back: a frozen dataclass of values, their errors and their cost.

    ``print(result)`` shows a table and ``result.summary()`` is one line. Results are equal if they would be written
    alike, so a class says ``@dataclass(frozen=True, eq=False)``. ``derived`` names the properties that stand in the
    JSON for readers who have no gradsketch.
    """

    derived: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def summary(self) -> str:
        """Return the result in one line."""

    @abstractmethod
    def __str__(self) -> str:
        """Return a table for the terminal."""

    @abstractmethod
    def _figure(self) -> Figure:
        """Draw."""

    def plot(self, path: str | Path | None = None) -> Figure:
        """Return a matplotlib figure, and save it to ``path`` where one is given (.png, .svg, .pdf).

        Raises:
            InputError: matplotlib is not installed, or the path is a folder.
            StoreError: the path cannot be written to.
        """
        figure = self._figure()
        if path is not None:
            save(figure, path)
        return figure

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as strict JSON, and write it to ``path``, whole or not at all, where one is given.

        Numbers that are not finite are the texts "NaN", "Infinity" and "-Infinity". ``crc32`` is the checksum of all
        other values, which ``from_json`` compares.

        Raises:
            InputError: the path is a folder.
            StoreError: the path cannot be written to.
        """
        derived = {name: to_plain(getattr(self, name)) for name in self.derived}
        record = {"result": type(self).__name__, **derived, **to_plain(self)}
        text = as_json({**record, _CHECKSUM: record_checksum(record)})
        if path is not None:
            write(path, f"{text}\n".encode())
        return text

    @classmethod
    def from_json(cls: type[_Result], text: str | Path) -> _Result:
        """Return the result that ``to_json`` wrote, from its text or from a file given as a Path.

        Raises:
            InputError: it is not the JSON of such a result, or a value of it was changed since.
        """
        try:
            record = json.loads(text.read_text(encoding="utf-8") if isinstance(text, Path) else text)
            if _CHECKSUM in record and record.pop(_CHECKSUM) != record_checksum(record):
                raise ValueError("its checksum does not match: it was changed since it was written")
            if record.pop("result") != cls.__name__:
                raise ValueError("of another result")
            values = {name: value for name, value in record.items() if name not in cls.derived}
            result: _Result = from_plain(cls, values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            source = str(text) if isinstance(text, Path) else "a text"
            raise InputError(
                f"{source} that cannot be read ({type(error).__name__}: {error})",
                f"what {cls.__name__}.to_json wrote",
                "Pass its text, or its file as a pathlib.Path",
            ) from error
        return result

    def __eq__(self, other: object) -> bool:
        return to_plain(self) == to_plain(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_json())
