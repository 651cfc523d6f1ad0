"""gradsketch export: an index as Parquet or FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from gradsketch.cli.command import Command
from gradsketch.errors import InputError
from gradsketch.table import printable

__all__ = ["COMMAND", "ExportOptions"]


@dataclass(frozen=True)
class ExportOptions:
    """Write an index's rows for other programs: a Parquet table, a FAISS index, or both.

    Example: gradsketch export runs/facts --parquet facts.parquet
    """

    index: tyro.conf.Positional[str]
    """Folder or URI of the index."""
    parquet: Path | None = None
    """Write a table: row, id, float32 sketch, gradient_norm, loss, metadata."""
    faiss: Path | None = None
    """Write an exact inner-product FAISS index of unit-length sketches; ids are row numbers."""
    checkpoint: int = 0
    """Which checkpoint, counted from 0."""
    json: bool = False
    """Print the files written as JSON."""


def run(options: ExportOptions) -> int:
    """Write the files and print their names."""
    from gradsketch.attribution.description import Description
    from gradsketch.plain import as_json
    from gradsketch.store import Store, to_faiss, to_parquet
    from gradsketch.store.folder import open_folder

    folder = open_folder(options.index)
    checkpoints = Description.read(folder).checkpoints
    if not 0 <= options.checkpoint < len(checkpoints):
        raise InputError(
            f"--checkpoint {options.checkpoint}", f"a number from 0 to {len(checkpoints) - 1}", "Check the number"
        )
    if options.parquet is None and options.faiss is None:
        raise InputError("nothing to write", "--parquet FILE, --faiss FILE, or both", "Type --parquet rows.parquet")
    store = Store.open(folder.child(checkpoints[options.checkpoint].folder))
    written = []
    if options.parquet is not None:
        written.append(to_parquet(store, options.parquet))
    if options.faiss is not None:
        written.append(to_faiss(store, options.faiss))
    print(as_json(list(map(str, written))) if options.json else "\n".join(printable(str(path)) for path in written))
    return 0


COMMAND = Command("export", "an index as Parquet or FAISS", ExportOptions, run)
