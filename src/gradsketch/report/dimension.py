"""Figures of intrinsic dimension: the metric against log2 d."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradsketch.dimension.results import DimensionCurve, IntrinsicDimension, Search
from gradsketch.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curve_figure", "search_figure"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREY = "#555555"


def search_figure(result: IntrinsicDimension) -> Figure:
    """Return the figure of a search: every evaluation of every seed, full fine-tuning, the target, and d."""
    figure, axes = _axes(result.settings)
    for i, search in enumerate(result.searches):
        _draw_search(axes, search, _COLOURS[i % len(_COLOURS)])
    if result.confirmations:
        axes.plot(
            [p.d for p in result.confirmations],
            [p.value for p in result.confirmations],
            "k*",
            markersize=9,
            label="independent training",
        )
    _line(axes, result.full, "full fine-tuning", "solid")
    share = "" if not result.full or result.lower_is_better else f" ({100 * result.target / result.full:.0f} % of full)"
    _line(axes, result.target, f"target{share}", "dashed")
    if result.d is not None:
        axes.axvline(max(result.d, 0.5), color="black", linewidth=1, linestyle="dotted")
        place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"d = {result.d:,}", (max(result.d, 0.5), 0.02), xytext=(-4, 0), ha="right", fontsize=9, **place)
    axes.set_title("not reached" if result.d is None else f"d = {result.d:,} of n = {result.n:,}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def curve_figure(curve: DimensionCurve) -> Figure:
    """Return the figure of a curve: mean and range over seeds at every dimension, the start, and full fine-tuning."""
    figure, axes = _axes(curve.settings)
    dims = curve.dims
    axes.plot(dims, [curve.mean(d) for d in dims], "o-", color=_COLOURS[0], label="independent trainings")
    low, high = ([extreme(curve.values(d)) for d in dims] for extreme in (min, max))
    axes.fill_between(dims, low, high, color=_COLOURS[0], alpha=0.2, linewidth=0)
    _line(axes, curve.start, "before training", "dotted")
    _line(axes, curve.full, "full fine-tuning", "solid")
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def _axes(settings: dict[str, Any]) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "matplotlib is not installed", "it, to draw", "Type: pip install 'gradsketch[plot]'"
        ) from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("dimension d of the subspace")
    axes.set_ylabel(str(settings["metric"]).rsplit(".", 1)[-1].lower())
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_search(axes: Axes, search: Search, colour: str) -> None:
    """Draw every evaluation, and through the last one at each dimension a line."""
    trained = [check for check in search.checks if check.d]
    axes.plot([c.d for c in trained], [c.value for c in trained], ".", color=colour, alpha=0.4, markersize=4)
    last = {check.d: check.value for check in trained}
    axes.plot(list(last), list(last.values()), "o-", color=colour, markersize=4, label=f"search, seed {search.seed}")


def _line(axes: Axes, value: float | None, label: str, style: str) -> None:
    if value is not None:
        axes.axhline(value, color=_GREY, linewidth=1, linestyle=style, label=f"{label}: {value:.4g}")
