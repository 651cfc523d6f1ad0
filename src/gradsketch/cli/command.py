"""What a command of ``gradsketch`` is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Command"]


@dataclass(frozen=True)
class Command:
    """A command: its name, a line of help, its options, and what it does with them.

    ``options`` is a frozen dataclass, whose fields tyro turns into flags and whose docstring is the command's help;
    ``run`` takes one and returns the exit code. Neither may load torch before ``run`` is called.
    """

    name: str
    help: str
    options: type[Any]
    run: Callable[[Any], int]
