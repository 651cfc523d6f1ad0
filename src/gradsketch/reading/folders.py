"""Which files of a folder are its data: of one kind and one split, in the order of their names."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs

from gradsketch.errors import InputError
from gradsketch.reading.sources import Source, filesystem_of, local, whole

__all__ = ["DATA_KINDS", "TEXT_KINDS", "found", "is_read_from", "no_split", "of_split", "one_kind", "saved_to_disk"]

TEXT_KINDS = (".txt", ".md")
# Suffixes that say how a file is read, and what a person calls files of that kind.
DATA_KINDS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".ipc": "Arrow",
} | dict.fromkeys(TEXT_KINDS, "text")
# What lies beside data and is none.
_ABOUT = re.compile(
    r"(readme|license|licence|notice|changelog|citation|contributing|security)(\.\w+)*"
    r"|(dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)
# Names of splits in file names, as datasets finds them: words of their own, after which shards are counted.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_WORDS = re.compile(r"[^\W\d_]+")


def found(place: str) -> tuple[list[Source], bool]:
    """Return the files that a path, a glob or a URI names, in the order of their names, and whether it is one file.

    Raises:
        InputError: there is none, or its file system cannot be reached.
    """
    if "://" in place:
        return whole(place, lambda: _remote(place))
    path = Path(place).expanduser()
    if path.is_file():
        return [local(path)], True
    if path.is_dir():
        return [local(file, f"{path.name or '.'}/{name}") for name, file in _under(path)], False
    if not glob.has_magic(place):
        raise InputError(f"the data {place!r} does not exist", "a file or folder that does", "Check the path")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not any(match.is_file() for match in matches):
        raise InputError(f"the data {place!r} matches no file", "a glob that does", "Check the path")
    base = _fixed_part(place)
    return [local(match, str(match.relative_to(base))) for match in matches if match.is_file()], False


def is_read_from(place: str, path: Path) -> bool:
    """Whether a file is among those that a path or a glob names, or would be once it is written."""
    if "://" in place:
        return False
    named, written = Path(place).expanduser(), path.resolve()
    if named.is_dir():
        return written.is_relative_to(named.resolve())
    files = [named] if named.exists() else map(Path, glob.glob(str(named), recursive=True))
    return any(file.resolve() == written for file in files)


def _fixed_part(pattern: str) -> Path:
    """Return the folders of a glob before its magic, but for the last, which stands in names as a folder's own does."""
    parts = Path(pattern).expanduser().parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[: max(0, fixed - 1)])


def _under(folder: Path) -> list[tuple[str, Path]]:
    named = sorted((file.relative_to(folder).as_posix(), file) for file in _inside(folder))
    for name, file in named:
        if file.is_symlink() and not file.exists() and file.suffix.lower() in DATA_KINDS:
            raise InputError(f"{folder.name}/{name} is a link to nothing", "the file", "Fetch it, or remove the link")
    return [(name, file) for name, file in named if file.is_file() and not _is_hidden(name)]


