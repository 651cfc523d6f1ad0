"""How long a step may be: measured along the first one, because no constant fits every model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, islice

import torch

from gradsketch.as_found import seeded
from gradsketch.dimension.training import Training, per_example, shuffled
from gradsketch.gradients.data import to_device

__all__ = ["measured_lr"]

# Adam's first step goes along the signs of the gradient. A fifth of the length at which the loss is lowest there trains
# every model tried, where half of it diverges on MiniLM (benchmarks/subspace_lr.py).
_SHARE, _BATCHES = 0.2, 3
# Lengths are tried from here, by doubling or halving; where none lowers the loss, this is the learning rate.
_FIRST, _TRIES = 1e-3, 14


def measured_lr(training: Training) -> float:
    """Return a learning rate for a training that has not begun; costs about as much as a dozen of its steps."""
    w, start = training.w, training.w.clone()
    reader = islice(shuffled(training.batches, training.seed), _BATCHES)
    batches = [to_device(batch, w.device) for batch in reader]
    with seeded(training.seed, w.device), torch.enable_grad():
        for batch in batches:
            training.backward(batch)
    signs = training.take_gradient().sign()

    def loss_at(length: float) -> float:
        w.copy_(start - length * signs)
        with seeded(training.seed, w.device):  # the same dropout at every length
            losses = [per_example(training.task, training.subspace, batch).double().mean() for batch in batches]
        return float(torch.stack(losses).mean())

    with torch.no_grad():
        length = _lowest(loss_at)
        w.copy_(start)
    return _FIRST if length is None else float(f"{_SHARE * length:.1e}")


def _lowest(loss_at: Callable[[float], float]) -> float | None:
    """Return the length of the lowest loss among doublings of the first, or halvings; None where none lowers it."""
    lowest, length = loss_at(0.0), None
    factor = 2.0 if loss_at(_FIRST) < lowest else 0.5
    for tries in islice(count(), _TRIES):
        here = _FIRST * factor**tries
        loss = loss_at(here)
        if loss < lowest:
            lowest, length = loss, here
        elif length is not None:
            break
    return length
