"""One style for every picture: series are told apart by mark and dash before colour, so black and white will do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.numbers import Interval

__all__ = ["WIDTH", "finished", "new", "series", "styles"]

WIDTH = 9.0
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES = ("-", "--", "-.", ":")
# From dark to light, so that greys differ too.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def new(columns: int = 1, height: float = 3.6, *, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of one row of axes."""
    figure = Figure(figsize=(WIDTH if columns > 1 else 6.5, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, sharey=share_y, squeeze=False)[0])


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the look of each series."""
    looks = zip(cycle(_MARKS), cycle(_DASHES), cycle(_COLOURS), strict=False)
    return {
        name: {"marker": mark, "linestyle": dash, "color": colour, "markersize": 4, "linewidth": 1.2, "label": name}
        for name, (mark, dash, colour) in zip(names, looks, strict=False)
    }


def series(axes: Axes, x: Sequence[float], numbers: Sequence[Interval], look: dict[str, Any]) -> None:
    """Draw one series with its intervals."""
    values = [number["value"] for number in numbers]
    below = [0.0 if n["low"] is None else max(0.0, n["value"] - n["low"]) for n in numbers]
    above = [0.0 if n["high"] is None else max(0.0, n["high"] - n["value"]) for n in numbers]
    axes.errorbar(x, values, [below, above], capsize=2, elinewidth=0.8, **look)


def finished(figure: Figure, *, legend: Axes | None = None) -> Figure:
    """Return the figure without frames, with one legend beside it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    if legend is not None:
        figure.legend(*legend.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure
