"""The options by which every command says which part of its data is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from gradsketch.reading import FileRows

__all__ = ["DataOptions", "DataPlace"]

# A name or a URI is no path: a Path would lose one of the slashes of "s3://".
DataPlace = Annotated[str | Path, tyro.conf.arg(metavar="DATA")]


@dataclass(frozen=True)
class DataOptions:
    """Which part of the data."""

    split: str | None = None
    """Part of data that has several, such as train: of the hub, or of a folder."""
    data_revision: str | None = None
    """Branch, tag or commit of a data set of the Hugging Face hub."""

    def rows(self, source: str | Path, split: str | None = None) -> FileRows:
        """Open the rows of a path, a name or a pipe; ``split`` goes before the option.

        Raises:
            InputError: see ``read_examples``.
        """
        from gradsketch.reading import read_examples

        return read_examples(source, split=split or self.split, revision=self.data_revision)
