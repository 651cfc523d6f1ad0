"""Figures of intrinsic dimension: the metric against log2 d."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gradsketch.report.figure import COLOURS, finish, line, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curve_figure", "search_figure"]


@runtime_checkable
class Value(Protocol):
    """A metric in some dimension."""

    @property
    def d(self) -> int: ...
    @property
    def value(self) -> float: ...


@runtime_checkable
class Search(Protocol):
    """One search: its evaluations, in order."""

    @property
    def seed(self) -> int: ...
    @property
    def checks(self) -> Sequence[Value]: ...


@runtime_checkable
class IntrinsicDimension(Protocol):
    """Searches for a target, and the dimension they found."""

    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def searches(self) -> Sequence[Search]: ...
    @property
    def confirmations(self) -> Sequence[Value]: ...
    @property
    def full(self) -> float | None: ...
    @property
    def target(self) -> float: ...
    @property
    def lower_is_better(self) -> bool: ...
    @property
    def d(self) -> int | None: ...
    @property
    def interval(self) -> tuple[int, int | None]: ...
    @property
    def conclusive(self) -> bool: ...
    @property
    def n(self) -> int: ...


@runtime_checkable
class DimensionCurve(Protocol):
    """Metrics over dimensions and seeds."""

    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def dims(self) -> Sequence[int]: ...
    @property
    def start(self) -> float: ...
    @property
    def full(self) -> float | None: ...
    def mean(self, d: int) -> float: ...
    def values(self, d: int) -> Sequence[float]: ...


def search_figure(result: IntrinsicDimension) -> Figure:
    """Return the figure of a search: every evaluation of every seed, full fine-tuning, the target, d, its interval."""
    figure, axes = _axes(result.settings)
    for i, search in enumerate(result.searches):
        _draw_search(axes, search, COLOURS[i % len(COLOURS)])
    if result.confirmations:
        axes.plot(
            [p.d for p in result.confirmations],
            [p.value for p in result.confirmations],
            "k*",
            markersize=9,
            label="independent training",
        )
    line(axes, result.full, "full fine-tuning", "solid")
    share = "" if not result.full or result.lower_is_better else f" ({100 * result.target / result.full:.0f} % of full)"
    line(axes, result.target, f"target{share}", "dashed")
    low, high = result.interval
    if low != high:
        axes.axvspan(
            max(low, 0.5), axes.get_xlim()[1] if high is None else high, color="black", alpha=0.06, linewidth=0
        )
    if result.d is not None:
        axes.axvline(max(result.d, 0.5), color="black", linewidth=1, linestyle="dotted")
        place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"d = {result.d:,}", (max(result.d, 0.5), 0.02), xytext=(-4, 0), ha="right", fontsize=9, **place)
    doubt = "" if result.conclusive else "inconclusive: "
    axes.set_title("not reached" if result.d is None else f"{doubt}d = {result.d:,} of n = {result.n:,}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def curve_figure(curve: DimensionCurve) -> Figure:
    """Return the figure of a curve: mean and range over seeds at every dimension, the start, and full fine-tuning."""
    figure, axes = _axes(curve.settings)
    dims = curve.dims
    axes.plot(dims, [curve.mean(d) for d in dims], "o-", color=COLOURS[0], label="independent trainings")
    low, high = ([extreme(curve.values(d)) for d in dims] for extreme in (min, max))
    axes.fill_between(dims, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    line(axes, curve.start, "before training", "dotted")
    line(axes, curve.full, "full fine-tuning", "solid")
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def _axes(settings: Mapping[str, Any]) -> tuple[Figure, Axes]:
    figure = new_figure(6.0, 4.0)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("dimension d of the subspace")
    axes.set_ylabel(str(settings["metric"]).rsplit(".", 1)[-1].lower())
    return finish(figure), axes


def _draw_search(axes: Axes, search: Search, colour: str) -> None:
    """Draw every evaluation, and through the last one at each dimension a line."""
    trained = [check for check in search.checks if check.d]
    axes.plot([c.d for c in trained], [c.value for c in trained], ".", color=colour, alpha=0.4, markersize=4)
    last = {check.d: check.value for check in trained}
    axes.plot(list(last), list(last.values()), "o-", color=colour, markersize=4, label=f"search, seed {search.seed}")
