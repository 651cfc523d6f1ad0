"""Images and audio as examples of a task that is given as functions: what makes a batch of them, and their losses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradsketch as gs
from gradsketch.errors import FingerprintError, InputError


def image(i):
    pil = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return {"image": pil.fromarray(pixels), "label": i % 4, "id": f"photo-{i}", "place": "sea"}


def sound(i):
    wave = np.random.default_rng(i).normal(size=48).astype(np.float32)
    return {"audio": {"array": wave, "sampling_rate": 16_000}, "label": i % 4, "id": f"sound-{i}", "place": "sea"}


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def batch_of(rows):
    def numbers(row):
        return np.asarray(row["image"], np.float32) / 255 if "image" in row else row["audio"]["array"]

    x = torch.stack([torch.from_numpy(numbers(row)) for row in rows])
    return {"x": x, "labels": torch.tensor([row["label"] for row in rows])}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()


@pytest.mark.parametrize("row", [image, sound])
def test_an_index_of_what_is_no_text(model, tmp_path, row):
    rows, task = [row(i) for i in range(8)], gs.Function(losses, collate=batch_of)
    index = gs.build_index(tmp_path / "i", model, task, rows, d=64, progress=False)
    hit = index.query(model, [rows[5]], k=1, score="cosine")[0][0]
    assert (hit.row, hit.id, dict(hit.metadata)) == (5, f"{row.__name__.replace('image', 'photo')}-5", {
        "label": 1, "place": "sea",
    })  # fmt: skip
    batch = batch_of(rows[5:6])
    torch.testing.assert_close(torch.tensor([hit.loss]), losses(model, batch).detach(), rtol=1e-5, atol=0)
    changed = [*rows[:7], row(99)]
    with pytest.raises(FingerprintError):
        gs.build_index(tmp_path / "i", model, task, changed, d=64, progress=False)


def test_what_makes_the_batch_is_part_of_the_task(model, tmp_path):
    rows = [sound(i) for i in range(4)]
    gs.build_index(tmp_path / "i", model, gs.Function(losses, collate=batch_of), rows, d=64, progress=False)
    louder = gs.Function(losses, collate=lambda rows: {**batch_of(rows), "x": 2 * batch_of(rows)["x"]})
    with pytest.raises(FingerprintError, match="collate"):
        gs.build_index(tmp_path / "i", model, louder, rows, d=64, progress=False)


def test_examples_that_cannot_be_stacked(model):
    with pytest.raises(InputError, match=r"found .*Image.*collate="):
        gs.Function(losses).collate([image(0), image(1)])
