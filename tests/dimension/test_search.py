"""The search finds the dimension that a problem has, stops, resumes, and says so where it cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

import gradsketch as gs
from dimension.problems import LOSS, ONE, Hidden, losses
from gradsketch.dimension.results import Check, IntrinsicDimension, Search
from sampled import latin, some
from unchecked import errors_of


def search(model: nn.Module, **options) -> IntrinsicDimension:
    defaults = {"d_min": 2, "d_max": 256, "check_every": 20, "lr": 3e-2, "target": 0.1 * LOSS(model)}
    return gs.intrinsic_dimension(model, losses, ONE, LOSS, **(defaults | options))


@pytest.mark.statistical  # seeds fixed; 80 runs with other seeds, k from 6 to 40: all within a factor of two
@pytest.mark.parametrize("k", [6, 40])
def test_a_known_dimension_is_found_within_a_factor_of_two(k: int) -> None:
    model = Hidden(600, k)
    before = model.theta.detach().clone()
    result = search(model, seeds=(0, 1))
    assert all(k / 2 <= s.d <= 2 * k for s in result.searches), [s.d for s in result.searches]
    assert result.spread == (min(s.d for s in result.searches), max(s.d for s in result.searches))
    assert torch.equal(model.theta, before)
    assert type(model) is Hidden


@pytest.mark.parametrize("kind", some(["AFFD", "AFJL", "FFD", "QK", "SJLT", "Dense", "FJL"], ["AFFD", "QK"]))
def test_every_kind_of_sketch_serves(kind: str) -> None:
    result = search(Hidden(512, 12), sketch=getattr(gs, kind), d_max=128)
    assert 6 <= result.d <= 24


def test_every_part_of_a_qk_subspace_takes_rows_of_both_factors() -> None:
    from gradsketch.dimension.rotated import prefix_nested

    phi = gs.QK(256, 64, factors=2)
    balanced = prefix_nested(phi)
    assert phi.sizes == ((8, 16), (8, 16))
    rows = balanced.dense(torch.float64)
    for d, sides in ((4, (2, 2)), (8, (4, 2)), (16, (4, 4)), (64, (8, 8))):
        part = rows[:d].view(d, 16, 16)
        unfolded = part.permute(1, 0, 2).flatten(1), part.permute(2, 0, 1).flatten(1)
        assert tuple(int(torch.linalg.matrix_rank(u, atol=1e-6)) for u in unfolded) == sides
    x, w = torch.randn(3, 256, dtype=torch.float64), torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close((balanced(x) * w).sum(), (x * balanced.lift(w)).sum())
    torch.testing.assert_close(balanced(x).square().sum(), phi(x).square().sum())


def test_a_sum_of_blocks_serves() -> None:
    model = Hidden(512, 12)
    parameters = gs.Parameters(model)
    result = search(model, sketch=lambda n, d, seed: gs.BlockSum(parameters, d, seed=seed), d_max=128)
    assert 6 <= result.d <= 24


def test_the_curve_agrees_with_the_search() -> None:
    model = Hidden(600, 20)
    target = 0.1 * LOSS(model)
    curve = gs.dimension_curve(model, losses, ONE, LOSS, [2, 16, 32, 64], steps=100, lr=3e-2)
    assert curve.start == pytest.approx(LOSS(model))
    assert 10 <= curve.d(target) <= 40
    assert curve.d(-1.0) is None
    assert "metric" in str(curve)
    assert json.loads(curve.to_json())["points"][0]["d"] == 2


def test_full_fine_tuning_keeps_the_model_as_found() -> None:
    model = Hidden(500, 10)
    before = model.theta.detach().clone()
    full = gs.fine_tune(model, losses, ONE, LOSS, steps=200, lr=1e-2)
    assert full.value < 1e-3
    assert full.d == 500
    assert torch.equal(model.theta, before)


def test_doubling_leaves_theta_and_the_metric_unchanged() -> None:
    seen = []

    def metric(model: nn.Module) -> float:
        seen.append(model.theta.detach().clone())
        return -LOSS(model)

    model = Hidden(1500, 40)
    result = gs.intrinsic_dimension(
        model, losses, ONE, metric, target=1.0, d_min=4, d_max=16, check_every=30, lr=1e-2, min_gain=1e9
    )
    # A gain of 1e9 doubles d after every check, so that each d trains for 30 steps.
    assert [check.d for check in result.searches[0].checks] == [0, 4, 8, 16]
    phi = gs.AFFD(1500, 16, seed=0)
    for d, theta in zip((4, 8), seen[1:], strict=False):
        # Found again in the smaller sketch alone, so nothing of the larger one was touched.
        small = phi.truncate(d).dense(torch.float64).T
        moved = (theta - seen[0]).double()
        w = torch.linalg.lstsq(small, moved[:, None]).solution
        assert float((small @ w - moved[:, None]).abs().max()) < 1e-5
        assert float(moved.norm()) > 0.1


def test_late_coordinates_start_as_beginners() -> None:
    model = Hidden(300, 40)
    parameters = gs.Parameters(model)
    from gradsketch.dimension.training import Training

    with gs.Subspace(model, parameters, gs.AFFD(300, 64)) as subspace:
        training = Training(subspace, gs.Function(losses), ONE, lr=1e-3, d=16, batch_size=1, seed=0)
        training.advance(50)
        before = training.w.clone()
        training.grow(32)
        training.advance(1)
        step = 1e-3 * (64 / 32) ** 0.5
        late = (training.w - before)[16:32].abs()
        # Adam's first step is the learning rate whatever the gradient.
        torch.testing.assert_close(late, torch.full_like(late, step), rtol=1e-2, atol=0)
        assert torch.equal(training.w[32:], torch.zeros(32))


def test_training_is_adam_where_d_does_not_grow() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(6), i % 3) for i in range(10)]
    model = nn.Linear(6, 3)
    parameters, task = gs.Parameters(model), gs.Classification()
    from gradsketch.dimension.training import Training, shuffled
    from gradsketch.gradients.data import Batches

    sketch = gs.AFFD(parameters.n, 16)
    with gs.Subspace(model, parameters, sketch) as subspace:
        training = Training(subspace, task, data, lr=1e-2, d=16, batch_size=4, seed=3)
        training.advance(7)
        ours = training.w.clone()
    with gs.Subspace(model, parameters, sketch) as subspace:
        adam = torch.optim.Adam([subspace.w], lr=1e-2)
        batches = shuffled(Batches(task, data, 4), seed=3)
        for _ in range(7):
            adam.zero_grad()
            task.losses(subspace, next(batches)).mean().backward()
            adam.step()
    torch.testing.assert_close(ours, subspace.w.detach())


def test_batches_are_shuffled_by_the_seed_and_can_start_anywhere() -> None:
    from gradsketch.dimension.training import shuffled
    from gradsketch.gradients.data import Batches

    data = [{"x": torch.tensor(i)} for i in range(10)]
    batches = Batches(gs.Function(losses), data, 4)

    def take(count: int, **options: int) -> list[list[int]]:
        reader = shuffled(batches, **options)
        return [next(reader)["x"].tolist() for _ in range(count)]

    first = take(9, seed=1)
    assert sorted(chain(*first[:3])) == sorted(chain(*first[3:6])) == list(range(10))
    assert first[:3] != first[3:6]
    assert take(4, seed=1, start=5) == first[5:]
    assert take(3, seed=2) != first[:3]


# --- interruption ---

_PROGRAM = """
import sys, torch, gradsketch as gs
sys.path.insert(0, {tests!r})
from dimension.problems import Hidden, LOSS, ONE, losses
torch.set_num_threads(1)
model = torch.nn.Sequential(Hidden(600, 12), torch.nn.Dropout(0.3)).train()
result = gs.intrinsic_dimension(model, losses, ONE, LOSS, target=0.1 * LOSS(model.eval()), d_min=2, d_max=256,
    check_every=20, lr=2e-2, resume={folder!r}, seeds=(0, 1), progress=False)
