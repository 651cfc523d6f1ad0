"""Losses of training rows, held against those with which they were indexed.

They tell what no fingerprint does: other examples than the index's, and what a model computes by none of its tensors,
such as the scale of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.gradients.data import Batcher
from gradsketch.gradients.tasks import Task
from gradsketch.store import Store

__all__ = ["first_apart", "losses_of"]

# By so much, and so much of itself, may a loss be another: half precision in another batch, or autocast.
_ALIKE = 0.05


@torch.no_grad()
def losses_of(
    model: nn.Module, task: Task, examples: Sequence[Any], *, batch_tokens: int = 4096
) -> Float[Tensor, " n"]:
    """Return the losses of examples, encoded or not, in evaluation mode."""
    batcher = Batcher(task, tokens=batch_tokens, device=next(model.parameters()).device)
    losses = torch.zeros(len(examples), dtype=torch.float32, device="cpu")
    with evaluating(model):
        for places, found in batcher.map(lambda batch: task.losses(model, batch), examples):
            losses[places] = found.float().cpu()
    return losses


def first_apart(
    losses: Float[Tensor, " n"], store: Store, rows: Sequence[int], *, alike: float = _ALIKE
) -> tuple[int, float, float] | None:
    """Return the first row whose loss is not the stored one, that loss and what is stored; None where all are alike.

    A row that was left out has no loss to compare.
    """
    stored = torch.tensor([record["loss"] for record in store.records(rows)], dtype=torch.float32, device="cpu")
    apart = (losses - stored).abs() > alike * (1 + torch.maximum(losses.abs(), stored.abs()))
    place = next(iter(apart.nonzero()[:, 0].tolist()), None)
    return None if place is None else (rows[place], float(losses[place]), float(stored[place]))
