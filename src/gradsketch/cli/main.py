"""Parse the command's name, then hand over to its module."""

import importlib
import sys
import warnings
from typing import Any

from gradsketch.errors import GradsketchError, GradsketchWarning

__all__ = ["main"]

# Command → (module with run(arguments) → exit code, one line of help). Modules are imported only when called.
_COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("gradsketch.cli.demo", "who taught it that? a real model, six lies, and the sentences behind them"),
    "index": ("gradsketch.cli.index", "sketch the gradient of every training example; resumable"),
    "query": ("gradsketch.cli.query", "which training examples made the model say this?"),
    "verify": ("gradsketch.cli.verify", "read every byte of an index and name what is damaged or missing"),
    "export": ("gradsketch.cli.export", "an index as Parquet or FAISS"),
    "check": ("gradsketch.cli.check", "is the sketch right for your model, how good, at what cost, which d is enough"),
    "dimension": ("gradsketch.cli.dimension", "how many random directions fine-tuning needs"),
    "spectrum": ("gradsketch.cli.spectrum", "outer eigenvalues of a loss Hessian, at one point or over checkpoints"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] not in _COMMANDS:
        print(f"gradsketch: no command {arguments[0]!r}.\n\n{_help()}", file=sys.stderr)
        return 2
    module = importlib.import_module(_COMMANDS[arguments[0]][0])
    try:
        with warnings.catch_warnings():
            _say_warnings_plainly(arguments[0])
            return int(module.run(arguments[1:]))
    except GradsketchError as error:
        print(f"gradsketch {arguments[0]}: {error}", file=sys.stderr)
        return 1
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
    lines = [f"  {name:<11}{text}" for name, (_, text) in _COMMANDS.items()]
    return "usage: gradsketch COMMAND [options]   (gradsketch COMMAND --help explains one)\n\n" + "\n".join(lines)
