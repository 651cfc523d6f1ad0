"""Steps, tables and a little colour for a person at a terminal; plain text for everything else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gradsketch.table import Painted, aligned, printable

__all__ = ["Terminal"]


class Terminal:
    """Writes to a stream, in colour if that is a terminal and ``NO_COLOR`` is not set."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.colour = stream.isatty() and "NO_COLOR" not in os.environ

    def bold(self, text: str) -> str:
        """Return the text in bold."""
        return self._painted(text, "1")

    def good(self, text: str) -> str:
        """Return the text in green."""
        return self._painted(text, "32")

    def bad(self, text: str) -> str:
        """Return the text in red."""
        return self._painted(text, "31")

    def dim(self, text: str) -> str:
        """Return the text in grey."""
        return self._painted(text, "2")

    def link(self, path: Path) -> str:
        """Return the absolute path."""
        return self.bold(str(path.resolve()))

    def line(self, text: str = "") -> None:
        """Print a line."""
        print(text, file=self.stream, flush=True)

    def title(self, text: str) -> None:
        """Print a headline."""
        self.line(f"\n{self.bold(text)}\n")

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a step: a bar while it runs where ``total`` is known, and a line with its seconds when it is done."""
        start = time.perf_counter()
        width = min(shutil.get_terminal_size().columns, 100)
        with tqdm(
            total=total or None,
            desc=f"  {title}",
            leave=False,
            ncols=width,
            file=self.stream,
            disable=not self.stream.isatty(),
            bar_format="{desc} {bar} {percentage:3.0f}%" if total else "{desc} …",
        ) as bar:
            yield lambda done: bar.update(done) and None
        self.line(f"  {self.good('✓')} {title}  {self.dim(f'{time.perf_counter() - start:.1f} s')}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print columns as wide as their widest cell, in screen cells; numbers to the right."""
        self.line()
        for number, line in enumerate(aligned(header, rows)):
            self.line("  " + (self.dim(line) if number == 0 else line))
        self.line()

    def _painted(self, text: str, code: str) -> str:
        text = printable(text)
        return Painted(f"\x1b[{code}m{text}\x1b[0m") if self.colour else text