print(result.to_json())
"""


@pytest.mark.slow  # three starts of torch; tests/test_random_kills.py kills searches by default
def test_a_killed_search_resumes_to_the_same_result(tmp_path: Path) -> None:
    def run(folder: str) -> subprocess.Popen[str]:
        program = _PROGRAM.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / folder))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)

    def outcome(process: subprocess.Popen[str]) -> tuple[list[object], list[float]]:
        searches = json.loads(process.communicate(timeout=240)[0])["searches"]
        checks = [[(c["step"], c["d"], c["value"], c["loss"]) for c in s["checks"]] for s in searches]
        return checks, [c["seconds"] for c in searches[0]["checks"]]

    whole = run("whole")
    broken = run("broken")
    state = tmp_path / "broken" / "search-seed0.pt"
    deadline = time.monotonic() + 120
    while not (state.exists() and len(torch.load(state)["checks"]) >= 4):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    before = torch.load(state)["checks"]
    again, seconds = outcome(run("broken"))
    assert again == outcome(whole)[0]
    assert len(before) < len(again[0])  # it was killed before its end
    assert [check["seconds"] for check in before] == seconds[: len(before)]  # and went on, not anew


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    model = Hidden(300, 10)
    search(model, resume=tmp_path)
    with pytest.raises(gs.FingerprintError, match=r"lr is now 0\.01\. .*made with: lr 0\.03"):
        search(model, resume=tmp_path, lr=1e-2)
    with pytest.raises(gs.FingerprintError, match="theta0"):
        search(Hidden(300, 10, seed=1), resume=tmp_path, target=0.1 * LOSS(model))


def test_a_curve_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, trained = Hidden(300, 10), []

    def counted(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        trained.append(1)
        return model(batch)

    def curve(dims: list[int]) -> gs.dimension.results.DimensionCurve:
        return gs.dimension_curve(model, counted, ONE, LOSS, dims, steps=10, resume=tmp_path / "curve.json")

    first = curve([4, 8])
    trained.clear()
    again = curve([4, 8, 16])
    assert len(trained) == 10  # the learning rate is not measured again either
    assert again.settings["lr"] == first.settings["lr"]
    assert again.points[:2] == first.points
    with pytest.raises(gs.FingerprintError, match=r"steps is now 20\..*steps 10"):
        gs.dimension_curve(model, counted, ONE, LOSS, [4, 16], steps=20, resume=tmp_path / "curve.json")
    text = (tmp_path / "curve.json").read_text()
    (tmp_path / "curve.json").write_text(text[:-20])
    with pytest.raises(gs.StoreError, match=r"curve\.json is damaged.*delete it to start again"):
        curve([4, 8, 16])


def run_of(kind, folder, model, task, train, metric):
    """Return a number that comes out of one of the three kinds of run that keep their state."""
    options = {"resume": folder / kind, "progress": False}
    if kind == "fine_tune":
        return gs.fine_tune(model, task, train, metric, steps=4, **options).value
    if kind == "dimension_curve":
        return gs.dimension_curve(model, task, train, metric, [2], steps=4, **options).mean(2)
    return gs.intrinsic_dimension(model, task, train, metric, target=0.99, d_max=4, d_min=4, check_every=2, **options)


@pytest.mark.parametrize(
    ("kind", "change"),
    latin(
        ["intrinsic_dimension", "dimension_curve", "fine_tune"],
        ["data", "metric's data", "metric", "frozen weight", "buffer", "mode", "loss"],
    ),
)
def test_state_of_other_work_is_refused(kind, change, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    net[2].requires_grad_(False)
    data = [[(torch.randn(6), i % 2) for i in range(8)] for _ in range(2)]
    task = gs.Classification()

    def loss(scale):
        return lambda model, batch: scale * task.losses(model, (torch.stack(list(batch[0])), batch[1]))

    def run(*, train=0, test=0, metric=gs.Loss, scale=1.0):
        return run_of(kind, tmp_path, net, loss(scale), data[train], metric(task, data[test]))

    assert run() == run()
    changes = {"data": {"train": 1}, "metric's data": {"test": 1}, "metric": {"metric": gs.Accuracy}}
    arguments = changes.get(change, {"scale": 2.0} if change == "loss" else {})
    with torch.no_grad():
        if change == "frozen weight":
            net[2].weight[0, 0] += 1
        if change == "buffer":
            net[1].running_mean += 1
        if change == "mode":
            net.train()
    names = {"data": "data", "metric": "metric", "frozen weight": "model", "buffer": "model", "mode": "modes"}
    names |= {"metric's data": "measured by", "loss": "losses"}
    with pytest.raises(gs.FingerprintError, match=f"(^|; ){names[change]} is now"):
        run(**arguments)


def test_random_examples_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    class Crops(list):
        def __getitem__(self, i):
            return (torch.randn(6), i % 2)

    model, task = nn.Linear(6, 2), gs.Classification()
    train = Crops(range(8))
    first = run_of("fine_tune", tmp_path, model, task, train, gs.Loss(task, [(torch.ones(6), 1)]))
    assert run_of("fine_tune", tmp_path, model, task, train, gs.Loss(task, [(torch.ones(6), 1)])) == first


# --- what can go wrong ---


def test_a_target_out_of_reach_is_told_and_keeps_the_curve() -> None:
    model = Hidden(300, 40)
    result = search(model, target=-1.0, d_max=8)
    assert result.d is None
    assert result.spread is None
    assert not result.reached
    assert result.best.value == min(check.value for check in result.searches[0].checks)
    assert "not reached up to d = 8" in str(result)
    assert f"best {result.best.value:.4g}" in str(result)


def test_a_target_reached_before_training() -> None:
    result = search(Hidden(300, 10), target=1e9)
    assert result.d == 0
    assert result.steps == 0
    assert "was met before any training" in result.summary()
    assert ("set evaluate.lower_is_better = True" in result.summary()) != result.lower_is_better


def test_a_metric_that_is_not_a_number_ends_the_search_and_keeps_the_curve(tmp_path: Path) -> None:
    model = Hidden(300, 40)
    values = iter([0.1, 0.2, float("nan")])
    with pytest.raises(gs.NonFiniteError, match="after 20 steps at d=2, seed 0"):
        gs.intrinsic_dimension(
            model, losses, ONE, lambda _: next(values), target=1.0, d_min=2, check_every=10, resume=tmp_path
        )
    assert [c["value"] for c in torch.load(tmp_path / "search-seed0.pt")["checks"]] == [0.1, 0.2]
    assert type(model) is Hidden


def test_training_that_diverges_is_told() -> None:
    with pytest.raises(gs.NonFiniteError, match=r"lr=2\.5e\+29"):
        search(Hidden(300, 40), lr=1e30)


def test_an_evaluation_with_side_effects_on_modes_changes_nothing() -> None:
    modes = []

    class Watched(Hidden):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    def rude(model: nn.Module) -> float:
        assert not model.training
        model.train(not kind)
        return -float(losses(model, ONE)[0])

    for kind in (True, False):
        model = Watched(300, 40)
        model.train(kind)
        gs.intrinsic_dimension(model, losses, ONE, rude, target=5.0, d_min=2, d_max=2, check_every=3)
        assert model.training is kind
        assert all(mode is kind for mode in modes[1:4])
        modes.clear()


def test_bad_arguments() -> None:
    model = Hidden(300, 10)
    for options, words in (
        ({"d_max": 301}, "d=301 for n=300"),
        ({"d_min": 0}, "d_min=0"),
        ({"d_min": 64, "d_max": 32}, "d_min=64 above d_max=32"),
        ({"check_every": 0}, "check_every=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seeds": ()}, "seeds=()"),
        ({"target": float("nan")}, "target=nan"),
        ({"min_gain": 0.0}, "min_gain=0.0"),
        ({"lr": float("inf")}, "lr=inf"),
    ):
        with pytest.raises(gs.InputError, match=words):
            search(model, **options)
    with pytest.raises(gs.InputError, match="d=0 for n=300"):
        gs.dimension_curve(model, losses, ONE, LOSS, [0, 4], steps=1)
    with pytest.raises(gs.InputError, match="one number"):
        gs.intrinsic_dimension(model, losses, ONE, lambda _: [1], target=1.0)
    model.unused = nn.Linear(3, 3)
    unused = gs.Parameters(model, "unused*")
    with pytest.raises(gs.InputError, match="none of the chosen parameters"):
        search(model, parameters=unused, d_max=4)


def test_bad_types() -> None:
    call = (
        "gs.intrinsic_dimension(torch.nn.Linear(2, 2), lambda m, b: m(b).sum(-1), {}, {}, target=0.5, d_max=2, d_min=2)"
    )
    data = "torch.ones(1, 2)"
    answers = errors_of([call.format(data, "0.9"), call.format("iter([1])", "len"), call.format("[]", "len")])
    assert "evaluate of type float" in answers[0]
    assert "read only once" in answers[1]
    assert "yields nothing" in answers[2]
    begun = call.format(data, "lambda m: 0.0")
    wrong = {
        "d_min=4.0": begun.replace("d_min=2", "d_min=4.0"),
        "d=2.0": begun.replace("d_max=2", "d_max=2.0"),
        "check_every=2.5": begun[:-1] + ", check_every=2.5)",
        "batch_size=2.0": begun[:-1] + ", batch_size=2.0)",
        "target='0.9'": begun.replace("0.5", "'0.9'"),
        "min_gain='2'": begun[:-1] + ", min_gain='2')",
        "steps=2.5": begun.replace("intrinsic_dimension", "fine_tune").replace(
            "target=0.5, d_max=2, d_min=2", "steps=2.5"
        ),
    }
    for words, answer in zip(wrong, errors_of(list(wrong.values())), strict=True):
        assert answer.startswith("InputError")
        assert words in answer


# --- results ---


def test_results_over_seeds() -> None:
    def result(*dims: int | None) -> IntrinsicDimension:
        searches = tuple(Search(i, d, (Check(10, d or 64, 0.5 + i, 1.0, 2.0),)) for i, d in enumerate(dims))
        return IntrinsicDimension(1000, 0.9, searches, {"metric": "Accuracy"})

    assert (result(16, 64, 32).d, result(16, 64, 32).spread) == (32, (16, 64))
    assert (result(16, None, 32).d, result(16, None, 32).spread) == (32, None)
    assert result(16, None, None).d is None
    assert result(16, 64, 32).summary() == "d = 32 (from 16 to 64), 3.2 % of n = 1,000 (30 steps, 3 seeds, 6 s)"
    assert result(16, None, 32).summary().startswith("inconclusive: d from 16 to beyond 64, in the median 32,")
    assert json.loads(result(16, 64, 32).to_json())["d"] == 32
    assert result(16, None).best.value == 1.5


def test_confirmation_runs_are_made_once(tmp_path: Path) -> None:
    model, trained = Hidden(600, 6), []

    def counted(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        trained.append(1)
        return model(batch)

    def confirmed() -> IntrinsicDimension:
        options = {"d_min": 2, "d_max": 256, "check_every": 20, "lr": 3e-2, "resume": tmp_path, "confirm": True}
        return gs.intrinsic_dimension(model, counted, ONE, LOSS, target=0.1 * LOSS(model), **options)

    result = confirmed()
    assert [point.d for point in result.confirmations] == [result.d // 2, result.d]
    assert all(point.steps == result.steps for point in result.confirmations)
    assert len(trained) == 3 * result.steps
    assert confirmed().confirmations == result.confirmations
    assert len(trained) == 3 * result.steps


def test_every_training_shows_how_far_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    model = Hidden(300, 4)
    gs.fine_tune(model, losses, ONE, LOSS, steps=20, lr=1e-2, progress=True)
    shown = capfd.readouterr().err
    assert "training, d=300: " in shown
    assert "/20 [" in shown
    search(model, progress=True)
    shown = capfd.readouterr().err
    assert "dimension, seed 0: " in shown
    assert f"d=2, metric={LOSS(model):.4g}, target={0.1 * LOSS(model):.4g}" in shown
    search(model, progress=False)
    assert capfd.readouterr().err == ""
