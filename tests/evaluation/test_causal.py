"""Removing rows from ridge regression: what made a loss low is missed, random rows are not."""

import pytest
import torch
from torch import nn

from evaluation.linear import Regression
from gradsketch.errors import InputError
from gradsketch.evaluation import removal_check
from unchecked import errors_of


def test_proponents_are_missed():
    regression = Regression()
    found = regression.influences().topk(4, dim=1).indices.tolist()
    result = removal_check(regression.train, regression.measure, 40, found)
    for i, rows in enumerate(found):
        kept = [row for row in range(40) if row not in rows]
        assert result.after[i] == regression.measure(regression.train(kept))[i]
    assert torch.equal(result.before, regression.measure(regression.train(list(range(40)))))
    assert result.value == pytest.approx(float(result.after.mean() - result.random.mean()))
    assert result.value > 3 * result.standard_error > 0
    assert result.models == 1 + 6 + 3
    assert result.removed == (4,) * 6


def test_rows_of_no_influence_are_not_missed():
    regression = Regression()
    found = regression.influences().abs().topk(2, dim=1, largest=False).indices.tolist()
    result = removal_check(regression.train, regression.measure, 40, found, controls=8)
    assert abs(result.value) < 3 * result.standard_error
    assert result.random.shape == (8, 6)


def test_equal_removals_are_trained_once():
    regression = Regression()
    result = removal_check(regression.train, regression.measure, 40, [[3, 5]] * 5 + [[5, 3]], controls=2)
    assert regression.trained == result.models == 1 + 1 + 2


def test_of_one_query_the_random_removals_give_the_error():
    regression = Regression(queries=1)
    result = removal_check(regression.train, regression.measure, 40, [[0, 1]], controls=5)
    assert result.standard_error == pytest.approx(float(result.random.std() * 1.2**0.5))


def test_bad_input_says_what_to_do():
    regression = Regression()
    for found in ([], [[]], [[40]], [[-1]], [list(range(40))]):
        with pytest.raises(InputError):
            removal_check(regression.train, regression.measure, 40, found)
    with pytest.raises(InputError, match="controls"):
        removal_check(regression.train, regression.measure, 40, [[1]] * 6, controls=1)
    with pytest.raises(InputError, match="2 queries, losses of 6"):
        removal_check(regression.train, regression.measure, 40, [[1], [2]])


def test_rows_to_remove_may_be_tensors():
    check = "gs.removal_check(sum, lambda total: torch.tensor([total, total], dtype=torch.float64), 9, {})"
    tensors, lists = check.format("torch.tensor([[1], [5]])"), check.format("[[1], [5]]")
    assert errors_of([f"torch.testing.assert_close({tensors}.after, {lists}.after)"]) == [""]


def test_a_mask_of_rows_is_refused():
    regression = Regression()
    with pytest.raises(InputError, match="query 0: row True"):
        removal_check(regression.train, regression.measure, 40, [[i == 3 for i in range(3, 8)]] * 6)


def test_random_rows_are_as_many_as_were_found():
    regression = Regression(queries=3)
    found = [[1], [2], list(range(5, 25))]
    result = removal_check(regression.train, regression.measure, 40, found, controls=3)
    alone = removal_check(regression.train, regression.measure, 40, [[1], [2], [3]], controls=3)
    assert torch.equal(result.random[:, :2], alone.random[:, :2])
    assert not torch.equal(result.random[:, 2], alone.random[:, 2])
    assert result.models == regression.trained - alone.models == 1 + 3 + 2 * 3


def test_models_are_asked_in_evaluation_mode_and_answer_with_one_loss_a_query():
    def train(rows):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 1))  # in training mode

    def measure(model):
        return model(torch.ones(2, 2))[:, 0]

    assert removal_check(train, measure, 40, [[1], [2]]).value == 0
    for wrong in (
        lambda model: measure(model)[None],
        lambda model: measure(model).sum(),
        lambda model: measure(model)[:0],
    ):
        with pytest.raises(InputError, match="one loss a query"):
            removal_check(train, wrong, 40, [[1]])
