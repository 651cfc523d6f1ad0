"""SpectrumCallback inside a real Trainer run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import gradsketch as gs  # noqa: E402

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


def test_submodules_keep_their_own_modes(monkeypatch, tmp_path):
    seen = []
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5))
    model[1].eval()
    monkeypatch.setattr(
        "gradsketch.spectra.callback.spectrum_over", lambda *_, **__: seen.extend(m.training for m in model.modules())
    )
    callback = gs.SpectrumCallback(task, {"input_ids": torch.zeros(1, 2)}, at=(0,))
    state = transformers.TrainerState(global_step=0)
    callback.on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None, model=model)
    assert seen == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_bad_input_is_named():
    callback = gs.SpectrumCallback(task, {"input_ids": torch.zeros(1, 2)})
    with pytest.raises(gs.InputError, match="has not run"):
        _ = callback.evolution
