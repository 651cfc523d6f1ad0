"""A folder of texts, of which each file is a row."""

from __future__ import annotations

from collections.abc import Sequence

from gradsketch.reading.rows import FileRows, Row, bad_row
from gradsketch.reading.sources import Source

__all__ = ["TextFiles"]


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
