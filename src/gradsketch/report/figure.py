"""Figures: their common style, and saving them.

The report stands below the applications. Each drawing says in a protocol what it needs to be handed, so a result
imports its drawing plainly, and any object of that shape can be drawn.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from gradsketch.errors import InputError
from gradsketch.report.file import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "COLOURS", "GREY", "RED", "finish", "line", "new_figure", "save"]

# Okabe and Ito's colours, which people with colour blindness tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BLUE, RED, GREY = COLOURS[0], COLOURS[1], "#555555"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that many inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "matplotlib is not installed", "it, to draw", "Type: pip install 'gradsketch[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def line(axes: Axes, value: float | None, label: str, style: str) -> None:
    """Draw a labelled horizontal line, where there is a value."""
    if value is not None:
        axes.axhline(value, color=GREY, linewidth=1, linestyle=style, label=f"{label}: {value:.4g}")


def finish(figure: Figure) -> Figure:
    """Take away the frame's upper and right sides, and return the figure."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Save a figure, whole or not at all, in the format that the path's ending names, and return the path.

    Raises:
        InputError: the path is a folder, or matplotlib does not know its ending.
        StoreError: the path cannot be written to.
    """
    ending = Path(path).suffix.removeprefix(".") or "png"
    known = figure.canvas.get_supported_filetypes()
    if ending.lower() not in known:
        raise InputError(f"a figure as {path}", f"an ending of {', '.join(sorted(known))}", "Type figure.png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending.lower(), dpi=150)
    return write(path, buffer.getvalue())
