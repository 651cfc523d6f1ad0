"""gradsketch select: the training rows that help a target set, or all but those that harm it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gradsketch.cli.command import Command
from gradsketch.cli.data import DataPlace
from gradsketch.cli.index import RUN_FILE, IndexOptions, built_with
from gradsketch.cli.loading import load
from gradsketch.cli.query import damping_of
from gradsketch.cli.work import ReadingOptions
from gradsketch.errors import InputError
from gradsketch.table import printable

__all__ = ["COMMAND", "SelectOptions"]


@dataclass(frozen=True)
class SelectOptions:
    """Choose the training rows that help a target set, or leave out those that harm it.

    Copies of a row that helps are passed over; of rows that harm they count too. Rows are written as they stand in the
    data.

    Example: gradsketch select runs/facts --for target.jsonl --keep 5% --out kept.jsonl
    """

    index: tyro.conf.Positional[str]
    """Folder of the index."""
    targets: Annotated[DataPlace, tyro.conf.arg(name="for")]
    """Examples that the model should do well on, in any form that gradsketch index reads."""
    keep: str | None = None
    """Write the rows that help most: a share, as 5%, or a number of rows."""
    tokens: int | None = None
    """Write the rows that help most, of so many tokens in all."""
    drop: str | None = None
    """Write all rows but those that harm most: a share, or a number of rows."""
    out: Path | None = None
    """File of the rows, JSON lines; without it they are only listed."""
    data: DataPlace | None = None
    """The indexed data, where it has moved; by default where the index found it."""
    aggregate: Literal["mean", "max", "rank"] = "mean"
    """How a row's scores for the targets are put together."""
    alike: float = 0.99
    """A row is a copy where the cosine of its gradient with a chosen one's is above this; 1 for never."""
    score: Literal["ridge", "influence", "cosine", "dot"] = "ridge"
    """How examples are scored."""
    damping: str = "1"
    """λ as a fraction of the mean eigenvalue, or auto."""
    device: str = "auto"
    """cpu, cuda, …"""
    work: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)
    json: bool = False
    """Print everything as JSON."""


def run(options: SelectOptions) -> int:
    """Choose, write, and print what was chosen."""
    budget = _budget(options)
    from gradsketch.attribution.index import Index

    engine, stored = options.work.chosen(), _stored(options)
    targets = stored.part.of_questions().rows(options.targets)
    data = stored.part.rows(options.data or stored.data) if options.out is not None else None
    model, task = load(replace(stored.model, device=options.device))
    found = Index.open(options.index, task=task).select(
        model,
        targets,
        **budget,
        harmful=options.drop is not None,
        aggregate=options.aggregate,
        alike=None if options.alike >= 1 else options.alike,
        score=options.score,
        damping=damping_of(options.damping),
        engine=engine,
    )
    if options.out is not None and data is not None:
        found.write(options.out, data, drop=options.drop is not None)
    print(found.to_json() if options.json else found)
    if options.out is not None and not options.json:
        kept = found.of - len(found.rows) if options.drop is not None else len(found.rows)
        print(printable(f"{options.out}: {kept:,} rows"))
    return 0


def _stored(options: SelectOptions) -> IndexOptions:
    stored = built_with(options.index)
    if stored is None:
        raise InputError(
            f"{options.index} without a {RUN_FILE}",
            "an index that gradsketch index built",
            "Use Index.select in Python",
        )
    return stored


def _budget(options: SelectOptions) -> dict[str, Any]:
    given = [text for text in (options.keep, options.drop) if text is not None]
    if len(given) + (options.tokens is not None) != 1:
        raise InputError(
            "no budget" if not given and options.tokens is None else "several budgets",
            "one of --keep, --drop and --tokens",
            "Type --keep 5%",
        )
    return {"tokens": options.tokens} if options.tokens is not None else _share_or_rows(given[0])


def _share_or_rows(text: str) -> dict[str, Any]:
    try:
        return {"share": float(text[:-1]) / 100} if text.endswith("%") else {"rows": int(text)}
    except ValueError as error:
        raise InputError(f"a budget of {text!r}", "a share, as 5%, or a number of rows", "Type --keep 5%") from error


COMMAND = Command("select", "the training rows that help or harm a target set", SelectOptions, run)
