"""Figures of spectra: both ends and R_n, the density, and how they change over training, as in [P], Fig. 2, 5 and 6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from gradsketch.report.figure import BLUE, GREY, RED, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["density_figure", "evolution_figure", "recommendation_figure", "spectrum_figure"]


@runtime_checkable
class Eigenvalue(Protocol):
    """One eigenvalue, its absolute error, and whether it has settled."""

    @property
    def value(self) -> float: ...
    @property
    def error(self) -> float: ...
    @property
    def converged(self) -> bool: ...


@runtime_checkable
class Spectrum(Protocol):
    """Outer eigenvalues, and the ratios that are read off them."""

    @property
    def eigenvalues(self) -> Sequence[Eigenvalue]: ...
    @property
    def positive(self) -> Sequence[Eigenvalue]: ...
    @property
    def negative(self) -> Sequence[Eigenvalue]: ...
    @property
    def ratios(self) -> Any: ...
    @property
    def r_neg(self) -> float: ...
    @property
    def outliers(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def hvps(self) -> int: ...
    @property
    def method(self) -> str: ...


@runtime_checkable
class Density(Protocol):
    """Quadrature nodes of every probe, and the smooth curve through them."""

    @property
    def nodes(self) -> Sequence[Sequence[float]]: ...
    @property
    def n(self) -> int: ...
    @property
    def trace(self) -> Any: ...
    def share_below(self, value: float) -> Any: ...
    def curve(self, points: int = ...) -> Any: ...


@runtime_checkable
class Evolution(Protocol):
    """Spectra by step."""

    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def spectra(self) -> Sequence[Spectrum]: ...
    @property
    def r_neg(self) -> Any: ...
    def overlaps(self, k: int = ...) -> Any: ...
    def __len__(self) -> int: ...


@runtime_checkable
class Recommendation(Protocol):
    """A recommended size, and the relative bias that it leaves uncorrected."""

    @property
    def d(self) -> int: ...
    @property
    def raw_bias(self) -> float: ...


def spectrum_figure(result: Spectrum, outlier: float) -> Figure:
    """Draw both ends of a spectrum by rank, and R_n with a line at the share that makes an outlier."""
    figure = new_figure(9.0, 3.8)
    left, right = figure.subplots(1, 2)
    _ends(left, result)
    _ratios(right, result, BLUE, None, outlier)
    right.set_title(f"R_NEG = {result.r_neg:.3f}, {result.outliers} outliers", fontsize=10)
    return finish(figure)


def density_figure(result: Density) -> Figure:
    """Draw a density on a logarithmic scale, its negative side in another colour."""
    figure = new_figure(8.0, 3.8)
    axes = figure.subplots()
    curve = result.curve(points=2048)
    floor = max(0.1 / (result.n * curve.width), curve.density.max() * 1e-9)
    low = np.maximum(curve.density - 2 * np.nan_to_num(curve.standard_error, posinf=0), floor)
    high = np.maximum(curve.density + 2 * np.nan_to_num(curve.standard_error, posinf=0), floor)
    for side, colour, name in ((curve.grid < 0, RED, "negative"), (curve.grid >= 0, BLUE, "positive")):
        shown = np.where(side & (curve.density > floor), curve.density, np.nan)
        axes.plot(curve.grid, shown, color=colour, linewidth=1.2, label=name)
        axes.fill_between(curve.grid, floor, np.maximum(curve.density, floor), where=side, color=colour, alpha=0.12)
        axes.fill_between(curve.grid, low, high, where=side & (curve.density > floor), color=colour, alpha=0.3, lw=0)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.axvline(0, color=GREY, linewidth=0.8)
    negative = result.share_below(0.0)
    axes.set_title(
        f"{len(result.nodes)} probes; {negative.value:.0%} of n = {result.n:,} eigenvalues below 0,"
        f" tr = {result.trace.value:.4g} ± {result.trace.standard_error:.2g}",
        fontsize=10,
    )
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density (band: ± 2 standard errors)")
    axes.legend(fontsize=8, frameon=False)
    return finish(figure)


def evolution_figure(result: Evolution, outlier: float) -> Figure:
    """Draw R_NEG and R_n over the steps, a heat map of the eigenvalues, and the overlaps of the leading eigenspaces."""
    figure = new_figure(10.0, 7.2)
    (top, ratios), (heat, overlap) = figure.subplots(2, 2)
    places = np.arange(len(result))
    top.plot(places, result.r_neg, "o-", color=RED)
    top.set_ylim(0, 1.15 * max(float(result.r_neg.max(where=np.isfinite(result.r_neg), initial=0.0)), 0.01))
    top.set_ylabel("R_NEG = |lowest| / largest eigenvalue")
    _step_axis(top, result)
    for step, spectrum, shade in zip(result.steps, result.spectra, _shades(len(result)), strict=True):
        _ratios(ratios, spectrum, shade, f"step {step:,}", outlier)
    ratios.legend(fontsize=7, frameon=False, ncols=1 + len(result) // 7)
    _heat(figure, heat, result)
    _overlaps(figure, overlap, result)
    return finish(figure)


def recommendation_figure(result: Recommendation) -> Figure:
    """Draw how the uncorrected bias falls with d, and the d that is recommended."""
    figure = new_figure(5.0, 3.6)
    axes = figure.subplots()
    sizes = [result.d * 2.0**step for step in range(-3, 4)]
    axes.plot(sizes, [result.raw_bias * result.d / d for d in sizes], "-", color=BLUE)
    axes.plot([result.d], [result.raw_bias], "o", color=RED, label=f"recommended: d = {result.d:,}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sketch size d")
    axes.set_ylabel("relative bias without correction")
    axes.legend(fontsize=8, frameon=False)
    return finish(figure)


def _ends(axes: Axes, result: Spectrum) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    for side, colour, name in ((result.positive, BLUE, "positive"), (result.negative, RED, "negative")):
        for converged in (True, False):
            chosen = [(i + 1, e) for i, e in enumerate(side) if e.converged is converged]
            if chosen:
                _points(axes, chosen, colour, name if converged else f"{name}, not settled", converged)
    sizes = [abs(e.value) for e in result.eigenvalues]
    if sizes and max(sizes) > 10 * min(sizes):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank")
    axes.set_ylabel("|eigenvalue|")
    axes.set_title(f"n = {result.n:,}, {result.hvps} products, {result.method}", fontsize=10)
    if result.eigenvalues:
        axes.legend(fontsize=8, frameon=False)


def _points(axes: Axes, chosen: list[tuple[int, Eigenvalue]], colour: str, label: str, filled: bool) -> None:
    sizes = [abs(e.value) for _, e in chosen]
    errors = [min(e.error, 0.9 * abs(e.value)) for _, e in chosen]
    face = colour if filled else "white"
    axes.errorbar(
        [i for i, _ in chosen], sizes, errors, fmt="o", color=colour, mfc=face, ms=4, lw=0.8, capsize=2, label=label
    )


def _ratios(axes: Axes, result: Spectrum, colour: str, label: str | None, outlier: float) -> None:
    from matplotlib.ticker import MaxNLocator

    ratios = result.ratios
    ranks = np.arange(1, len(ratios) + 1)
    open_ones = ~np.array([e.converged for e in result.positive], dtype=bool)
    axes.plot(ranks, ratios, "o-", color=colour, markersize=3.5, linewidth=1, label=label)
    axes.plot(ranks[open_ones], ratios[open_ones], "o", color=colour, markersize=3.5, markerfacecolor="white")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not any(line.get_linestyle() == "--" for line in axes.lines):
        axes.axhline(outlier, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"{outlier:.0%}", (1, outlier), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("n (open: not settled)")
    axes.set_ylabel("R_n = λ_n / λ_1")


def _heat(figure: Figure, axes: Axes, result: Evolution) -> None:
    """One row a signed rank, largest on top, one column a step."""
    from matplotlib.colors import SymLogNorm

    ups = max(len(s.positive) for s in result.spectra)
    downs = max(len(s.negative) for s in result.spectra)
    cells = np.full((ups + downs, len(result)), np.nan)
    for column, s in enumerate(result.spectra):
        cells[: len(s.positive), column] = [e.value for e in s.positive]
        cells[ups + downs - len(s.negative) :, column] = [e.value for e in reversed(s.negative)]
    sizes = np.abs(cells[np.isfinite(cells)])
    largest, smallest = (float(sizes.max()), float(sizes.min())) if len(sizes) else (1.0, 1.0)
    # Colours are logarithmic over what is shown, and white is zero, which is not.
    norm = SymLogNorm(linthresh=max(smallest, largest / 1000), linscale=0.2, vmin=-largest, vmax=largest)
    image = axes.imshow(cells, aspect="auto", cmap="RdBu", norm=norm, interpolation="nearest")
    marks = sorted({-largest, -smallest, smallest, largest})
    bar = figure.colorbar(image, ax=axes, label="eigenvalue", ticks=marks, format="%.3g")
    bar.ax.minorticks_off()
    axes.axhline(ups - 0.5, color=GREY, linewidth=0.8)
    ranks = ({0: "1", ups - 1: str(ups)} if ups else {}) | ({ups + downs - 1: "−1"} if downs else {})
    axes.set_yticks(list(ranks), list(ranks.values()), fontsize=8)
    axes.set_ylabel("rank: positive above, negative below")
    _step_axis(axes, result)


def _overlaps(figure: Figure, axes: Axes, result: Evolution) -> None:
    k = min(10, max(len(s.positive) for s in result.spectra))
    image = axes.imshow(result.overlaps(max(k, 1)), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=f"overlap of the {k} leading eigenvectors")
    _step_axis(axes, result)
    axes.set_yticks(np.arange(len(result)), [f"{s:,}" for s in result.steps], fontsize=8)


def _step_axis(axes: Axes, result: Evolution) -> None:
    axes.set_xticks(np.arange(len(result)), [f"{s:,}" for s in result.steps], fontsize=8, rotation=45)
    axes.set_xlabel("step")


def _shades(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.9 * i / max(count - 1, 1))) for i in range(count)]
