"""The few checkpoints of a run: which are kept, what they weigh, that a run goes on, and the Trainer's callback."""

import warnings
from itertools import pairwise

import pytest
import torch
import toys
from torch import nn

import gradsketch as gs
from gradsketch.errors import FingerprintError, GradsketchWarning, InputError, StoreError


class Slope(nn.Module):
    """A weight whose loss is its absolute value, so that a test can set the loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight.abs() * x


def slope_losses(model, batch):
    return model(batch)


DATA = torch.ones(8)


def run(path, losses, rates, *, begin=0, end=None, **options):
    """Walk through given losses, and return what was kept."""
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    keeper = gs.Checkpointer(path, slope_losses, DATA, **options)
    model.weight.data.fill_(1.0)
    keeper.begin(model, begin)
    for step in range(begin, len(losses) if end is None else end):
        model.weight.data.fill_(losses[step])
        optimizer.param_groups[0]["lr"] = rates[step]
        keeper.step(model, optimizer)
    if end is None:
        keeper.finish(model, optimizer)
    return keeper


FALLING = [0.97**i for i in range(1, 101)]
RATES = [0.01 * (100 - i) for i in range(100)]


def test_the_loss_falls_evenly_between_what_is_kept(tmp_path):
    keeper = run(tmp_path, FALLING, RATES, keep=4)
    losses = [1.0, *(kept.loss for kept in keeper.kept)]
    falls = [before - after for before, after in pairwise(losses)]
    assert len(falls) == 4
    assert max(falls) < 2.5 * min(falls)
    assert keeper.kept[-1].step == 100
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"checkpoints.json", *(f"step-{kept.step}.pt" for kept in keeper.kept)}
    for kept in keeper.kept:
        state = torch.load(tmp_path / f"step-{kept.step}.pt")
        assert float(state["weight"]) == pytest.approx(FALLING[kept.step - 1])


def test_a_weight_is_the_sum_of_the_learning_rates_since_the_one_before(tmp_path):
    keeper, start = run(tmp_path, FALLING, RATES, keep=3, every=2), 0
    for weight, kept in zip(keeper.weights, keeper.kept, strict=True):
        assert weight == pytest.approx(sum(RATES[start : kept.step]))
        start = kept.step
    assert sum(keeper.weights) == pytest.approx(sum(RATES))


def test_a_plateau_keeps_nothing(tmp_path):
    keeper = run(tmp_path, [0.5] * 50 + [0.1] * 50, RATES, keep=4)
    assert [kept.step for kept in keeper.kept] == [1, 51, 100]


@pytest.mark.parametrize("step", [37, 60])
def test_a_run_goes_on_where_the_trainers_checkpoint_was(tmp_path, step):
    whole = run(tmp_path / "whole", FALLING, RATES, keep=4)
    run(tmp_path / "cut", FALLING, RATES, keep=4, end=71)  # killed at 71; the trainer had saved an earlier step
    begun = gs.Checkpointer(tmp_path / "cut", slope_losses, DATA, keep=4)
    begun.begin(Slope(), step)
    assert begun.kept[-1].step <= step
    assert {path.name for path in (tmp_path / "cut").glob("step-*")} == {p.name for p in begun.checkpoints.values()}
    again = run(tmp_path / "cut", FALLING, RATES, keep=4, begin=step)
    assert again.kept[-1].rates == pytest.approx(whole.kept[-1].rates)
    assert sum(again.weights) == pytest.approx(sum(RATES))
    assert [kept.step for kept in again.kept] == sorted({kept.step for kept in again.kept})
    assert all(path.exists() for path in again.checkpoints.values())
    assert {path.name for path in (tmp_path / "cut").glob("step-*")} == {p.name for p in again.checkpoints.values()}


def test_a_new_run_in_the_same_folder_begins_anew(tmp_path):
    first = run(tmp_path, FALLING, RATES, keep=2)
    again = run(tmp_path, FALLING, RATES, keep=2)
    assert again.kept == first.kept


def test_another_data_set_or_a_damaged_file_is_refused(tmp_path):
    run(tmp_path, FALLING, RATES)
    model = Slope()
    with pytest.raises(FingerprintError, match="rows"):
        gs.Checkpointer(tmp_path, slope_losses, 2 * DATA).begin(model)
    path = tmp_path / "checkpoints.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(StoreError, match=r"checkpoints\.json"):
        gs.Checkpointer(tmp_path, slope_losses, DATA).begin(model)


def test_another_number_in_the_middle_of_a_long_row_is_noticed(tmp_path):
    def losses(model, batch):
        return model(batch).mean(dim=1)

    data = torch.zeros(2, 5000)
    gs.Checkpointer(tmp_path, losses, data).finish(Slope(), torch.optim.SGD(Slope().parameters(), lr=0.1))
    data[1, 2500] = 1.0  # where a printed tensor has dots
    with pytest.raises(FingerprintError, match="rows"):
        gs.Checkpointer(tmp_path, losses, data).begin(Slope(), 1)


def test_weights_that_were_damaged_are_refused(tmp_path):
    """torch reads a flipped bit of a tensor without a word."""
    data, task, model = toys.vectors(10), toys.vector_task(), toys.classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = gs.Checkpointer(tmp_path / "kept", task, data)
    keeper.step(model, optimizer)
    (path,) = keeper.checkpoints.values()
    content = bytearray(path.read_bytes())
    place = content.index(model[0].weight.detach().numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="checksum"):
        keeper.build(tmp_path / "index", model, optimizer, d=8, progress=False)


@pytest.mark.parametrize("options", [{"keep": 0}, {"every": 0}, {"keep": True}], ids=["keep", "every", "bool"])
def test_numbers_that_cannot_be_are_refused(tmp_path, options):
    with pytest.raises(InputError, match="positive integer"):
        gs.Checkpointer(tmp_path, slope_losses, DATA, **options)


@pytest.mark.parametrize("adam", [False, True], ids=["plain", "adam"])
def test_the_index_is_that_of_its_checkpoints(tmp_path, adam):
    data, task, model = toys.vectors(30), toys.vector_task(), toys.classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    keeper = gs.Checkpointer(tmp_path / "kept", task, data, keep=3, adam=adam)
    states, metrics = {}, {}
    for step in range(1, 31):
        task.losses(model, data).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        keeper.step(model, optimizer)
        states[f"step-{step}"] = {name: t.clone() for name, t in model.state_dict().items()}
        metrics[f"step-{step}"] = gs.adafactor(model, optimizer)
    index = keeper.build(tmp_path / "index", model, optimizer, d=32, progress=False)
    names = list(keeper.checkpoints)
    expected = gs.build_index(
        tmp_path / "expected",
        model,
        task,
        data,
        checkpoints={name: states[name] for name in names},
        weights=keeper.weights,
        precondition=[metrics[name] for name in names] if adam else None,
        d=32,
        progress=False,
    )
    question = {name: values[:1] for name, values in data.items()}
    found, wanted = (i.query(model, question, k=30, score="dot")[0] for i in (index, expected))
    assert [(hit.row, hit.score) for hit in found] == [(hit.row, hit.score) for hit in wanted]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = toys.classifier()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def net_losses(model, batch):
    return nn.functional.cross_entropy(model.net(batch["x"]), batch["labels"], reduction="none")


def train(path, callback, *others, steps=12, model=None, resume=None, optimizer=None, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(path),
        max_steps=steps,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"learning_rate": 0.1, "save_strategy": "no", **options},
    )
    model, table = model or Net(), toys.vectors(24)
    rows = [{"x": x, "labels": y} for x, y in zip(table["x"], table["labels"], strict=True)]
    own = {} if optimizer is None else {"optimizers": (optimizer(model), None)}
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback, *others], **own).train(
        resume_from_checkpoint=resume
    )
    return model, rows


def trainer_rows():
    table = toys.vectors(24)
    return [{"x": x, "labels": y} for x, y in zip(table["x"], table["labels"], strict=True)]


def test_the_trainer_makes_an_index_of_its_run(tmp_path):
    callback = gs.SketchCallback(tmp_path / "index", net_losses, trainer_rows(), keep=2, d=16, progress=False)
    with pytest.raises(InputError, match="train"):
        _ = callback.index
    model, rows = train(tmp_path / "out", callback)
    index = callback.index
    assert len(index) == 24
    # The learning rate falls evenly from 0.1 to nothing over 12 steps.
    assert sum(c.weight for c in index.description.checkpoints) == pytest.approx(0.1 * 6.5)
    assert index.query(model, rows[:1], k=1, score="dot")[0][0].row in range(24)


def test_a_loss_that_is_infinite_does_not_end_the_training(tmp_path):
    def broken(model, batch):
        return net_losses(model, batch) + (0 if model.training else torch.inf)

    callback = gs.SketchCallback(tmp_path / "index", broken, trainer_rows(), d=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradsketchWarning)
        train(tmp_path / "out", callback, steps=2)
    assert any("a loss of inf" in str(warning.message) for warning in caught)


def test_what_cannot_be_built_is_told_before_the_training(tmp_path):
    with pytest.raises(InputError, match="d=100000"):
        train(tmp_path / "out", gs.SketchCallback(tmp_path / "index", net_losses, trainer_rows(), d=100_000))


@pytest.mark.parametrize("early", [True, False])
def test_the_best_weights_are_not_taken_for_the_last(tmp_path, early):
    """The Trainer loads them before it says that training has ended."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Walk(TrainerCallback):
        """Put the weights where the loss is known: it is least after two steps, and then grows."""

        def __init__(self):
            self.weights = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(0.0 if state.global_step == 2 else 0.5 * state.global_step)
                next(iter(model.parameters()))[0] *= -1
            self.weights[state.global_step] = {n: t.clone() for n, t in model.state_dict().items()}

    walk = Walk()
    callback = gs.SketchCallback(tmp_path / "index", net_losses, trainer_rows(), every=3, d=16, progress=False)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    steps = {"eval_steps": 2, "save_steps": 2}
    stops = [EarlyStoppingCallback(1)] if early else []
    model, _ = train(tmp_path / "out", walk, callback, *stops, steps=5, **best, **steps)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in walk.weights[2].items())  # the best are loaded
    kept = callback.index.description.checkpoints
    assert [checkpoint.name for checkpoint in kept] == (["step-3"] if early else ["step-3", "step-5"])
    for checkpoint in kept:
        found = torch.load(tmp_path / "out" / "sketched" / f"{checkpoint.name}.pt")
        want = walk.weights[int(checkpoint.name.removeprefix("step-"))]
        assert all(torch.equal(found[n], t) for n, t in want.items())


