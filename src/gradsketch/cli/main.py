"""The list of commands; the one that is named parses its options and runs, and whatever happens is said in one line."""

from __future__ import annotations

import codecs
import difflib
import os
import shutil
import sys
import traceback
import warnings
from typing import Any

from gradsketch import __version__
from gradsketch.cli import check, demo, dimension, explore, export, index, query, run_file, select, spectrum, verify
from gradsketch.cli.command import Command
from gradsketch.cli.signals import TERMINATED, Terminated, received, terminable
from gradsketch.errors import GradsketchError, GradsketchWarning, InputError, is_said_elsewhere
from gradsketch.table import one_line, wrapped

__all__ = ["COMMANDS", "main", "register"]

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        demo.COMMAND,
        index.COMMAND,
        query.COMMAND,
        explore.COMMAND,
        select.COMMAND,
        verify.COMMAND,
        export.COMMAND,
        check.COMMAND,
        dimension.COMMAND,
        spectrum.COMMAND,
    )
}

_DEBUG = "GRADSKETCH_DEBUG"
_LONGEST = 2000  # characters of an error from elsewhere


def register(command: Command) -> Command:
    """Add a command, one of your own too.

    Raises:
        InputError: there is one of that name.
    """
    if command.name in COMMANDS:
        raise InputError(f"a second command {command.name}", "a name of its own", "Choose another name")
    COMMANDS[command.name] = command
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is done, 1 failed, 2 wrong usage, 130 interrupted, 141 that nobody reads the output any more, 143 terminated.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = f"gradsketch {arguments[0]}" if arguments and arguments[0] in COMMANDS else "gradsketch"
    _escape_what_the_terminal_lacks()
    try:
        try:
            return _run(arguments, name)
        finally:
            sys.stdout.flush()  # here, where what it raises is caught, and not when Python ends
    except KeyboardInterrupt as stop:
        return _stopped(name, type(stop))
    except BrokenPipeError:  # | head
        return 141
    except Exception as error:  # whatever a file system, a parser or torch raises: nobody should have to read its trace
        if os.environ.get(_DEBUG):
            traceback.print_exc()
        if (kind := received()) is not None:
            return _stopped(name, kind)
        if not is_said_elsewhere(error):
            print(f"{name}: {_sentence(error)}", file=sys.stderr)
        return 1


def _stopped(name: str, kind: type[KeyboardInterrupt]) -> int:
    terminated = issubclass(kind, Terminated)
    print(f"\n{name}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
    return TERMINATED if terminated else 130


def _run(arguments: list[str], name: str) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"gradsketch {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(f"gradsketch: no command {one_line(arguments[0])!r}.{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    command = COMMANDS[arguments[0]]
    with terminable(), warnings.catch_warnings():
        _say_warnings_plainly(name)
        return command.run(run_file.parse(command.options, command.name, arguments[1:]))


def _sentence(error: Exception) -> str:
    if isinstance(error, GradsketchError):
        return one_line(str(error))
    kind, text = type(error).__name__, one_line(str(error), _LONGEST).rstrip(".")
    return f"{kind}{f': {text}' * bool(text)}. {_DEBUG}=1 shows the traceback."


def _escape_what_the_terminal_lacks() -> None:
    """Write letters that an output's encoding lacks as JSON escapes, so that neither text nor JSON breaks."""
    codecs.register_error("gradsketch.escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="gradsketch.escape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


def _say_warnings_plainly(name: str) -> None:
    """Show our own warnings as one line, without the place in the code that gave them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, GradsketchWarning):
            print(f"{name}: {one_line(str(message))}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show


def _help() -> str:
    width = shutil.get_terminal_size().columns
    usage = "usage: gradsketch COMMAND [options]   (gradsketch COMMAND --help explains one)"
    lines = [wrapped(f"  {command.name:<11}{command.help}", width, hanging=13) for command in COMMANDS.values()]
    return "\n".join([wrapped(usage, width, hanging=7), "", *lines])
