"""The list of commands; the one that is named parses its options and runs."""

import sys
import warnings
from typing import Any

from gradsketch.cli import check, demo, dimension, export, index, query, run_file, spectrum, verify
from gradsketch.cli.command import Command
from gradsketch.cli.signals import TERMINATED, Terminated, terminable
from gradsketch.errors import GradsketchError, GradsketchWarning, InputError

__all__ = ["COMMANDS", "main", "register"]

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        demo.COMMAND,
        index.COMMAND,
        query.COMMAND,
        verify.COMMAND,
        export.COMMAND,
        check.COMMAND,
        dimension.COMMAND,
        spectrum.COMMAND,
    )
}


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
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"gradsketch: no command {arguments[0]!r}.\n\n{_help()}", file=sys.stderr)
        return 2
    command = COMMANDS[arguments[0]]
    try:
        with terminable(), warnings.catch_warnings():
            _say_warnings_plainly(arguments[0])
            return command.run(run_file.parse(command.options, command.name, arguments[1:]))
    except GradsketchError as error:
        print(f"gradsketch {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except Terminated:
        print(f"\ngradsketch {arguments[0]}: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print(f"\ngradsketch {arguments[0]}: interrupted", file=sys.stderr)
        return 130


def _say_warnings_plainly(command: str) -> None:
    """Show our own warnings as one line, without the place in the code that gave them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, GradsketchWarning):
            print(f"gradsketch {command}: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show


def _help() -> str:
    lines = [f"  {command.name:<11}{command.help}" for command in COMMANDS.values()]
    return "usage: gradsketch COMMAND [options]   (gradsketch COMMAND --help explains one)\n\n" + "\n".join(lines)
