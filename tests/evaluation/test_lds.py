"""The linear datamodeling score on ridge regression, where the truth is exact."""

import json

import pytest
import torch
from scipy.stats import spearmanr

from evaluation.linear import Regression
from gradsketch.errors import FingerprintError, InputError, NonFiniteError
from gradsketch.evaluation import linear_datamodeling_score, retrain_on_subsets
from gradsketch.random import Stream


@pytest.fixture(scope="module")
def world():
    regression = Regression()
    return regression, retrain_on_subsets(regression.train, regression.measure, 40, subsets=80)


def test_subsets_have_the_wanted_size_and_more_extend_fewer(world):
    regression, retrainings = world
    assert retrainings.kept.sum(1).tolist() == [20] * 80
    fewer = retrain_on_subsets(regression.train, regression.measure, 40, subsets=5)
    assert torch.equal(fewer.kept, retrainings.kept[:5])
    assert torch.equal(fewer.losses, retrainings.losses[:5])
    other = retrain_on_subsets(regression.train, regression.measure, 40, subsets=5, seed=1)
    assert not torch.equal(fewer.kept, other.kept)


def test_losses_are_those_of_models_trained_on_the_subsets(world):
    regression, retrainings = world
    rows = retrainings.kept[7].nonzero()[:, 0].tolist()
    assert torch.equal(retrainings.losses[7], regression.measure(regression.train(rows)))


def test_influences_predict_and_their_negatives_predict_the_opposite(world):
    regression, retrainings = world
    result = linear_datamodeling_score(regression.influences(), retrainings)
    assert result.value > 0.6
    assert result.standard_error < 0.1
    assert result.subsets == 80
    assert linear_datamodeling_score(-regression.influences(), retrainings).value == pytest.approx(-result.value)


def test_each_query_is_scipys_spearman(world):
    _, retrainings = world
    scores = Stream(3).normals(0, 6 * 40).view(6, 40)
    result = linear_datamodeling_score(scores, retrainings)
    for i, value in enumerate(result.per_query):
        predicted = [scores[i].double()[kept].sum().item() for kept in retrainings.kept]
        assert value == pytest.approx(spearmanr(predicted, -retrainings.losses[:, i]).statistic, abs=1e-9)


@pytest.mark.statistical
def test_random_scores_predict_nothing_and_the_error_says_how_nothing(world):
    # 20 draws of scores. z spreads by at most 1, so its mean stays below 4/√20 but for 1 in 10,000 cases.
    _, retrainings = world
    results = [
        linear_datamodeling_score(Stream(seed, "random scores").normals(0, 6 * 40).view(6, 40), retrainings)
        for seed in range(20)
    ]
    z = torch.tensor([r.value / r.standard_error for r in results])
    assert abs(z.mean()) < 0.9
    assert 0.4 < z.std() < 1.6


def test_interrupted_it_goes_on_where_it_stopped(tmp_path, world):
    regression, retrainings = world
    path = tmp_path / "subsets.json"
    calls = []

    def train(rows):
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return regression.train(rows)

    with pytest.raises(KeyboardInterrupt):
        retrain_on_subsets(train, regression.measure, 40, subsets=6, path=path)
    resumed = retrain_on_subsets(train, regression.measure, 40, subsets=6, path=path)
    assert len(calls) == 7  # three, the interrupted one, and the three that were missing
    assert torch.equal(resumed.losses, retrainings.losses[:6])
    assert len(json.loads(path.read_text())["losses"]) == 6
    with pytest.raises(FingerprintError, match="another path"):
        retrain_on_subsets(train, regression.measure, 40, subsets=6, seed=1, path=path)
    for other in ({"train": lambda rows: regression.train(rows[1:])}, {"measure": lambda m: regression.measure(m) + 1}):
        work = {"train": train, "measure": regression.measure} | other
        with pytest.raises(FingerprintError, match=next(iter(other))):
            retrain_on_subsets(n=40, subsets=8, path=path, **work)


def test_bad_input_says_what_to_do(world):
    regression, retrainings = world
    for options in ({"fraction": 0.0}, {"fraction": 1.0}, {"subsets": 1}):
        with pytest.raises(InputError, match="subsets of"):
            retrain_on_subsets(regression.train, regression.measure, 40, **options)
    with pytest.raises(InputError, match=r"\[6, 40\]"):
        linear_datamodeling_score(torch.randn(6, 39), retrainings)
    with pytest.raises(InputError, match="summed scores of query 0"):
        linear_datamodeling_score(torch.zeros(6, 40), retrainings)
    with pytest.raises(NonFiniteError, match=r"query 0 under the model of subset 0"):
        retrain_on_subsets(regression.train, lambda model: regression.measure(model) / 0 * 0, 40, subsets=2)


def test_rows_without_a_score_are_named(world):
    regression, retrainings = world
    scores = regression.influences().clone()
    scores[1, 7] = torch.nan
    with pytest.raises(InputError, match="row 7 for query 1 is nan"):
        linear_datamodeling_score(scores, retrainings)


def test_another_number_of_queries_than_before_is_refused(tmp_path):
    regression = Regression()
    asked = [0, 1, 2]

    def measure(model):
        return regression.measure(model)[asked]

    path = tmp_path / "losses.json"
    retrain_on_subsets(regression.train, measure, 40, subsets=2, path=path)
    asked.append(3)
    with pytest.raises(InputError, match=r"losses of 4 queries under the model of subset 2. Wanted: of 3"):
        retrain_on_subsets(regression.train, measure, 40, subsets=3, path=path)


def test_four_subsets_have_an_error_and_three_have_none():
    regression = Regression()
    four, three = (retrain_on_subsets(regression.train, regression.measure, 40, subsets=m) for m in (4, 3))
    assert 0 < linear_datamodeling_score(regression.influences(), four).standard_error < 1
    error = linear_datamodeling_score(regression.influences(), three).standard_error
    assert error != error  # NaN
