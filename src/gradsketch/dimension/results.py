"""What a search, a curve or a fine-tuning found, with what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any

from gradsketch.dimension.noise import noise_about, rising
from gradsketch.report.dimension import curve_figure, search_figure
from gradsketch.report.numbers import numbers_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Check", "CurvePoint", "DimensionCurve", "IntrinsicDimension", "Search", "settled"]

# What counts as certain: as many standard deviations of the noise, or as many evaluations in a row.
_WITHIN, _REPEATS = 2, 3
# Seeds and noise may spread d over this factor, twice what the doubling of d leaves open anyway.
_SPREAD = 4

Settings = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Check:
    """One evaluation within a search, after ``step`` steps of training, the last of them in ``d`` dimensions."""

    step: int
    d: int
    value: float
    """The metric."""
    loss: float | None
    """Mean training loss since the check before."""
    seconds: float
    """Time since the search began, without what an interruption took."""


@dataclass(frozen=True)
class Search:
    """One single-run search."""

    seed: int
    d: int | None
    """The dimension at which the target was reached; None if it was not, 0 if it was before any training."""
    checks: tuple[Check, ...]
    """Every evaluation, in order."""

    @property
    def steps(self) -> int:
        """Steps of training in all."""
        return self.checks[-1].step

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.checks[-1].seconds

    @property
    def largest(self) -> int:
        """The largest dimension tried."""
        return self.checks[-1].d

    def noise(self, sign: int = 1) -> float:
        """Return the standard deviation of the metric about one that only gets better; ``sign`` −1 where lower is."""
        values = [sign * check.value for check in self.checks]
        return noise_about((values, rising(values)))

    def interval(self, target: float, sign: int = 1) -> tuple[int, int | None]:
        """Return the first dimension that may reach the target, for noise, and the one that does; None if none did."""
        fit, within = rising([sign * check.value for check in self.checks]), _WITHIN * self.noise(sign)
        may = (check.d for check, value in zip(self.checks, fit, strict=True) if value + within >= sign * target)
        return next(may, self.largest if self.d is None else self.d), self.d


def settled(values: Sequence[float], target: float) -> bool:
    """Whether values that should only rise have reached a target for certain: by more than their noise, or thrice."""
    last = values[-_REPEATS:]
    by_noise = values[-1] - target >= _WITHIN * noise_about((values, rising(values)))
    return values[-1] >= target and (by_noise or (len(last) == _REPEATS and min(last) >= target))


@dataclass(frozen=True, eq=False)
class CurvePoint(Result):
    """One training of its own in ``d`` dimensions; all n of them is full fine-tuning."""

    d: int
    seed: int
    value: float
    loss: float
    """Mean training loss of the last tenth of the steps."""
    steps: int
    seconds: float

    def summary(self) -> str:
        return f"{self.value:.4g} at d = {self.d:,} after {self.steps} steps (seed {self.seed}, {self.seconds:.0f} s)"

    def __str__(self) -> str:
        """Return the numbers under their names."""
        cells = [f"{self.d:,}", str(self.seed), f"{self.value:.4g}", f"{self.loss:.4g}", str(self.steps)]
        return "\n".join(
            aligned(["d", "seed", "metric", "loss", "steps", "seconds"], [[*cells, f"{self.seconds:.0f}"]])
        )

    def _figure(self) -> Figure:
        return numbers_figure({f"d = {self.d:,}": (self.value, self.value, self.value)}, "metric")


@dataclass(frozen=True, eq=False)
class IntrinsicDimension(Result):
    """How many random directions it took to reach a target, and how certain that is."""

    derived = ("d", "interval", "conclusive", "noise", "spread", "reached", "steps", "seconds")

    n: int
    target: float
    """The value of the metric that was to be reached."""
    searches: tuple[Search, ...]
    """One for each seed."""
    settings: Settings
    confirmations: tuple[CurvePoint, ...] = ()
    """Runs of their own at d/2 and d, with as many steps as the search took, where they were asked for."""
    full: float | None = None
    """The metric of full fine-tuning, where it was given."""
    lower_is_better: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether at least half of the seeds reached the target."""
        return self.d is not None

    @property
    def d(self) -> int | None:
        """The median over seeds; None where it lies among the seeds that did not reach the target."""
        found = median_low(float("inf") if s.d is None else s.d for s in self.searches)
        return None if found == float("inf") else int(found)

    @property
    def spread(self) -> tuple[int, int] | None:
        """Smallest and largest over seeds; None where a seed did not reach the target."""
        found = [s.d for s in self.searches if s.d is not None]
        return (min(found), max(found)) if len(found) == len(self.searches) else None

    @property
    def interval(self) -> tuple[int, int | None]:
        """From the first dimension that may reach the target, noise allowed for, to the one in which every seed did.

        The end is None where a seed did not.
        """
        low, high = zip(*(s.interval(self.target, self._sign) for s in self.searches), strict=True)
        return min(low), None if None in high else max(high)

    @property
    def conclusive(self) -> bool:
        """Whether the interval has an end, and spans a factor of four at most."""
        low, high = self.interval
        return high is not None and (low == high or high <= _SPREAD * low)

    @property
    def noise(self) -> float:
        """The standard deviation of the metric about one that only gets better, over all seeds."""
        return math.sqrt(fmean(s.noise(self._sign) ** 2 for s in self.searches))

    @property
    def _sign(self) -> int:
        return -1 if self.lower_is_better else 1

    @property
    def steps(self) -> int:
        """Steps of training over all seeds."""
        return sum(s.steps for s in self.searches)

    @property
    def seconds(self) -> float:
        """Seconds over all seeds."""
        return sum(s.seconds for s in self.searches)

    @property
    def best(self) -> Check:
        """The best evaluation of all seeds."""
        choose = min if self.lower_is_better else max
        return choose((check for s in self.searches for check in s.checks), key=lambda check: check.value)

    def summary(self) -> str:
        cost = f"{self.steps} steps, {len(self.searches)} seed{'s' * (len(self.searches) > 1)}, {self.seconds:.0f} s"
        if self.d is None:
            best = self.best
            return (
                f"target {self.target:.4g} not reached up to d = {max(s.largest for s in self.searches):,}: "
                f"best {best.value:.4g} at d = {best.d:,} after {best.step} steps ({cost}){self._fall()}"
            )
        if not any(s.d for s in self.searches):
            if_lower = "" if self.lower_is_better else "; if lower is better, set evaluate.lower_is_better = True"
            return f"d = 0: the target {self.target:.4g} was met before any training ({self._values(0)}){if_lower}"
        low, high = self.interval
        share = f"{100 * self.d / self.n:.2g} % of n = {self.n:,} ({cost})"
        if self.conclusive:
            return f"d = {self.d:,}{'' if low == high else f' (from {low:,} to {high:,})'}, {share}"
        end = f"beyond {max(s.largest for s in self.searches):,}" if high is None else f"{high:,}"
        return f"inconclusive: d from {low:,} to {end}, in the median {self.d:,}, {share}; add seeds or test examples"

    def _values(self, place: int) -> str:
        return f"metric {', '.join(f'{s.checks[place].value:.4g}' for s in self.searches)}"

    def _fall(self) -> str:
        """Say so where the best search lost more than half of its gain again, as steps that are too long make it.

        Noise falls too: the last two evaluations must lie below the best by more than noise explains.
        """
        best = self.best
        values = [self._sign * c.value for s in self.searches if best in s.checks for c in s.checks]
        top = values.index(max(values))
        up, down = values[: top + 1], values[top:][::-1]
        noise, lost = noise_about((up, rising(up)), (down, rising(down))), max(values) - max(values[-2:])
        if top > len(values) - 3 or lost <= max((values[top] - values[0]) / 2, 2 * _WITHIN * noise):
            return ""
        lr = float(self.settings["lr"] or 0)
        return f"; it then fell to {abs(values[-1]):.4g}, so the steps were too long: type lr={lr / 4:.2g}"

    def __str__(self) -> str:
        """Return one line a search as a table for the terminal."""
        cells = [
            [
                str(s.seed),
                "–" if s.d is None else f"{s.d:,}",
                f"{s.largest:,}",
                f"{s.checks[-1].value:.4g}",
                str(s.steps),
            ]
            for s in self.searches
        ]
        return "\n".join([*aligned(["seed", "d", "largest d tried", "metric", "steps"], cells), self.summary()])

    def _figure(self) -> Figure:
        return search_figure(self)