def test_a_run_that_goes_on_with_the_weights_of_another_is_refused(tmp_path):
    def callback():
        return gs.SketchCallback(tmp_path / "index", net_losses, trainer_rows(), keep=2, d=16, progress=False)

    save = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path / "one", callback(), steps=6, **save)
    other = gs.SketchCallback(tmp_path / "other", net_losses, trainer_rows(), keep=2, d=16, progress=False)
    train(tmp_path / "two", other, steps=6, learning_rate=0.3, **save)
    before = (tmp_path / "one" / "sketched" / "checkpoints.json").read_bytes()
    with pytest.raises(FingerprintError, match="step 4 is now"):
        train(tmp_path / "one", callback(), steps=8, resume=str(tmp_path / "two" / "checkpoint-4"))
    assert (tmp_path / "one" / "sketched" / "checkpoints.json").read_bytes() == before
    own = gs.SketchCallback(tmp_path / "again", net_losses, trainer_rows(), keep=2, d=16, progress=False)
    train(tmp_path / "one", own, steps=8, resume=str(tmp_path / "one" / "checkpoint-4"))
    assert [c.name for c in own.index.description.checkpoints][-1] == "step-8"


def test_a_callback_does_not_hand_out_the_index_of_an_earlier_training(tmp_path):
    callback = gs.SketchCallback(tmp_path / "index", net_losses, trainer_rows(), keep=2, d=16, progress=False)
    train(tmp_path / "out", callback, steps=2)
    assert len(callback.index) == 24
    with pytest.warns(GradsketchWarning, match="weights"):  # the folder holds the first
        train(tmp_path / "out", callback, steps=2, learning_rate=0.5)
    with pytest.raises(InputError, match="train"):
        _ = callback.index