def _inside(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder, also behind links to folders elsewhere."""
    for path, folders, files in os.walk(folder, followlinks=True):
        here = Path(path)
        folders[:] = [name for name in folders if not _leads_back(here / name, folder)]
        yield from (here / name for name in (*folders, *files))


def _leads_back(path: Path, folder: Path) -> bool:
    """Whether a path is a link to what is walked through already: what is in the folder, or a place above the link."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return target.is_relative_to(folder.resolve()) or any(p.resolve().is_relative_to(target) for p in path.parents)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _remote(uri: str) -> tuple[list[Source], bool]:
    magic = re.search(r"[*?[]", uri)
    base_uri = uri[: magic.start()].rpartition("/")[0] if magic else uri
    filesystem, base = filesystem_of(base_uri)
    info = filesystem.get_file_info(base)
    if info.is_file:
        return [Source(filesystem, base, info.base_name, info.size or 0)], True
    pattern = uri[len(base_uri) :].strip("/")
    sources = []
    for info in filesystem.get_file_info(pyarrow.fs.FileSelector(base, recursive=True, allow_not_found=True)):
        name = info.path[len(base) :].strip("/")
        if info.is_file and (_matches(name, pattern) if pattern else not _is_hidden(name)):
            sources.append(Source(filesystem, info.path, f"{PurePosixPath(base).name}/{name}", info.size or 0))
    if not sources:
        raise InputError(f"the data {uri!r} does not exist, or is an empty folder", "files to read", "Check the URI")
    return sorted(sources, key=lambda source: source.path), False


def _matches(name: str, pattern: str) -> bool:
    same_depth = "**" in pattern or name.count("/") == pattern.count("/")
    return same_depth and fnmatch.fnmatchcase(name, pattern)


def one_kind(place: str, sources: Iterable[Source]) -> list[Source]:
    """Return the files that hold data, which must be of one kind; a README beside them is none.

    Raises:
        InputError: there are two kinds, or none.
    """
    known = [source for source in sources if source.kind in DATA_KINDS]
    data = [source for source in known if not _ABOUT.fullmatch(PurePosixPath(source.name).name)]
    if not data:
        about = f" but {', '.join(PurePosixPath(source.name).name for source in known)}" if known else ""
        raise InputError(
            f"{place!r} holds no example{about}",
            f"files of one kind: {', '.join(dict.fromkeys(DATA_KINDS.values()))}",
            "Check the folder",
        )
    if all(source.kind == ".md" for source in known):
        return known  # pages, of which the README is one
    data.sort(key=lambda source: source.kind in TEXT_KINDS)  # last in the message: a note is rarely what was meant
    kinds = Counter(DATA_KINDS[source.kind] for source in data)
    if len(kinds) > 1:
        first = [next(s for s in data if DATA_KINDS[s.kind] == kind) for kind in kinds]
        examples = " and ".join(f"{DATA_KINDS[s.kind]} ({s.name}, {kinds[DATA_KINDS[s.kind]]} in all)" for s in first)
        raise InputError(
            f"{place!r} holds two kinds of data: {examples}"
            if len(kinds) == 2
            else f"{place!r} holds {len(kinds)} kinds of data: {examples}",
            "files of one kind",
            f"Name those you mean, such as '{place.rstrip('/')}/**/*{first[0].kind}'",
        )
    return data


def of_split(place: str, sources: list[Source], split: str | None) -> list[Source]:
    """Return the files of one split, which their names or folders tell as those of the hub do.

    Raises:
        InputError: there are several and none is named, or none of that name.
    """
    splits = [_split(source, split) for source in sources]
    if split is None:
        if len(set(splits)) == 1:
            return sources
        names = [name for name in dict.fromkeys(splits) if name is not None]
        raise InputError(
            f"{place!r} holds files of {' and of '.join(name or 'no split' for name in dict.fromkeys(splits))}",
            "those of one split",
            f"Type --split {names[0]}, or name files, such as '{place.rstrip('/')}/**/*{names[0]}*'",
        )
    wanted = _SPLIT_OF.get(split.lower(), split.lower())
    chosen = [source for source, name in zip(sources, splits, strict=True) if name == wanted]
    if not chosen:
        raise no_split(place, split, [name for name in dict.fromkeys(splits) if name])
    return chosen


def no_split(place: str, split: str, names: Iterable[str]) -> InputError:
    """Return the error for a split that is not there."""
    held = ", ".join(names)
    return InputError(
        f"no split {split!r} in {place!r}",
        f"one of {held}" if held else "a data set of several splits",
        "Name another, or leave --split out" if held else "Leave --split out",
    )


def _split(source: Source, asked: str | None) -> str | None:
    """Return the split that a file's name tells, or else the nearest folder that tells one."""
    for part in reversed(PurePosixPath(source.name).parts):
        words = [word.lower() for word in _WORDS.findall(part)]
        if asked is not None and asked.lower() in words and asked.lower() not in _SPLIT_OF:
            return asked.lower()
        for word in words:
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return None


def saved_to_disk(place: str, sources: Iterable[Source], split: str | None) -> list[Source] | None:
    """Return the Arrow files of what ``save_to_disk`` wrote, in its order, or None where the folder is something else.

    Raises:
        InputError: it holds several splits and none is named, or a file is missing.
    """
    by_name = {source.name.partition("/")[2]: source for source in sources}
    inside = ""
    if "dataset_dict.json" in by_name:
        splits = _json(by_name["dataset_dict.json"])["splits"]
        if split is None and len(splits) != 1:
            raise InputError(
                f"{place!r} holds the splits {', '.join(splits)}", "one of them", f"Type --split {splits[0]}"
            )
        if split is not None and split not in splits:
            raise no_split(place, split, splits)
        inside = f"{split or splits[0]}/"
    elif split is not None and "state.json" in by_name:
        raise no_split(place, split, [])
    state = by_name.get(f"{inside}state.json")
    if state is None or f"{inside}dataset_info.json" not in by_name:
        return None
    found = _json(state)
    if found.get("_indices_data_files") or found.get("_indices_files"):
        raise InputError(
            f"{place!r}, saved with a list of the rows that count, as datasets did before version 2",
            "rows that lie as they count",
            "Load it with datasets.load_from_disk and save it again",
        )
    names = [f"{inside}{file['filename']}" for file in found["_data_files"]]
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise InputError(f"{place!r} without its file {missing}", "all files that save_to_disk wrote", "Save it again")
    return [by_name[name] for name in names]


def _json(source: Source) -> Any:
    return whole(source.name, lambda: json.loads(b"".join(source.pieces())))
