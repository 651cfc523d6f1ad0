"""Area under the curve against other routes, its error against simulation."""

import statistics

import pytest
import torch
from scipy.stats import mannwhitneyu

from gradsketch.errors import InputError
from gradsketch.evaluation import mislabelled_auc
from gradsketch.random import Stream
from unchecked import errors_of


def draw(seed: int, n: int = 120, shift: float = 1.0, loss_shift: float = 0.7):
    """Return suspicion and loss that share half their noise, and which labels are wrong."""
    stream = Stream(seed, "auc")
    wrong = torch.arange(n) < n // 4
    noise = stream.normals(0, 3 * n).view(3, n)
    return noise[0] + noise[1] + shift * wrong, noise[0] + noise[2] + loss_shift * wrong, wrong


def test_the_area_is_mann_whitneys_with_ties_counted_half():
    suspicion, loss, wrong = draw(0)
    suspicion = suspicion.round()
    result = mislabelled_auc(suspicion, loss, wrong)
    for area, values in ((result.suspicion, suspicion), (result.loss, loss)):
        u = mannwhitneyu(values[wrong], values[~wrong]).statistic
        assert area.value == pytest.approx(u / (30 * 90), abs=1e-12)
    assert result.difference == pytest.approx(result.suspicion.value - result.loss.value)
    assert (result.wrong, result.examples) == (30, 120)


def test_precision_counts_the_most_suspicious():
    wrong = torch.tensor([True, True, False, False, False])
    result = mislabelled_auc(torch.tensor([5.0, 1, 4, 3, 2]), torch.tensor([5.0, 4, 3, 2, 1]), wrong)
    assert result.suspicion.precision == 0.5
    assert result.loss.precision == 1.0
    assert result.loss.value == 1.0
    assert result.suspicion.value == 0.5


@pytest.mark.statistical
def test_standard_errors_are_the_spread_over_data_sets():
    # 300 draws: a standard deviation is known to 4 %, so 20 % is beyond 1e-5.
    results = [mislabelled_auc(*draw(seed)) for seed in range(300)]
    for value, error in (
        ([r.suspicion.value for r in results], [r.suspicion.standard_error for r in results]),
        ([r.difference for r in results], [r.difference_standard_error for r in results]),
    ):
        assert statistics.stdev(value) == pytest.approx(statistics.mean(error), rel=0.2)


def test_a_comparison_with_itself_has_no_difference_and_no_error():
    suspicion, _, wrong = draw(1)
    result = mislabelled_auc(suspicion, suspicion, wrong)
    assert (result.difference, result.difference_standard_error) == (0.0, 0.0)


def test_bad_input_says_what_to_do():
    values = torch.arange(4.0)
    with pytest.raises(InputError, match="at least two wrong"):
        mislabelled_auc(values, values, torch.tensor([True, False, False, False]))
    with pytest.raises(InputError, match="loss 2 is not a number"):
        mislabelled_auc(values, torch.tensor([0.0, 1, float("nan"), 3]), torch.tensor([True, True, False, False]))


def test_wrong_labels_are_named_by_true_and_not_by_place():
    places, short = errors_of(
        [
            "gs.mislabelled_auc(torch.rand(4), torch.rand(4), torch.tensor([1, 1, 0, 0]))",
            "gs.mislabelled_auc(torch.rand(3), torch.rand(4), torch.tensor([True, True, False, False]))",
        ]
    )
    assert "wrong of torch.int64" in places
    assert "of shapes [3], [4] and [4]" in short


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_the_data_is_no_suspicion(first):
    wrong = torch.arange(20) < 5 if first else torch.arange(20) >= 15
    constant = mislabelled_auc(torch.ones(20), torch.ones(20), wrong)
    assert constant.suspicion.precision == pytest.approx(5 / 20)
    suspicion = torch.where(wrong & (torch.arange(20) % 5 < 2), 2.0, 1.0)  # two found; 18 alike, three wrong
    assert mislabelled_auc(suspicion, suspicion, wrong).suspicion.precision == pytest.approx((2 + 3 * 3 / 18) / 5)


def test_lists_are_told_to_become_tensors():
    (error,) = errors_of(["gs.mislabelled_auc([1.0] * 4, [1.0] * 4, [True, True, False, False])"])
    assert error.startswith("InputError: suspicion, loss and wrong of types list, list, list")