def test_a_model_of_other_shapes_does_not_go_on_with_a_run(tmp_path):
    task, data = toys.vector_task(), toys.vectors(8)
    models = [nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))]
    for number, model in enumerate(models):
        keeper, optimizer = gs.Checkpointer(tmp_path, task, data), torch.optim.SGD(model.parameters(), lr=0.1)
        if number:
            with pytest.raises(FingerprintError, match="model is now"):
                keeper.begin(model, 1)
        else:
            keeper.begin(model)
            keeper.step(model, optimizer)
            keeper.finish(model, optimizer)


def test_a_file_of_somebody_else_is_neither_replaced_nor_removed(tmp_path):
    (tmp_path / "step-1.pt").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"step-1\.pt, which gradsketch did not write"):
        run(tmp_path, FALLING[:3], RATES, keep=1)
    assert (tmp_path / "step-1.pt").read_bytes() == b"mine"


def groups_of(model, *rates):
    """An optimizer with a learning rate for each parameter."""
    parameters = zip(model.parameters(), rates, strict=True)
    return torch.optim.SGD([{"params": [tensor], "lr": rate} for tensor, rate in parameters])


def test_rates_of_several_groups_count_by_their_mean_and_are_told(tmp_path):
    model = nn.Linear(6, 3)  # 18 weights, 3 biases
    keeper = gs.Checkpointer(tmp_path / "a", gs.Classification(), toys.vectors(8))
    with pytest.warns(GradsketchWarning, match=r"rates from 0 to 0.7: .* their mean, 0.6") as told:
        keeper.step(model, groups_of(model, 0.7, 0.0))
    assert len(told) == 1
    for _ in range(2):  # without another warning, which would be an error here
        keeper.step(model, groups_of(model, 0.7, 0.0))
    assert keeper.rates == pytest.approx(3 * 0.6)
    keeper.step(model, groups_of(model, 0.7, 0.0), rate=0.25)
    assert keeper.rates == pytest.approx(3 * 0.6 + 0.25)
    model.bias.requires_grad_(False)  # what does not train has no rate
    assert gs.Checkpointer(tmp_path / "b", gs.Classification(), toys.vectors(8)).rate(groups_of(model, 0.7, 9.0)) == 0.7


def test_the_callback_counts_several_groups_by_their_mean(tmp_path):
    callback = gs.SketchCallback(tmp_path / "index", net_losses, trainer_rows(), keep=2, d=16, progress=False)
    with pytest.warns(GradsketchWarning, match="rates from 0.001 to 0.1"):
        train(tmp_path / "out", callback, optimizer=lambda model: groups_of(model, *[0.1, 0.001] * 2))
    share = sum(checkpoint.weight for checkpoint in callback.index.description.checkpoints)
    assert 0.001 * 6.5 < share < 0.1 * 6.5


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_rate_that_is_no_number_is_refused_at_once(tmp_path, rate):
    model = Slope()
    keeper = gs.Checkpointer(tmp_path, slope_losses, DATA)
    with pytest.raises(InputError, match="rate="):
        keeper.step(model, torch.optim.SGD(model.parameters(), lr=0.1), rate=rate)


def test_weights_that_are_all_zero_are_refused(tmp_path):
    model, options = toys.classifier(), {"weights": [0.0], "d": 16}
    with pytest.raises(InputError, match="with which every score is 0"):
        gs.build_index(
            tmp_path, model, gs.Classification(), toys.vectors(8), checkpoints=[model.state_dict()], **options
        )
