"""A Lightning callback that keeps the checkpoints which tell most, and indexes the training data at them.

    pip install gradsketch lightning
    python examples/lightning_callback.py [FOLDER]

``SketchRun`` is all that a project of your own needs. The rest is a toy: points of three classes, one with a wrong
label.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradsketch as gs


class SketchRun(Callback):
    """Keep checkpoints while Lightning trains, and make an index of them when it is done.

    ``net`` names the part of the LightningModule that the task runs. Options are those of ``gs.build_index``.
    """

    def __init__(self, path: Path, net: str, task: gs.Task, data: Any, *, keep: int = 4, **options: Any) -> None:
        self.path, self.net, self.options = path, net, options
        self.checkpointer = gs.Checkpointer(path / "kept", task, data, keep=keep)
        self.index: gs.Index | None = None
        self._rate, self._steps = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the loss before the first step, or take up what is there of the steps before this one."""
        self._steps = trainer.global_step
        self.checkpointer.begin(pl_module.get_submodule(self.net), trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Remember the learning rate: a scheduler has changed it when the batch ends."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Hear of a step; a batch whose gradients are only accumulated is none."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.checkpointer.step(pl_module.get_submodule(self.net), trainer.optimizers[0], rate=self._rate)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Sketch the data at every checkpoint."""
        net = pl_module.get_submodule(self.net)
        self.index = self.checkpointer.build(self.path / "index", net, trainer.optimizers[0], **self.options)


class Classifier(lightning.LightningModule):
    """A small network, trained by SGD with a rate that falls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], place: int) -> Tensor:
        """Return the mean loss of a batch."""
        points, labels = batch
        return nn.functional.cross_entropy(self.net(points), labels)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and a learning rate that changes with every step."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=80)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


WRONG = 7  # the row with a wrong label


def points() -> list[tuple[Tensor, int]]:
    """Return 60 points around three centres, with their labels."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(3, 8)
    rows = [(centres[row % 3] + torch.randn(8) / 2, row % 3) for row in range(60)]
    rows[WRONG] = (rows[WRONG][0], (WRONG + 1) % 3)
    return rows


def main(folder: Path) -> gs.Index:
    """Train, and name the row that pulls the model its own way."""
    data, model = points(), Classifier()
    watching = SketchRun(folder, "net", gs.Classification(), data, keep=3, d=64, progress=False)
    trainer = lightning.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[watching],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=15, shuffle=True))
    assert watching.index is not None
    print(watching.index)
    print(watching.index.self_influence("dot"))
    return watching.index


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"))
