"""Run the demonstration in a terminal of its own, and draw what it showed as an SVG that plays.

    python tools/record_demo.py docs/images/demo.svg

Lines appear in the order and the rhythm in which they appeared, within twelve seconds; who sees no animation, or wants
none, sees them all. Colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

COLUMNS, ROWS, SECONDS = 132, 50, 12
WIDTH, HEIGHT, MARGIN = 8.0, 19, 18  # of a character, of a line, around them
_STYLES = {"1": "bold", "2": "dim", "31": "bad", "32": "good"}
_ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
_STYLE = """
svg { background: #fff; border-radius: 8px }
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328; white-space: pre }
.bold { font-weight: 700 } .dim { fill: #59636e } .good { fill: #116329 } .bad { fill: #b3261e }
g { animation: appear 1ms backwards }
@keyframes appear { from { opacity: 0 } }
@media (prefers-reduced-motion: reduce) { g { animation: none } }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117 } text { fill: #e6edf3 }
  .dim { fill: #9198a1 } .good { fill: #56d364 } .bad { fill: #ff8a80 }
}
"""


@dataclass
class Line:
    """Characters with their styles, and when they last changed."""

    cells: list[tuple[str, str]] = field(default_factory=list)
    changed: float = 0.0


class Screen:
    """Understands what the demonstration writes: line ends, returns to a line's begin, erasing, and styles."""

    def __init__(self) -> None:
        self.lines = [Line()]
        self._column, self._style = 0, ""

    def write(self, text: str, when: float) -> None:
        """Show text that came at some second."""
        place = 0
        while place < len(text):
            if found := _ESCAPE.match(text, place):
                self._obey(found[1], found[2])
                place = found.end()
                continue
            self._put(text[place], when)
            place += 1

    def _obey(self, argument: str, command: str) -> None:
        if command == "m":
            self._style = _STYLES.get(argument, "")
        elif command == "K":
            del self.lines[-1].cells[self._column :]

    def _put(self, character: str, when: float) -> None:
        line = self.lines[-1]
        if character == "\n":
            self.lines.append(Line(changed=when))
        elif character == "\r":
            self._column = 0
        else:
            line.cells += [(" ", "")] * (self._column + 1 - len(line.cells))
            line.cells[self._column], line.changed = (character, self._style), when
            self._column += 1


def recorded(command: list[str], folder: Path) -> Screen:
    """Run a command in a terminal, and return what it showed."""
    screen, (ours, theirs), began = Screen(), pty.openpty(), time.monotonic()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    running = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    kept = b""
    while part := _read(ours):
        kept += part
        # A character or an escape may arrive in two parts.
        complete = kept[: max(kept.rfind(b"\n"), kept.rfind(b"\r")) + 1]
        kept = kept[len(complete) :]
        screen.write(complete.decode("utf-8"), time.monotonic() - began)
    screen.write(kept.decode("utf-8", "replace"), time.monotonic() - began)
    if running.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}")
    return screen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is closed
        return b""


def drawn(screen: Screen, typed: str, folder: Path) -> str:
    """Return an SVG of the screen below the typed command; the folder's own name is left out."""
    lines = [Line([(character, "bold") for character in f"$ {typed}"]), *screen.lines]
    lines = lines[: next((i for i, line in enumerate(lines) if _text(line).startswith("Next, with")), len(lines))]
    lines = [_without(line, f"{folder.resolve()}/") for line in lines]
    while not _text(lines[-1]).strip():
        lines.pop()
    width = 2 * MARGIN + WIDTH * max(len(_text(line).rstrip()) for line in lines)
    height = 2 * MARGIN + HEIGHT * len(lines)
    faster = max(1.0, max(line.changed for line in lines) / SECONDS)
    body = "\n".join(_drawn_line(line, number, faster) for number, line in enumerate(lines) if _text(line).strip())
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" role="img">'
    title = f"<title>{escape(typed)} in a terminal, {faster:.0f} times as fast</title>"
    return f"{head}\n{title}\n<style>{_STYLE}</style>\n{body}\n</svg>\n"


def _drawn_line(line: Line, number: int, faster: float) -> str:
    """Return a line's runs of one style. Each stands at its column, as wide as its characters, whatever the font is."""
    text, runs, start = _text(line).rstrip(), [], 0
    while start < len(text):
        style = line.cells[start][1]
        stop = start
        # Runs end at two spaces too, so that columns of tables stand where they should.
        while stop < len(text) and line.cells[stop][1] == style and text[stop : stop + 2] != "  ":
            stop += 1
        stop = max(stop, start + 1)
        if said := text[start:stop].strip():
            x = MARGIN + WIDTH * (start + len(text[start:stop]) - len(text[start:stop].lstrip()))
            kind = f' class="{style}"' if style else ""
            runs.append(f'<text x="{x:g}" y="{MARGIN + HEIGHT * number + 13}" textLength="{WIDTH * len(said):g}"{kind}>'
                        f"{escape(said)}</text>")  # fmt: skip
        start = stop
    return f'<g style="animation-delay:{line.changed / faster:.2f}s">{"".join(runs)}</g>'


def _text(line: Line) -> str:
    return "".join(character for character, _ in line.cells)


def _without(line: Line, text: str) -> Line:
    found = _text(line).find(text)
    cells = line.cells if found < 0 else line.cells[:found] + line.cells[found + len(text) :]
    return Line(cells, line.changed)


def main() -> None:
    """Record, and write the picture."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/demo.svg").resolve()
    with tempfile.TemporaryDirectory() as folder:
        screen = recorded([sys.executable, "-m", "gradsketch", "demo"], Path(folder))
        target.write_text(drawn(screen, "make demo", Path(folder)), encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
