"""gradsketch query: which training examples made the model say this?"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gradsketch.cli.command import Command
from gradsketch.cli.data import DataOptions, DataPlace
from gradsketch.cli.index import built_with, model_of
from gradsketch.cli.loading import load
from gradsketch.cli.work import ReadingOptions, WorkOptions
from gradsketch.errors import InputError

__all__ = ["COMMAND", "QueryOptions", "damping_of"]

_CHAT = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class QueryOptions:
    """Ask an index which training examples made the model say this.

    Positive scores: training on the example lowers the query's loss.

    Example: gradsketch query runs/facts --prompt "The capital of France is" --answer " Ankara."
    """

    index: tyro.conf.Positional[str]
    """Folder or URI of the index."""
    text: tuple[str, ...] = ()
    """Texts to ask about."""
    prompt: str | None = None
    """With --answer: only the answer's tokens count."""
    answer: str | None = None
    """What the model said; begins with its own space."""
    messages: str | None = None
    """A chat, whose last turn, the assistant's, is asked about: JSON, [{"role": …, "content": …}, …], or a row with
    messages, tools and chat_template_kwargs; or a file of it."""
    data: DataPlace | None = None
    """A file of queries, one a row; or a folder, glob, hub name or URI, as of gradsketch index."""
    part: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    model: str | None = None
    """Name or folder of the model; by default the one the index was made with."""
    device: str = "auto"
    """cpu, cuda, …"""
    fsdp: bool = False
    """Under torchrun: share the model out among its ranks, as gradsketch index does."""
    tp: bool = False
    """Under torchrun: split the model's layers over its ranks, as gradsketch index does."""
    k: int = 10
    """Hits a query."""
    opponents: int = 0
    """Hits from the other end of the list."""
    score: Literal["ridge", "influence", "cosine", "dot"] = "ridge"
    """How examples are scored."""
    damping: str | None = None
    """λ as a fraction of the mean eigenvalue, or auto; by default 1, and 0.001 where EK-FAC re-ranks."""
    where: tuple[str, ...] = ()
    """Conditions on metadata: column=value; several values of a column are alternatives."""
    group: bool = False
    """All queries ask together."""
    coarse: int | None = None
    """Find candidates with this many numbers of each sketch first."""
    rerank: int | None = None
    """Score this many of the best rows again, by whole gradients."""
    exact: Literal["ekfac", "empirical-ekfac", "gauss-newton"] = "ekfac"
    """In which metric they are re-ranked: EK-FAC of a sample of the rows, or conjugate gradients."""
    explain: int = 0
    """Show which tokens matter in the first so many hits."""
    html: Path | None = None
    """Write a page to this file."""
    work: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)
    json: bool = False
    """Print everything as JSON."""


def run(options: QueryOptions) -> int:
    """Print the hits."""
    from gradsketch.attribution.description import Description
    from gradsketch.attribution.filters import columns_of
    from gradsketch.attribution.index import Index
    from gradsketch.store.folder import open_folder

    Description.read(open_folder(options.index))  # a wrong path is found out before the model is loaded
    engine, examples = options.work.chosen(), _examples(options)
    chosen = model_of(options.index, options.model, options.device, fsdp=options.fsdp, tp=options.tp)
    model, task = load(chosen)
    index = Index.open(options.index, task=task)
    with engine.reading() as each:  # one cluster for the columns and the query
        columns = columns_of(index.stores[0].snapshot(), each) if options.where else {}
        hits = index.query(
            model,
            examples,
            k=options.k,
            opponents=options.opponents,
            score=options.score,
            damping=None if options.damping is None else damping_of(options.damping),
            where=_where(options.where, columns),
            groups=[list(range(len(examples)))] if options.group else None,
            coarse=options.coarse,
            rerank=options.rerank,
            exact=options.exact,
            engine=engine,
            progress=None,
        )
    if options.explain:
        hits = index.explain(model, hits, top=options.explain)
    if WorkOptions().share()[0] > 0:
        return 0  # under torchrun rank 0 speaks for all
    if options.html is not None:
        hits.to_html(options.html)
    print(hits.to_json() if options.json else hits)
    return 0


def _examples(options: QueryOptions) -> list[Any]:
    examples: list[Any] = list(options.text)
    if (options.prompt is None) != (options.answer is None):
        raise InputError("--prompt without --answer, or the reverse", "both", "Pass --text for a whole text")
    if options.prompt is not None:
        examples.append({"prompt": options.prompt, "answer": options.answer})
    if options.messages is not None:
        examples.append(_chat(options.messages))
    if options.data is not None:
        examples += list(_part(options).rows(options.data))
    if not examples:
        raise InputError("no query", "--text, --prompt and --answer, --messages, or --data", 'Type --text "..."')
    return examples


def _chat(text: str) -> dict[str, Any]:
    """Return the row of a chat that was typed, or that a file holds; what is asked about is its last turn.

    Raises:
        InputError: no JSON, no turns, or turns that do not end with the assistant's.
    """
    try:
        found = json.loads(text if text.lstrip().startswith(("[", "{")) else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--messages {text[:80]} ({error})", f"JSON such as {_CHAT}, or its file", "Check the quotes"
        ) from error
    row = found if isinstance(found, dict) else {"messages": found}
    turns = row.get("messages")
    turns = turns if isinstance(turns, list) else []
    last = turns[-1] if turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        ends = f", which end with a turn of {last.get('role')!r}" if isinstance(last, dict) else ""
        raise InputError(
            f"--messages {text[:80]}{ends}", f"turns such as {_CHAT}", "Add what the model said as the assistant's turn"
        )
    rest = {name: value for name, value in row.items() if name != "messages"}
    return {**rest, "prompt": turns[:-1], "completion": turns[-1:]} if len(turns) > 1 else row


def _part(options: QueryOptions) -> DataOptions:
    """Return how the questions of --data are read: as was asked for, or as the index's own rows."""
    stored = built_with(options.index)
    return stored.part.of_questions() if stored is not None and options.part == DataOptions() else options.part


def damping_of(text: str) -> float | str:
    """Return the number that was typed, or "auto".

    Raises:
        InputError: it is neither.
    """
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--damping {text}", "a positive number, or auto", "Type --damping 1") from error


def _where(conditions: tuple[str, ...], columns: dict[str, set[str]]) -> dict[str, list[Any]] | None:
    """Return {column: values}, each value of every type that its column has."""
    where: dict[str, list[Any]] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals:
            raise InputError(f"--where {condition}", "column=value", "Type --where label=spam")
        kinds = columns.get(name, {"string"})
        values = [meant for kind in sorted(kinds) for meant in _typed(value, kind)]
        if not values:
            came = f"--where {condition}"
            raise InputError(came, f"a value of type {' or '.join(sorted(kinds))}", "Check the value")
        where.setdefault(name, []).extend(values)
    return where or None


def _typed(text: str, kind: str) -> list[Any]:
    """Return the values that a text can stand for in a column; in one of JSON, itself or what it says as JSON."""
    if kind == "bool":
        return [_TRUTH[text.lower()]] if text.lower() in _TRUTH else []
    if kind == "json":
        with suppress(ValueError, RecursionError):
            return [text, json.loads(text)]
    if kind in ("int", "float"):
        with suppress(ValueError):
            return [int(text) if kind == "int" else float(text)]
        return []
    return [text]


COMMAND = Command("query", "which training examples made the model say this?", QueryOptions, run)
