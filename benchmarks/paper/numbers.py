"""Numbers with their intervals: how they are made, kept in JSON, and written on a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

__all__ = ["Interval", "mean", "median", "proportion", "ratio", "shown", "slope", "table"]

Interval = dict[str, Any]  # "value", and "low" and "high", which are None where there is no interval


def median(values: Sequence[float], scale: float = 1.0) -> Interval:
    """Return the median and the range: of r rounds it covers the true median with probability 1 − 2^(1 − r)."""
    values = [scale * value for value in values]
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(rounds: dict[str, list[float]], job: str, reference: str) -> Interval:
    """Return the median over rounds of one job's time over another's in the same round, and its range."""
    return median([a / b for a, b in zip(rounds[job], rounds[reference], strict=True)])


def mean(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % interval by Student's t; of a single value there is no interval."""
    value = statistics.fmean(values)
    if len(values) < 2:
        return {"value": value, "low": None, "high": None}
    margin = statistics.stdev(values) / math.sqrt(len(values)) * float(stats.t.ppf(0.975, len(values) - 1))
    return {"value": value, "low": value - margin, "high": value + margin}


def proportion(count: int, of: int) -> Interval:
    """Return a share and its exact (Clopper–Pearson) 95 % interval."""
    found = stats.binomtest(count, of).proportion_ci(0.95)
    return {"value": count / of, "low": float(found.low), "high": float(found.high)}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the power p of the law y = c·x^p that fits best."""
    return float(stats.linregress([math.log(v) for v in x], [math.log(v) for v in y]).slope)


def shown(number: Interval | float | None, form: str = "") -> str:
    """Return a number for a page, with its interval where it has one; by default three digits, and no exponent."""
    if number is None:
        return "–"
    if not isinstance(number, dict):
        return format(number, form or (",.0f" if abs(number) >= 100 else ".3g"))
    value, low, high = (shown(number[key], form) for key in ("value", "low", "high"))
    return value if number["low"] is None or low == high else f"{value} ({low} – {high})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; its first column is text, the others numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
