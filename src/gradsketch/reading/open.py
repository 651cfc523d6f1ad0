"""What a path, a glob, a URI, a name or a pipe holds, and who reads it."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from gradsketch.errors import InputError
from gradsketch.reading.delimited import DelimitedRows, delimited, share_numbers
from gradsketch.reading.folders import DATA_KINDS, TEXT_KINDS, found, no_split, of_split, one_kind, saved_to_disk
from gradsketch.reading.hub import HubName, hub_name, hub_rows
from gradsketch.reading.json_lists import json_file
from gradsketch.reading.lines import json_lines, text_lines
from gradsketch.reading.rows import FileRows
from gradsketch.reading.shards import Shards, with_folders
from gradsketch.reading.sources import PACKINGS, Source, spooled, whole
from gradsketch.reading.tables import arrow, parquet
from gradsketch.reading.text_files import TextFiles

__all__ = ["read_examples"]

_READERS: dict[str, Callable[[Source], FileRows]] = {
    "JSON lines": json_lines,
    "JSON": json_file,
    "CSV": delimited,
    "TSV": lambda source: delimited(source, "\t"),
    "Parquet": parquet,
    "Arrow": arrow,
    "text": text_lines,
}
_BINARY = ("Parquet", "Arrow")
_POINTER_SIZE = 1024  # of git-lfs
_STDIN = re.compile(r"-(\.\w+)*")
# What files that come without a name begin with.
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow", b"\x1f\x8b": ".gz"}
_MAGIC |= {b"\x28\xb5\x2f\xfd": ".zst", b"{": ".jsonl", b'"': ".jsonl", b"[": ".json"}


def read_examples(source: str | Path, *, split: str | None = None, revision: str | None = None) -> FileRows:
    """Open the examples of a file, of many files, of the hub or of a pipe; nothing is read but what is asked for.

    What is read, by its name; a line format may be packed as ``.gz``, ``.zst`` or ``.bz2``:

    - ``.jsonl``, ``.ndjson``: an object, or a string (a text), a line. ``.json``: a list of them. ``.txt``, ``.md``: a
      text a line. Blank lines are skipped.
    - ``.csv``, ``.tsv``: the first line names the columns. Entries stay the text they are, "007" too, but for columns
      in which every entry is written as Python writes that number. In TSV a quote is a letter.
    - ``.parquet``; ``.arrow``, ``.feather``.
    - a folder, or a glob such as ``"data/**/*.jsonl"``: files of one kind and one split, in the order of their names. A
      README beside them is none. A folder of ``.txt`` or ``.md`` files: a row each, with its ``path``.
    - a folder that ``save_to_disk`` wrote.
    - ``owner/name`` or ``hf://datasets/owner/name``, with ``:config`` and ``@revision``: a data set of the hub.
    - ``s3://``, ``gs://`` and other URIs, of files and folders.
    - ``-``: what comes in by the pipe, copied to a temporary file; ``-.csv`` says its kind where that does not show.

    Args:
        source: a path, glob, URI or name.
        split: which part of data that has several, such as "train".
        revision: branch, tag or commit of a data set of the hub.

    Example:
        >>> rows = read_examples("facts.jsonl")        # doctest: +SKIP
        >>> rows[0], rows.where(0)                     # doctest: +SKIP
        ({'prompt': 'The capital of France is', 'answer': ' Paris.'}, 'facts.jsonl, line 1')

    Raises:
        InputError: no such data, of another kind, of two kinds or splits, without rows, or with a file that cannot be
            parsed as a whole.
    """
    place = str(source)
    name = _on_hub(place)
    if name is None and revision is not None:
        raise InputError(f"a revision of {place!r}", "a revision of a data set of the hub", "Leave --data-revision out")
    rows = hub_rows(name.at(revision), split) if name is not None else _opened(place, split)
    if len(rows) == 0:
        raise InputError(f"{place!r} holds no example", "at least one row that is not blank", "Check the file")
    again = _refused_again if _is_pipe(place) else partial(read_examples, split=split, revision=revision)
    rows.path, rows.again = place, partial(again, source)
    return rows


def _refused_again(source: str | Path) -> FileRows:
    raise InputError(
        f"{str(source)!r}, a pipe, in another process", "data that both can open", "Save what comes out of it to a file"
    )


def _on_hub(place: str) -> HubName | None:
    """Return the data set that a name without a file of that name can only mean."""
    if place.startswith("hf://"):
        return hub_name(place)
    suffix = PurePosixPath(place).suffix
    is_file_name = suffix.lower() in DATA_KINDS | PACKINGS or ("/" not in place and suffix[1:].isalpha())
    if is_file_name or glob.has_magic(place) or "://" in place or place.startswith(("-", ".", "~")):
        return None
    return None if Path(place).exists() else hub_name(place)


def _opened(place: str, split: str | None) -> FileRows:
    pipe = _pipe(place)
    if pipe is not None:
        sources, is_one = [pipe], True
    else:
        sources, is_one = found(place)
    if is_one:
        if split is not None:
            raise no_split(place, split, [])
        return _file(sources[0])
    saved = saved_to_disk(place, sources, split)
    if saved is not None:
        return Shards(place, [arrow(source) for source in saved])
    data = one_kind(place, sources)
    is_text = all(source.kind in TEXT_KINDS for source in data)
    if split is not None or not (is_text or glob.has_magic(place)):  # a glob means what it says, and texts have titles
        data = of_split(place, data, split)
    if is_text:
        return TextFiles(place, data)
    shards = [_file(source) for source in data]
    share_numbers([shard for shard in shards if isinstance(shard, DelimitedRows)])
    named = zip(shards, data, strict=True)
    return Shards(place, [with_folders(shard, source.name) for shard, source in named])


def _file(source: Source) -> FileRows:
    kind = DATA_KINDS.get(source.kind)
    if kind is None:
        raise InputError(
            f"the data {source.name!r} of a kind that is not known",
            ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, or a folder of files of one kind",
            "Rename it, or convert it: with Hugging Face datasets, dataset.to_json('data.jsonl')",
        )
    if kind in _BINARY and source.packing:
        raise InputError(f"{source.name}, a packed {kind} file", f"{kind} files, which are packed inside", "Unpack it")
    if source.size < _POINTER_SIZE and whole(source.name, source.head).startswith(b"version https://git-lfs"):
        raise InputError(f"{source.name} is a pointer of git-lfs, without the data", "the data", "Type: git lfs pull")
    return _READERS[kind](source)


def _pipe(place: str) -> Source | None:
    """Return a copy of what comes out of a pipe, under a name that says its kind, or None where there is no pipe."""
    if _STDIN.fullmatch(place):
        if sys.stdin.isatty():
            raise InputError("standard input with nothing piped into it", "data", "Type: cat FILE | gradsketch …")
        return _named(spooled(sys.stdin.buffer, f"stdin{place[1:]}"))
    if not _is_pipe(place):
        return None
    with Path(place).open("rb") as file:
        return _named(spooled(file, Path(place).name))


def _is_pipe(place: str) -> bool:
    path = Path(place)
    is_other = path.exists() and not (path.is_file() or path.is_dir())
    return is_other or _STDIN.fullmatch(place) is not None


def _named(source: Source) -> Source:
    """Return a source whose name says what it holds, by its first bytes where it does not say so yet."""
    while source.kind not in DATA_KINDS:
        head = whole(source.name, source.head).lstrip()
        suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)
        if suffix is None or PurePosixPath(source.name).suffix == suffix:
            raise InputError(
                f"a pipe, {source.name}, whose first bytes do not tell what it holds",
                "JSON lines, Parquet or Arrow, or a name for what it is",
                "Type --data -.csv, -.tsv or -.txt",
            )
        packed = PurePosixPath(source.name).suffix if source.packing else ""  # the kind stands before it
        source = replace(source, name=f"{source.name.removesuffix(packed)}{suffix}{packed}")
    return source
