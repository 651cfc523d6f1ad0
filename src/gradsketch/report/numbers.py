"""Figures of numbers with their errors: a few that have names, or many in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradsketch.report.figure import BLUE, COLOURS, GREY, finish, line, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["groups_figure", "numbers_figure", "ranked_figure"]

_POINTS = 2000  # of a long curve, which shows no more


def numbers_figure(values: Mapping[str, tuple[float, float, float]], label: str, *, at: float | None = None) -> Figure:
    """Draw named values as dots with an interval each, given as (value, low, high), and a line ``at`` a number."""
    figure = new_figure(1.5 + 1.5 * len(values), 3.6)
    axes = figure.subplots()
    for place, (value, low, high) in enumerate(values.values()):
        axes.errorbar([place], [value], [[value - low], [high - value]], fmt="o", color=BLUE, capsize=4)
    if at is not None:
        axes.axhline(at, color=GREY, linewidth=1, linestyle="dashed")
    axes.set_xticks(range(len(values)), list(values))
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylabel(label)
    return finish(figure)


def ranked_figure(values: Sequence[float], label: str, ranked: str, *, mean: float | None = None) -> Figure:
    """Draw many values from the largest to the smallest, and their mean where it is given."""
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    ordered = np.sort(np.asarray(values, dtype=np.float64))[::-1]  # NaN comes first, and is left out
    ordered = ordered[np.isfinite(ordered)]
    ranks = np.unique(np.linspace(0, max(len(ordered) - 1, 0), _POINTS).astype(int))[: len(ordered)]
    axes.plot(ranks + 1, ordered[ranks], ".-" if len(ordered) < 100 else "-", color=BLUE)
    line(axes, mean, "mean", "dashed")
    axes.set_xlabel(f"rank of the {ranked}")
    axes.set_ylabel(label)
    if mean is not None:
        axes.legend(fontsize=8, frameon=False)
    return finish(figure)


def groups_figure(values: Mapping[str, Sequence[Sequence[float]]], label: str, grouped: str) -> Figure:
    """Draw several series side by side: each holds, for every group, the values to show as dots."""
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for number, (name, groups) in enumerate(values.items()):
        shift = 0.6 * (number + 0.5) / len(values) - 0.3
        places = [place + shift for place, group in enumerate(groups) for _ in group]
        dots = [value for group in groups for value in group]
        axes.plot(places, dots, "o", color=COLOURS[number], markersize=4, alpha=0.7, label=name)
    count = max((len(groups) for groups in values.values()), default=0)
    if count <= 30:
        axes.set_xticks(range(count))
    axes.set_xlabel(grouped)
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False)
    return finish(figure)
