"""Run files: the resolved options of a command, saved beside its result, which ``--config`` replays."""

from __future__ import annotations

import inspect
import json
import shutil
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

import gradsketch
from gradsketch.durable import record_of, record_text, write_file
from gradsketch.errors import InputError
from gradsketch.table import wrapped

__all__ = ["parse", "read", "require_own", "write"]

Options = TypeVar("Options")


def parse(kind: type[Options], command: str, arguments: Sequence[str]) -> Options:
    """Parse a command's options; ``--config run.json`` (or YAML) gives their defaults, flags override them.

    Raises:
        InputError: the run file is missing, unreadable, of another command, or has unknown options.
    """
    arguments, default = list(arguments), None
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise InputError("--config without a file", "a run file", "Type --config run.json")
        default = read(kind, command, Path(arguments[place + 1]))
        del arguments[place : place + 2]
    given: dict[str, Any] = {} if default is None else {"default": default}
    options: Options = tyro.cli(
        kind,
        args=arguments,
        prog=f"gradsketch {command}",
        description=_description(kind),
        config=(tyro.conf.FlagCreatePairsOff,),
        **given,
    )
    return options


def _description(kind: type[Any]) -> str:
    """Return a command's docstring as wide as the screen; tyro joins lines, but for those that are indented."""
    return wrapped(inspect.getdoc(kind) or "", shutil.get_terminal_size().columns, hanging=2)


def read(kind: type[Options], command: str, path: Path, *, untouched: bool = False) -> Options:
    """Return the options in a run file, which people may have changed, unless it must be ``untouched``.

    Raises:
        InputError: see ``parse``.
        DamageError: it was changed since, and must be untouched.
    """
    try:
        data = path.read_bytes()
        if untouched and b'"crc32"' in data:
            record_of(data, path)
        text = data.decode("utf-8")
        body = _yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
        if body["command"] != command:
            raise InputError(f"{path}, a run of gradsketch {body['command']}", f"one of {command}", "Check the file")
        options: Options = _built(kind, body["options"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the run file {path} cannot be used ({type(error).__name__}: {error})",
            f"what gradsketch {command} saves as run.json",
            "Check the file",
        ) from error
    return options


def write(options: Any, command: str, path: Path) -> None:
    """Save a command's resolved options, where they are not there already.

    Raises:
        InputError: a file of that name is there which gradsketch did not write.
        StoreError: the folder cannot be made or written.
    """
    require_own(path)
    body = {"command": command, "gradsketch": gradsketch.__version__, "options": asdict(options)}
    text = record_text(json.loads(json.dumps(body, default=str)))
    if not (
        path.is_file() and path.read_bytes() == text.encode()
    ):  # a finished run may lie where nothing can be written
        write_file(path, text)


def require_own(path: Path) -> None:
    """Refuse to write where a file of that name is there which gradsketch did not write.

    Raises:
        InputError: it is.
    """
    if path.is_file() and not all(name in path.read_bytes() for name in (b'"command"', b'"options"')):
        raise InputError(
            f"{path}, which is no run file of gradsketch",
            "a folder of its own",
            "Choose another, or move that file away",
        )


def _built(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass from plain values; unknown names are errors."""
    hints = typing.get_type_hints(kind)
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise KeyError(f"unknown option {min(unknown)}")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _built(hint, value)
    if isinstance(value, list):
        return tuple(value)
    kinds = typing.get_args(hint) or (hint,)
    takes_path = Path in kinds and str not in kinds
    return Path(value) if takes_path and isinstance(value, str) else value


def _yaml(text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("a YAML run file without PyYAML", "PyYAML", "Run pip install pyyaml, or use JSON") from error
    try:
        # Ten lines of aliases of aliases stand for gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("aliases, which no option needs")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
