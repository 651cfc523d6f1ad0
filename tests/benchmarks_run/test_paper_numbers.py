"""Numbers of the paper's page: their intervals, and how they are written."""

import math

import pytest
from benchmarks.paper.numbers import mean, median, proportion, ratio, shown, slope, table


def test_ratio_is_of_the_same_round():
    rounds = {"job": [2.0, 30.0, 6.0], "reference": [1.0, 10.0, 2.0]}
    assert ratio(rounds, "job", "reference") == {"value": 3.0, "low": 2.0, "high": 3.0}


def test_median_and_range_are_scaled():
    assert median([0.003, 0.001, 0.002], 1e3) == pytest.approx({"value": 2.0, "low": 1.0, "high": 3.0})


def test_mean_has_student_s_interval():
    found = mean([1.0, 2.0, 3.0])
    margin = 4.302653 / math.sqrt(3)  # t of two degrees of freedom at 97.5 %, times the standard error
    assert found == pytest.approx({"value": 2.0, "low": 2.0 - margin, "high": 2.0 + margin}, rel=1e-6)
    assert mean([5.0]) == {"value": 5.0, "low": None, "high": None}


def test_proportion_has_the_exact_interval():
    assert proportion(0, 100)["high"] == pytest.approx(1 - 0.025 ** (1 / 100))
    assert proportion(100, 100)["low"] == pytest.approx(0.025 ** (1 / 100))


def test_slope_is_the_power():
    assert slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("number", "form", "text"),
    [
        (None, "", "–"),
        (12345.6, "", "12,346"),
        (0.012345, "", "0.0123"),
        (0.5, ".0%", "50%"),
        ({"value": 2.0, "low": 1.0, "high": 300.0}, "", "2 (1 – 300)"),
        ({"value": 2.0, "low": None, "high": None}, "", "2"),
    ],
    ids=["none", "large", "small", "percent", "interval", "no-interval"],
)
def test_numbers_are_shown_without_exponents(number, form, text):
    assert shown(number, form) == text


def test_a_bar_in_a_cell_does_not_end_it():
    assert table(["|x|", "y"], [["a", 1]]) == "| \\|x\\| | y |\n| --- | ---: |\n| a | 1 |"
