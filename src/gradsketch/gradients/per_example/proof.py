"""Prove, on two examples, which rows of which call belong to which example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.per_example.interception import Interception
from gradsketch.gradients.per_example.layout import Layout, Layouts
from gradsketch.gradients.per_example.rules import RULES
from gradsketch.gradients.tasks import Batch

__all__ = ["prove_layouts"]


def prove_layouts(losses_of: Callable[[Batch], Tensor], batch: Batch, names: Mapping[int, str]) -> dict[str, Layout]:
    """Return the layout of every kind of call, proved by one forward and two backward passes of two examples.

    In each backward pass only one example's loss counts, so whatever belongs to the other must be zero exactly.
    Zero times infinity is not zero: two examples are sought whose gradients are finite.

    Raises:
        InputError: an example's loss depends on its batch mate.
    """
    for first in range(batch_length(batch) - 1):
        layouts = _proved_on(losses_of, batch_slice(batch, first, first + 2), names)
        if not layouts.spoilt:
            break
    return layouts.guessed


def _proved_on(losses_of: Callable[[Batch], Tensor], pair: Batch, names: Mapping[int, str]) -> Layouts:
    devices = sorted({t.device.index for t in _cuda_tensors(pair)})
    with torch.random.fork_rng(devices=devices):
        for may_share in (True, False):
            layouts = Layouts(2, may_share=may_share)
            if _try(losses_of, pair, names, layouts):
                break
        if "unknown" in layouts.guessed.values() and not layouts.spoilt:
            _refuse_coupling(losses_of, pair)
    return layouts


def _try(losses_of: Callable[[Batch], Tensor], pair: Batch, names: Mapping[int, str], layouts: Layouts) -> bool:
    """Fill in the layouts; false where an index repeated for every example changed the losses."""
    tap = Interception(RULES, names, layouts, lambda name, contribution: None)
    state = torch.random.get_rng_state()
    try:
        with tap:
            losses = losses_of(pair)
    except Exception:  # whatever a model raises where a repeated index does not fit; else it is the caller's
        if "shared" in layouts.guessed.values():
            return False
        raise
    if "shared" in layouts.guessed.values():
        torch.random.set_rng_state(state)
        with torch.no_grad():
            if not torch.allclose(losses, losses_of(pair), rtol=1e-4, equal_nan=True):
                return False
    if losses.requires_grad:
        for busy in (0, 1):
            layouts.idle = 1 - busy
            weights = torch.zeros_like(losses)
            weights[busy] = 1
            tap.backward(losses, weights, again=busy == 0)
    return True


def _refuse_coupling(losses_of: Callable[[Batch], Tensor], pair: Batch) -> None:
    with torch.no_grad():
        together = losses_of(pair)
        alone = torch.cat([losses_of(batch_slice(pair, i, i + 1)) for i in (0, 1)])
    if not torch.allclose(together, alone, rtol=1e-2, atol=1e-4, equal_nan=True):
        raise InputError(
            f"losses that are {together.tolist()} together and {alone.tolist()} one example at a time",
            "a loss in which no example depends on its batch mates",
            "Call model.eval() where dropout or BatchNorm is the cause, or write the loss an example",
        )


def _cuda_tensors(batch: Batch) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(batch)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_cuda]
