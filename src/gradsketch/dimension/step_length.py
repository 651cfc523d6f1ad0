"""How long a step may be: tried in a few steps, because no constant fits every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from gradsketch.as_found import seeded
from gradsketch.dimension.training import Training, per_example, shuffled
from gradsketch.gradients.data import to_device

__all__ = ["measured_lr"]

# A range test in the manner of Smith (arXiv 1506.01186). The best of these is within a factor of four of the best for
# a whole training of digits (a random net), MiniLM and SmolLM2, and diverges on none (benchmarks/subspace_lr.py). One
# line search along the first step did not do: Adam bears ten times its best length on SmolLM2.
_FIRST, _TRIES, _STEPS, _BATCHES = 2e-3, 14, 6, 3


def measured_lr(begun: Callable[[float], Training]) -> float:
    """Return the learning rate whose first steps lower the training loss most; costs about 40 steps.

    ``begun`` returns a training at theta0 with a given learning rate.
    """

    def loss_after(lr: float) -> float:
        training = begun(lr)
        for _ in range(_STEPS):
            training.take_step()
        with seeded(training.seed, training.w.device), torch.no_grad():  # the same dropout for every learning rate
            return sum(_losses(training)) / _BATCHES

    return _lowest(loss_after)


def _losses(training: Training) -> Iterator[float]:
    for batch in islice(shuffled(training.batches, training.seed), _BATCHES):
        batch = to_device(batch, training.w.device)
        yield float(per_example(training.task, training.subspace, batch).double().mean())


def _lowest(loss_after: Callable[[float], float]) -> float:
    """Walk from the first learning rate by factors of two as long as the loss falls, or is not finite."""
    best, lowest = _FIRST, _or_infinite(loss_after(_FIRST))
    for factor in (2.0, 0.5) if math.isfinite(lowest) else (0.5,):
        for tries in range(1, _TRIES):
            lr = _FIRST * factor**tries
            loss = _or_infinite(loss_after(lr))
            if loss < lowest:
                best, lowest = lr, loss
            elif math.isfinite(lowest):
                break
        if best != _FIRST:
            break
    return best


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
