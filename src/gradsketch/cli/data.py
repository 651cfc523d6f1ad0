"""The options by which every command says which part of its data is meant, and what its columns are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["DataOptions", "DataPlace"]

# A name or a URI is no path: a Path would lose one of the slashes of "s3://".
DataPlace = Annotated[str | Path, tyro.conf.arg(metavar="DATA")]


_NAMED = ("text", "messages", "prompt", "answer", "id", "label")


@dataclass(frozen=True)
class DataOptions:
    """Which part of the data, and what its columns are."""

    split: str | None = None
    """Part of data that has several, such as train: of the hub, or of a folder."""
    data_revision: str | None = None
    """Branch, tag or commit of a data set of the Hugging Face hub."""

    format: Literal["alpaca", "sharegpt"] | None = None
    """Rows of instruction, input and output, or of conversations, are read as messages."""
    text_column: str | None = None
    """Column that is the text; so that of messages (turns of a chat), prompt, answer, id or label:"""
    messages_column: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    id_column: str | None = None
    label_column: str | None = None

    def rows(self, source: str | Path, split: str | None = None) -> Sequence[Any]:
        """Open the rows of a path, a name or a pipe; ``split`` goes before the option.

        Raises:
            InputError: see ``read_examples`` and ``mapped_rows``.
        """
        from gradsketch.reading import read_examples
        from gradsketch.reading.mapped import mapped_rows

        rows = read_examples(source, split=split or self.split, revision=self.data_revision)
        named = {name: getattr(self, f"{name}_column") for name in _NAMED}
        columns = {name: column for name, column in named.items() if column is not None}
        return mapped_rows(rows, columns=columns, format=self.format) if columns or self.format else rows

    def of_questions(self) -> DataOptions:
        """Return the same for rows that ask an index: their columns are those of its data, their split is not."""
        return replace(self, split=None, data_revision=None)
