"""Which training images have a wrong label? The demonstration that needs no download."""

from __future__ import annotations

import base64
import shutil
import struct
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import seeded
from gradsketch.attribution.build import build_index
from gradsketch.attribution.index import Index
from gradsketch.demo.packages import AbsentError
from gradsketch.demo.story import Stage
from gradsketch.demo.training import train_model
from gradsketch.evaluation import Mislabelled, mislabelled_auc
from gradsketch.gradients.tasks import Classification
from gradsketch.random import Stream
from gradsketch.report.hits import hits_page

__all__ = ["Digits", "DigitsStory", "digits_net", "flipped_digits", "taught_digits", "tell_digits"]

TRAIN, QUERIES, D = 1200, 6, 2048
TAUGHT = 400  # of the images, those that a small example is trained on
EPOCHS, BATCH, RATE = 15, 50, 3e-3


@dataclass(frozen=True)
class DigitsStory:
    """How many wrong labels were found, next to what the training loss alone finds.

    ``planted`` labels were flipped; ``found_first`` of them are among as many most suspicious images.
    """

    images: int
    planted: int
    found_first: int
    found_first_by_loss: int
    mislabelled: Mislabelled
    page: str
    index: str
    seconds: float


def flipped_digits(share: float = 0.1, *, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and test examples of scikit-learn's 8×8 digits, a share of the training labels flipped.

    Each is ``{"pixels": [1, 8, 8], "label", "true_label", "flipped", "picture"}``.

    Raises:
        AbsentError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise AbsentError(
            "no scikit-learn, which holds the digits", "scikit-learn", "Type: pip install scikit-learn"
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    stream = Stream(seed, "digits")
    order = stream.child("order").permutation(len(images)).tolist()
    other = stream.child("labels").integers(0, len(images), 9).tolist()
    flipped = set(order[: round(share * TRAIN)])
    examples = []
    for row in order:
        true = int(data.target[row])
        label = (true + 1 + other[row]) % 10 if row in flipped else true
        examples.append(
            {
                "id": str(row),
                "pixels": images[row][None],
                "label": label,
                "true_label": true,
                "flipped": row in flipped,
                "picture": _picture(images[row]),
            }
        )
    # The flipped ones stand first in `order`; a second shuffle mixes them in.
    mixed = stream.child("mix").permutation(TRAIN).tolist()
    return [examples[i] for i in mixed], examples[TRAIN:]


@dataclass(frozen=True)
class Digits:
    """A network, its task, the images it was trained on, a tenth of them with a wrong label, and others to test on."""

    model: nn.Module
    task: Classification
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def taught_digits() -> Digits:
    """Return a small network that has learned 400 digits, a tenth of them with a wrong label, in about a second.

    Raises:
        AbsentError: scikit-learn is not installed.
    """
    train, test = flipped_digits()
    model, task, train = digits_net(), Classification(), train[:TAUGHT]
    train_model(model, task, train, rate=RATE, epochs=8, batch=BATCH)
    return Digits(model.eval(), task, train, test)


def digits_net(seed: int = 0) -> nn.Module:
    """Return a small untrained convolutional network for 8×8 digits, drawn from ``seed``."""
    with seeded(seed):
        return _DigitsNet()


class _DigitsNet(nn.Module):
    """Two convolutions and two linear layers, about 10,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, pixels: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 10"]:
        logits: Tensor = self.layers(pixels)
        return logits


def tell_digits(out: Path, *, stage: Stage) -> DigitsStory:
    """Train on digits with a tenth of the labels flipped, and find those labels; write ``why.html`` and an index.

    Raises:
        AbsentError: scikit-learn is not installed.
    """
    start = time.perf_counter()
    train, test = flipped_digits()
    wrong = torch.tensor([example["flipped"] for example in train], device="cpu")
    model, task = digits_net(), Classification()
    with stage(
        f"Train a small network on {TRAIN} digits, {int(wrong.sum())} with a wrong label", EPOCHS * TRAIN
    ) as advance:
        train_model(model, task, train, rate=RATE, epochs=EPOCHS, batch=BATCH, advance=advance)
    path = out / "index"
    if (path / "index.json").exists():
        shutil.rmtree(path)
    with stage(f"Sketch every image's gradient: {D:,} numbers each", 0):
        index = build_index(path, model, task, train, d=D, progress=False)
    with stage("Ask which images pull the network their own way", 0):
        influence = index.self_influence("influence")
        result = mislabelled_auc(influence.values, influence.losses, wrong)
        page = _write_page(out, index, model, task, test)
    planted = int(wrong.sum())
    return DigitsStory(
        images=TRAIN,
        planted=planted,
        found_first=round(result.suspicion.precision * planted),
        found_first_by_loss=round(result.loss.precision * planted),
        mislabelled=result,
        page=str(page),
        index=str(index.folder.uri),
        seconds=time.perf_counter() - start,
    )


def _write_page(out: Path, index: Index, model: nn.Module, task: Classification, test: list[dict[str, Any]]) -> Path:
    """Ask about the test images that the network gets most wrong: which training images made it so?"""
    losses = task.losses(model, task.collate(test))
    worst = [test[row] for row in losses.argsort(descending=True)[:QUERIES].tolist()]
    said = model(torch.stack([example["pixels"] for example in worst])).argmax(-1).tolist()
    questions = [{**example, "label": label} for example, label in zip(worst, said, strict=True)]
    hits = index.query(model, questions, k=6, opponents=3)
    titled = [
        replace(query, text=f"A {example['true_label']}, called", answer=f"a {label}")
        for query, example, label in zip(hits, worst, said, strict=True)
    ]
    return hits_page(
        replace(hits, queries=tuple(titled)),
        out / "why.html",
        title=f"Why did it call this a {said[0]}?",
        introduction="A small network was trained on digits, a tenth of them with a wrong label. Each card is a test "
        "image that it gets most wrong, with the training images behind its answer.",
    )


def _picture(image: Float[Tensor, "h w"]) -> str:
    """Return a grey PNG, dark on white, as a data URI."""
    grey = (255 - 255 * image).round().to(torch.uint8)
    height, width = grey.shape
    rows = b"".join(b"\0" + bytes(row) for row in grey.tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
