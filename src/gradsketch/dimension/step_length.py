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

# A range test in the manner of Smith (arXiv 1506.01186). On digits (a random net), MiniLM and SmolLM2 it is as good as
# the better of 2e-3 and 5e-3, or nearly, in few and in many dimensions (benchmarks/subspace_lr.py); 5e-3 diverges on
# MiniLM. A line search along the first step did not do: on SmolLM2 it said a tenth of what Adam bears.
_FIRST, _TRIES, _STEPS, _BATCHES, _SAME = 2e-3, 14, 6, 3, 0.01


def measured_lr(begun: Callable[[float], Training]) -> float:
    """Return the largest learning rate whose first steps lower the training loss as much as any; costs some 40 steps.

    ``begun`` returns a training at theta0 with a given learning rate.
    """

    def loss_after(lr: float) -> float:
        training = begun(lr)
        for _ in range(_STEPS):
            training.take_step()
        with seeded(training.seed, training.w.device), torch.no_grad():  # the same dropout for every learning rate
            return sum(_losses(training)) / _BATCHES

    return _longest(loss_after)


def _losses(training: Training) -> Iterator[float]:
    for batch in islice(shuffled(training.batches, training.seed), _BATCHES):
        batch = to_device(batch, training.w.device)
        yield float(per_example(training.task, training.subspace, batch).double().mean())


def _longest(loss_after: Callable[[float], float]) -> float:
    """Return the largest learning rate that is as good as the best: double it as long as the loss rises by 1 % at most.

    Where doubling does no good, halve it as long as that lowers the loss by more than 1 %, or until it is finite.
    """
    best, lowest = _FIRST, _or_infinite(loss_after(_FIRST))
    same = _SAME * abs(lowest) if math.isfinite(lowest) else 0.0
    for factor, margin in ((2.0, same), (0.5, -same)) if math.isfinite(lowest) else ((0.5, 0.0),):
        for tries in range(1, _TRIES):
            lr = _FIRST * factor**tries
            loss = _or_infinite(loss_after(lr))
            if loss < lowest + margin:
                best, lowest = lr, min(loss, lowest)
            elif math.isfinite(lowest):
                break
        if best != _FIRST:
            break
    return best


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
