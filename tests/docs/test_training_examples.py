"""The examples for Lightning and TRL run, where these packages are, and index the run that they watch."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    example = runpy.run_path(str(FOLDER / "lightning_callback.py"))
    index = example["main"](tmp_path)
    assert len(index.stores) == 3
    # 4 batches in each of 20 epochs; the rate falls evenly from 0.5 to 0.05 over them.
    rates = [0.5 * (1 - 0.9 * step / 80) for step in range(80)]
    assert sum(c.weight for c in index.description.checkpoints) == pytest.approx(sum(rates), rel=1e-4)
    assert int(index.self_influence("dot").values.argmax()) == example["WRONG"]


def test_a_batch_that_only_adds_to_the_gradient_is_no_step_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from torch.utils.data import DataLoader

    import gradsketch as gs

    example = runpy.run_path(str(FOLDER / "lightning_callback.py"))
    data = example["points"]()
    watching = example["SketchRun"](tmp_path, "net", gs.Classification(), data, keep=2, d=32, progress=False)
    lightning.Trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[watching],
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(example["Classifier"](), DataLoader(data, batch_size=15))
    assert watching.checkpointer.steps == 4


def test_trl(tmp_path):
    pytest.importorskip("trl")
    example = runpy.run_path(str(FOLDER / "trl_sft.py"))
    hits = example["main"](tmp_path)
    assert hits[0][0].row == len(example["CHATS"]) - 1
    assert hits[0][0].score > 10 * hits[0][1].score
