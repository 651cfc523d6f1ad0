"""How noisy a metric is, seen from a training in which it should only get better."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["noise_about", "rising"]

# Each level of a monotone fit takes about this many degrees of freedom: Meyer and Woodroofe, "On the degrees of freedom
# in shape-restricted regression" (Annals of Statistics 2000), section 4.
_FREEDOM = 1.5


def rising(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence nearest to the values in squares (pool adjacent violators)."""
    levels: list[tuple[float, int]] = []  # mean and number of the values of each level
    for value in values:
        level = value, 1
        while levels and levels[-1][0] > level[0]:
            mean, count = levels.pop()
            total = count + level[1]
            level = (mean * count + level[0] * level[1]) / total, total
        levels.append(level)
    return [mean for mean, count in levels for _ in range(count)]


def noise_about(*pieces: tuple[Sequence[float], Sequence[float]]) -> float:
    """Return the standard deviation of values about monotone fits; each piece is values and their fit.

    0 where every value is fitted: a metric that only rises shows no noise.
    """
    squares = sum((v - f) ** 2 for values, fit in pieces for v, f in zip(values, fit, strict=True))
    count = sum(len(values) for values, _ in pieces)
    levels = sum(len(set(fit)) for _, fit in pieces)
    # Where the metric rises steeply, most levels are one value, which costs one degree of freedom and no more.
    left = max(count - _FREEDOM * levels, (count - levels) / 2)
    return math.sqrt(squares / left) if left else 0.0
