"""A noisy metric gives an interval, and "inconclusive" where it is; a fall is told only where noise cannot be it."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.optimize import isotonic_regression

import gradsketch as gs
from dimension.problems import LOSS, ONE, Hidden, losses
from gradsketch.dimension.experiment import Experiment
from gradsketch.dimension.noise import noise_about, rising
from gradsketch.dimension.results import Check, IntrinsicDimension, Search, settled
from gradsketch.dimension.search import _is_over, _next_d, _Plan
from gradsketch.dimension.step_length import _longest

TRUTH, TARGET = 512, 0.5 + 0.03 * 8.5


def level(d: int) -> float:
    """A metric that gains 0.03 with every doubling and crosses the target between 256 and 512."""
    return 0.5 + 0.03 * math.log2(max(d, 1))


def simulated(of: Callable[[int], float], noise: float, seeds: int, draw: random.Random, target: float = TARGET):
    """Return what a search would, were this the metric in d dimensions."""
    experiment = Experiment.of(Hidden(64, 2), losses, ONE, lambda _: 0.0, None, gs.AFFD, 1e-3, 1)
    plan = _Plan(target, 16, 1 << 16, 100, None)
    searches = []
    for seed in range(seeds):
        checks = [Check(0, 0, of(0) + draw.gauss(0, noise), None, 0.0)]
        while not _is_over(experiment, plan, checks):
            d = _next_d(experiment, plan, checks)
            checks.append(Check(checks[-1].step + 100, d, of(d) + draw.gauss(0, noise), 1.0, 0.0))
        found = checks[-1].d if checks[-1].value >= target else None
        searches.append(Search(seed, found, tuple(checks)))
    return IntrinsicDimension(1 << 20, target, tuple(searches), {"metric": "metric", "lr": 0.02})


def covers(result: IntrinsicDimension) -> bool:
    low, high = result.interval
    return low <= TRUTH and (high is None or high >= TRUTH)


def test_without_noise_there_is_one_answer_and_no_step_more() -> None:
    result = simulated(level, 0.0, 1, random.Random(0))
    assert (result.d, result.interval, result.conclusive, result.noise) == (TRUTH, (TRUTH, TRUTH), True, 0.0)
    values = [check.value for check in result.searches[0].checks]
    assert max(values[:-1]) < TARGET <= values[-1]
    assert "(from" not in result.summary()


@pytest.mark.statistical  # 300 searches at each noise; the shares seen were 1.0 to 0.96 and, of wrong claims, 0 to 0.03
@pytest.mark.parametrize(
    ("seeds", "noise"), [(1, 0.003), (1, 0.01), (1, 0.03), (3, 0.003), (3, 0.01), (3, 0.03), (3, 0.06)]
)
def test_the_interval_covers_the_truth(seeds: int, noise: float) -> None:
    draw = random.Random(0)
    results = [simulated(level, noise, seeds, draw) for _ in range(300)]
    assert sum(map(covers, results)) >= 0.94 * len(results)
    assert sum(r.conclusive and not covers(r) for r in results) <= 0.05 * len(results)
    conclusive = sum(r.conclusive for r in results) / len(results)
    assert conclusive == 1.0 if noise < 0.01 else conclusive < 0.35 if noise > 0.01 else conclusive > 0.6


def test_a_lucky_evaluation_does_not_end_a_search() -> None:
    values = [0.5, 0.6, 0.55, 0.62]
    assert settled([0.5, 0.6, 0.7], 0.7)
    assert not settled([*values, 0.7], 0.7)  # noise is seen, and the target reached by less
    assert settled([*values, 0.9], 0.7)
    assert settled([*values, 0.7, 0.71, 0.7], 0.7)
    assert not settled([*values, 0.7, 0.69, 0.7], 0.7)
    seen = iter([0.1, 0.3, 0.2, 0.5, 0.2, 0.2, 0.5, 0.51, 0.52, 0.52])
    result = gs.intrinsic_dimension(
        Hidden(300, 4), losses, ONE, lambda _: next(seen), target=0.5, d_min=2, d_max=256, check_every=1
    )
    checks = result.searches[0].checks
    assert [check.value for check in checks] == [0.1, 0.3, 0.2, 0.5, 0.2, 0.2, 0.5, 0.51, 0.52]
    assert [check.d for check in checks] == [0, 2, 2, 4, 4, 8, 16, 16, 16]
    assert result.interval == (4, 16) or result.interval[0] < 16


def results(*dims: int | None) -> IntrinsicDimension:
    """Return searches whose metric only rises and that reached 0.9 in these dimensions, or not at all."""
    searches = tuple(
        Search(i, d, (Check(0, 0, 0.1, None, 0.0), Check(10, d or 64, 0.95 if d else 0.5, 1.0, 2.0)))
        for i, d in enumerate(dims)
    )
    return IntrinsicDimension(1000, 0.9, searches, {"metric": "Accuracy", "lr": 0.02})


def test_seeds_that_disagree_are_inconclusive() -> None:
    assert (results(16, 32, 64).interval, results(16, 32, 64).conclusive) == ((16, 64), True)
    assert (results(16, 32, 128).interval, results(16, 32, 128).conclusive) == ((16, 128), False)
    assert (results(256, None, 2048).interval, results(256, None, 2048).conclusive) == ((64, None), False)
    words = results(16, None, 32).summary()
    assert words.startswith("inconclusive: d from 16 to beyond 64, in the median 32, 3.2 % of n = 1,000")
    assert words.endswith("add seeds or test examples")
    assert results(16, 32, 128).summary().startswith("inconclusive: d from 16 to 128, in the median 32")
    met = "d = 0: the target 0.9 was met before any training (metric 0.1, 0.1); if lower is better, set"
    assert results(0, 0).summary() == f"{met} evaluate.lower_is_better = True"
    assert results(0, 512).summary().startswith("inconclusive")


def test_json_and_figure_carry_the_interval() -> None:
    result = results(256, None, 256)
    record = json.loads(result.to_json())
    assert (record["interval"], record["conclusive"], record["noise"]) == ([64, None], False, 0.0)
    assert IntrinsicDimension.from_json(result.to_json()) == result
    pytest.importorskip("matplotlib")
    axes = result.plot().axes[0]
    assert axes.get_title().startswith("inconclusive: d = 256 of")
    assert len(axes.patches) == 1
    assert axes.patches[0].get_x() == 64
    clear = results(64, 64).plot().axes[0]
    assert clear.get_title() == "d = 64 of n = 1,000"
    assert not clear.patches


def test_the_mails_of_the_benchmark_are_inconclusive_at_ninety_percent_of_the_gain() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "intrinsic_dimension_spam.json"
    record = json.loads(file.read_text())["results"]["spam"]["search"]
    searches = tuple(
        Search(s["seed"], s["d"], tuple(Check(**check) for check in s["checks"])) for s in record["searches"]
    )
    result = IntrinsicDimension(record["n"], record["target"], searches, record["settings"])
    assert result.summary().startswith("inconclusive: d from ")
    assert result.interval[0] <= 256
    assert result.interval[1] is None
    assert 0.005 < result.noise < 0.1


# --- noise ---


def test_the_monotone_fit_is_that_of_scipy() -> None:
    draw = random.Random(0)
    for count in (1, 2, 5, 30):
        values = [draw.gauss(0, 1) for _ in range(count)]
        assert rising(values) == pytest.approx(list(isotonic_regression(values).x))


@pytest.mark.statistical  # the mean over 200 series of 40 is within 18 % of the truth for every slope
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1])
def test_noise_is_measured_whatever_the_slope(slope: float) -> None:
    draw = random.Random(1)
    squares = []
    for _ in range(200):
        values = [slope * i + draw.gauss(0, 0.2) for i in range(40)]
        squares.append(noise_about((values, rising(values))) ** 2)
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(0.2, rel=0.2)
    assert noise_about(([1.0, 2.0, 3.0], rising([1.0, 2.0, 3.0]))) == 0


# --- why a metric fell ---


def words(*values: float) -> str:
    checks = tuple(Check(10 * i, 2**i if i else 0, value, 1.0, 2.0) for i, value in enumerate(values))
    return str(IntrinsicDimension(1000, 0.9, (Search(0, None, checks),), {"metric": "Accuracy", "lr": 0.02}))


def test_a_fall_is_told() -> None:
    assert words(0.5, 0.6, 0.8, 0.6, 0.55).endswith("it then fell to 0.55, so the steps were too long: type lr=0.005")
    assert "fell to 0.4" in words(0.5, 0.4, 0.4)
    assert "fell" not in words(0.5, 0.6, 0.8, 0.7, 0.7)
    assert "fell" not in words(0.5, 0.6, 0.8)
    assert "fell" not in words(0.5, 0.6, 0.8, 0.5)  # one evaluation says nothing


@pytest.mark.statistical  # 2 of 300 seen
def test_noise_is_not_taken_for_a_fall() -> None:
    draw = random.Random(1)
    told = sum("fell" in str(simulated(lambda _: 0.5, 0.15, 1, draw, target=1.5)) for _ in range(300))
    assert told <= 0.02 * 300


# --- the learning rate ---


def test_the_learning_rate_is_the_best_of_a_few_short_tries() -> None:
    model = Hidden(600, 20)
    before = model.theta.detach().clone()
    result = gs.intrinsic_dimension(
        model, losses, ONE, LOSS, target=0.1 * LOSS(model), d_min=2, d_max=256, check_every=20
    )
    assert 10 <= result.d <= 40
    assert torch.equal(model.theta, before)
    parameters, after = gs.Parameters(model), {}
    for doublings in range(12):
        lr = 2e-3 * 2.0**doublings
        with gs.Subspace(model, parameters, gs.AFFD(parameters.n, 256, seed=0)) as subspace:
            adam = torch.optim.Adam([subspace.w], lr=lr)
            for _ in range(6):
                adam.zero_grad()
                subspace(ONE).sum().backward()
                adam.step()
            after[lr] = subspace(ONE).item()
    lr = result.settings["lr"]
    assert lr > 2e-3
    assert after[lr] <= min(after.values()) + 0.01 * after[2e-3] < after[2 * lr]


def test_a_learning_rate_at_which_the_loss_overflows_is_not_chosen() -> None:
    def wall(model, batch):
        moved = (model.theta - start).abs().max()
        return model(batch) + torch.where(moved > 5e-3, torch.nan, 0.0)

    model = Hidden(600, 20)
    start = model.theta.detach().clone()
    curve = gs.dimension_curve(model, wall, ONE, LOSS, [64], steps=1)
    assert curve.settings["lr"] < 2e-3


def test_the_measured_learning_rate_follows_the_scale_of_the_model() -> None:
    """The same problem with theta in other units needs steps in those units."""

    class Scaled(Hidden):
        scale = 1.0

        def forward(self, x):
            return (self.directions @ (self.theta * self.scale) - self.goal).square().sum().expand(len(x))

    def lr(scale: float) -> float:
        model = Scaled(600, 20)
        model.scale = scale
        return gs.dimension_curve(model, losses, ONE, LOSS, [64], steps=1).settings["lr"]

    assert 1 / 2 <= 8 * lr(8.0) / lr(1.0) <= 2
    assert 1 / 2 <= lr(1 / 8) / (8 * lr(1.0)) <= 2


def test_tries_end_where_the_loss_rises_or_falls_by_less_than_one_percent() -> None:
    def longest(after: dict[float, float]) -> float:
        return _longest(lambda lr: after[round(lr / 2e-3, 6)])

    assert longest({1: 1.0, 2: 1.005, 4: 0.9, 8: 0.92}) == 8e-3
    assert longest({1: 1.0, 2: 1.005, 4: 1.009, 8: 1.011}) == 8e-3
    assert longest({1: 1.0, 2: 1.2, 0.5: 0.995}) == 2e-3
    assert longest({1: 1.0, 2: 1.2, 0.5: 0.9, 0.25: 0.8, 0.125: 0.795}) == 5e-4
    assert longest({1: math.nan, 0.5: math.inf, 0.25: 3.0, 0.125: 3.0}) == 5e-4
