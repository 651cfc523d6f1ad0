"""The figure of a distortion: noise and Pearson r against the size of the sketch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gradsketch.report.figure import BLUE, GREY, RED, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["distortion_figure"]


@runtime_checkable
class Quality(Protocol):
    """What was measured at one size."""

    @property
    def d(self) -> int: ...
    @property
    def noise(self) -> float: ...
    @property
    def noise_interval(self) -> tuple[float, float]: ...
    @property
    def pearson(self) -> float: ...
    @property
    def pearson_interval(self) -> tuple[float, float]: ...


def distortion_figure(qualities: Sequence[Quality], wanted: float, recommended: int) -> Figure:
    """Draw noise·√d and Pearson r with their intervals, the wanted r, and the recommended d."""
    figure = new_figure(9.0, 3.6)
    noise, pearson = figure.subplots(1, 2)
    sizes = [q.d for q in qualities]
    _draw(noise, sizes, [q.noise for q in qualities], [q.noise_interval for q in qualities])
    noise.axhline(1, color=GREY, linewidth=1, linestyle="dashed")
    noise.set_ylabel("noise·√d (1: a dense Gaussian projection)")
    _draw(pearson, sizes, [q.pearson for q in qualities], [q.pearson_interval for q in qualities])
    pearson.axhline(wanted, color=GREY, linewidth=1, linestyle="dashed")
    pearson.axvline(recommended, color=RED, linewidth=1, label=f"recommended: d = {recommended:,}")
    pearson.set_ylabel(f"Pearson r (wanted: {wanted:g})")
    pearson.legend(fontsize=8, frameon=False)
    return finish(figure)


def _draw(axes: Axes, sizes: list[int], values: list[float], intervals: list[tuple[float, float]]) -> None:
    axes.plot(sizes, values, "o-", color=BLUE)
    axes.fill_between(
        sizes, [low for low, _ in intervals], [high for _, high in intervals], color=BLUE, alpha=0.2, lw=0
    )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sketch size d")
