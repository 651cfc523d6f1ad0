"""A third of many cases by default, all of them with ``-m slow``."""

from itertools import product

import pytest


def a_third(cases, first=0):
    """Return cases, of which only every third runs by default; each is a tuple, or one value."""
    return [_param(case, number % 3 == first) for number, case in enumerate(cases)]


def some(cases, chosen):
    """Return cases, of which only those chosen run by default."""
    return [_param(case, case in chosen) for case in cases]


def latin(*axes):
    """Return all combinations, of which a third runs by default: every value meets a third of those of another axis."""
    numbered = product(*(list(enumerate(axis)) for axis in axes))
    return [_param(tuple(v for _, v in each), sum(i for i, _ in each) % 3 == 0) for each in numbered]


def _param(case, default):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=() if default else pytest.mark.slow)