@dataclass(frozen=True, eq=False)
class DimensionCurve(Result):
    """The metric after independent trainings in several dimensions."""

    n: int
    start: float
    """The metric before any training."""
    points: tuple[CurvePoint, ...]
    """One for each training."""
    settings: Settings
    full: float | None = None
    """The metric of full fine-tuning, where it was given."""
    lower_is_better: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions, ascending."""
        return tuple(sorted({point.d for point in self.points}))

    def values(self, d: int) -> tuple[float, ...]:
        """Return the metric of every seed at one dimension."""
        return tuple(point.value for point in self.points if point.d == d)

    def mean(self, d: int) -> float:
        """Return the mean of the metric over seeds at one dimension."""
        return fmean(self.values(d))

    def d(self, target: float) -> int | None:
        """Return the smallest dimension whose mean over seeds reaches the target, None if none does."""
        sign = -1 if self.lower_is_better else 1
        return next((d for d in self.dims if sign * self.mean(d) >= sign * target), None)

    def __str__(self) -> str:
        """Return the mean and range at every dimension as a table for the terminal."""
        rows = (f"{d:>12,} {self.mean(d):.4g}{_range(self.values(d))}" for d in self.dims)
        full = "" if self.full is None else f"\n{'full':>12} {self.full:.4g}"
        return "\n".join([f"{'d':>12} metric", f"{0:>12} {self.start:.4g}", *rows]) + full

    def summary(self) -> str:
        choose = min if self.lower_is_better else max
        best = choose(self.dims, key=self.mean)
        runs = f"{len(self.points)} trainings, {sum(point.seconds for point in self.points):.0f} s"
        return f"metric {self.start:.4g} before training, best {self.mean(best):.4g} at d = {best:,} ({runs})"

    def _figure(self) -> Figure:
        return curve_figure(self)


def _range(values: Sequence[float]) -> str:
    return "" if len(values) == 1 else f"  ({min(values):.4g} to {max(values):.4g}, {len(values)} seeds)"
