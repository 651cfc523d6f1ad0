"""SpectrumCallback inside a real Trainer run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import gradsketch as gs  # noqa: E402
from unchecked import errors_of  # noqa: E402

torch.manual_seed(0)


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 50, (64, 12), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def train(folder, steps, callback):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=12,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Pairs(), callbacks=[] if callback is None else [callback]
    )
    trainer.train()
    return model


def task(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(logits), -1).mean(1)


def test_the_callback_records_and_leaves_training_as_it_was(tmp_path):
    data = torch.utils.data.default_collate([Pairs()[i] for i in range(4)])
    callback = gs.SpectrumCallback(task, data, at=(0, 1), every=2, k=2)
    model = train(tmp_path, 4, callback)
    evolution = callback.evolution
    assert evolution.steps == (0, 1, 2, 4)
    assert all(s.converged.all() for s in evolution.spectra)
    assert all(s.gradient_in_outliers is not None for s in evolution.spectra)
    plain = train(tmp_path / "plain", 4, None)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)

    def load():
        return gs.hessian(model.eval(), task, data, gs.Parameters(model))

    after = gs.spectrum(load(), 2)
    np.testing.assert_allclose(evolution.spectra[-1].values, after.values, rtol=1e-3)
    assert (tmp_path / "spectrum" / "step-00000004.json").exists()


def test_by_default_it_is_due_at_the_steps_of_the_paper(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr("gradsketch.spectra.callback.spectrum_over", lambda points, *_, **__: taken.extend(points))
    callback = gs.SpectrumCallback(task, {"input_ids": torch.zeros(1, 2)})
    arguments, model = SimpleNamespace(output_dir=tmp_path), torch.nn.Linear(1, 1)
    callback.on_train_begin(arguments, transformers.TrainerState(global_step=0), None, model=model)
    for step in range(1, 2500):
        callback.on_step_end(arguments, transformers.TrainerState(global_step=step), None, model=model)
    assert taken == [0, 10, 50, 100, 150, 200, 250, 500, 1000, 2000]


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.frozen = torch.nn.Linear(4, 3), torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Tanh())

    def forward(self, x):
        return self.frozen(self.body(x))


def squares(model, batch):
    return model(batch["x"]).square().sum(1)


def begun(folder, model, data=None, **options):
    """Return a callback that took the spectrum at the start of a training."""
    data = {"x": torch.arange(8.0).view(2, 4)} if data is None else data
    callback = gs.SpectrumCallback(squares, data, k=2, at=(0,), every=0, progress=False, **options)
    state = transformers.TrainerState(global_step=0)
    callback.on_train_begin(SimpleNamespace(output_dir=folder), state, None, model=model)
    return callback


def test_every_module_keeps_its_own_mode(tmp_path):
    model = Toy().train()
    model.frozen.eval()
    begun(tmp_path, model)
    assert {name: module.training for name, module in model.named_modules()} == {
        "": True,
        "body": True,
        "frozen": False,
        "frozen.0": False,
        "frozen.1": False,
    }


def test_a_second_training_in_the_same_folder_is_refused_unless_it_is_the_same(tmp_path):
    model = Toy()
    first = begun(tmp_path, model).evolution
    assert begun(tmp_path, model).evolution == first
    with pytest.raises(gs.FingerprintError, match="model is now"):
        begun(tmp_path, Toy())
    with pytest.raises(gs.FingerprintError, match="data is now"):
        begun(tmp_path, model, {"x": torch.arange(8.0).view(2, 4) / 5})
    with pytest.raises(gs.FingerprintError, match="curvature is now"):
        begun(tmp_path, model, curvature="fisher")


def test_a_loss_that_is_not_finite_costs_its_spectrum_and_not_the_training(tmp_path):
    model = Toy()
    callback = begun(tmp_path, model)
    callback.at = frozenset((0, 1, 2))
    state = transformers.TrainerState(global_step=1)
    weight = model.body.weight.detach().clone()
    with torch.no_grad():
        model.body.weight.fill_(float("nan"))
    with pytest.warns(gs.GradsketchWarning, match="no spectrum at step 1: "):
        callback.on_step_end(None, state, None, model=model)
    with torch.no_grad():
        model.body.weight.copy_(weight)
    callback.on_step_end(None, transformers.TrainerState(global_step=2), None, model=model)
    assert callback.evolution.steps == (0, 2)


def test_a_training_may_begin_where_its_loss_is_not_finite(tmp_path):
    model = Toy()
    with torch.no_grad():
        model.body.weight.fill_(float("inf"))
    with pytest.warns(gs.GradsketchWarning, match="no spectrum at step 0: "):
        begun(tmp_path, model)


@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")
def test_a_training_of_a_subspace_is_watched_in_its_own_coordinates(tmp_path):
    """Phi H Phiᵀ, which is small enough to be written down."""
    torch.manual_seed(0)
    model, data = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)), torch.randn(9, 4)
    parameters = gs.Parameters(model)
    phi = gs.AFFD(parameters.n, 12)
    matrix = (phi @ gs.hessian(model, squared, data, parameters) @ phi.T).dense()
    expected = torch.linalg.eigvalsh(matrix).numpy()
    callback = gs.SpectrumCallback(squared, data, k=3, at=(0,), every=0, progress=False)
    subspace = gs.Subspace(model, parameters, phi)
    arguments, state = SimpleNamespace(output_dir=tmp_path), transformers.TrainerState(global_step=0)
    callback.on_train_begin(arguments, state, None, model=subspace)
    found = callback.evolution.spectra[0].values
    np.testing.assert_allclose(np.sort(np.abs(found)), np.sort(np.abs(expected))[-3:], rtol=1e-3)


def squared(model, batch):
    return model(batch).square().sum(1)


def test_one_callback_writes_each_training_to_its_own_output(tmp_path):
    callback = begun(tmp_path / "a", Toy())
    state = transformers.TrainerState(global_step=0)
    callback.on_train_begin(SimpleNamespace(output_dir=tmp_path / "b"), state, None, model=Toy())
    assert (tmp_path / "b/spectrum/step-00000000.json").exists()


def test_bad_input_is_named():
    callback = gs.SpectrumCallback(task, {"input_ids": torch.zeros(1, 2)})
    with pytest.raises(gs.InputError, match="has not run"):
        _ = callback.evolution


def test_options_that_would_fail_or_be_ignored_later_are_refused_at_once():
    wrong = {
        "at=5": "at=5",
        "at=('0',)": "at=('0',)",
        "at=(-1, 3)": "at=(-1, 3)",
        "every=-2": "every=-2",
        "every=1.5": "every=1.5",
        "'stepz'": "stepz=3",
        "'gradient'": "gradient=None",
    }
    answers = errors_of([f"gs.SpectrumCallback(len, torch.ones(1, 2), {option})" for option in wrong.values()])
    for words, answer in zip(wrong, answers, strict=True):
        assert answer.startswith("InputError")
        assert words in answer


def raising(model, batch):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((squared, []), {}, gs.InputError),
        ((squared, torch.ones(1, 4)), {"parameters": "nothing*"}, gs.InputError),
        ((squared, torch.ones(1, 4)), {"k": 0}, gs.InputError),
        ((squared, torch.ones(1, 4)), {"tolerance": -1.0}, gs.InputError),
        ((lambda m, b: m(b).square().mean(), torch.ones(1, 4)), {}, gs.InputError),
        ((raising, torch.ones(1, 4)), {}, KeyError),
    ],
)
def test_what_cannot_be_ends_a_training_before_its_first_step(tmp_path, arguments, options, error):
    """Though the first spectrum is due much later: nobody wants to lose what was trained until then."""
    callback = gs.SpectrumCallback(*arguments, **({"at": (1000,), "every": 0, "k": 1} | options))
    with pytest.raises(error):
        callback.on_train_begin(
            SimpleNamespace(output_dir=tmp_path), transformers.TrainerState(global_step=0), None, model=Toy()
        )
    assert not list(tmp_path.iterdir())
    late = gs.SpectrumCallback(lambda m, b: squared(m, b) / 0, torch.ones(1, 4), at=(1000,), every=0, k=1)
    late.on_train_begin(
        SimpleNamespace(output_dir=tmp_path), transformers.TrainerState(global_step=0), None, model=Toy()
    )
