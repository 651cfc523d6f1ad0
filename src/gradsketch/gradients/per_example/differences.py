"""Hold the gradients of a split model against differences of its losses, because its own backward pass may be wrong.

Who splits a layer by hand says what its backward pass adds up over ranks. Where that is forgotten, every rank may have
the same gradients, and autograd's own, that are nobody's derivative. So each parameter is moved along its own gradient,
by as much of its length as the others, and the losses must change by what the gradients say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gradsketch.fsdp import whole
from gradsketch.stand_ins import stand_ins

__all__ = ["error_of_differences"]

_STEPS = 3
# A step that rounding disturbs by more tells nothing.
_TOLD = 0.3


def error_of_differences(
    loss: Callable[[], float],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    dtype: torch.dtype,
    agreed: Callable[[bool], bool],
) -> float | None:
    """Return the relative error of what gradients say of a difference of losses; 0 where rounding explains it.

    The best of several steps, because a step may cross a kink. None where rounding of ``dtype`` leaves nothing to see.
    ``agreed`` says whether something holds on every rank.
    """
    along = {name: _along(tensors[name], gradients[name]) for name in tensors}
    slope, size, eps = _product(gradients, along), abs(loss()), torch.finfo(dtype).eps
    if not agreed(slope > 0):
        return None
    found = []
    for turn in range(_STEPS):
        step = eps ** (1 / 3) * min(1.0, size / slope) / 8**turn
        allowed = eps ** (1 / 3) + 8 * eps * size / (step * slope)
        if agreed(allowed > _TOLD):
            break
        error = _error(loss, model, tensors, gradients, along, step)
        if agreed(error <= allowed):
            return 0.0
        found.append(error)
    return min(found, default=None)


def _along(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in the length of the tensor, or of a small one of its size."""
    length = float(whole(gradient.norm()))
    least = 0.01 * math.sqrt(tensor.numel())
    return gradient * (max(float(whole(tensor.detach().norm())), least) / length if length else 0.0)


def _error(
    loss: Callable[[], float],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    along: Mapping[str, Tensor],
    step: float,
) -> float:
    ends, losses = [], []
    for sign in (1, -1):
        ends.append({name: (t.detach() + sign * step * along[name]).to(t.dtype) for name, t in tensors.items()})
        with stand_ins(model, ends[-1]):
            losses.append(loss())
    # What was rounded off the parameters themselves does not count.
    told = _product(gradients, {name: ends[0][name] - ends[1][name] for name in tensors})
    return abs(losses[0] - losses[1] - told) / abs(told) if told else 0.0


def _product(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return math.fsum(float(whole((one[name].double() * other[name].double()).sum())) for name in one)
