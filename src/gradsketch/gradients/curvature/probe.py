"""Is the loss the same function at every pass? Products of a function that changes are products of nothing."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gradsketch.errors import InputError
from gradsketch.gradients.curvature.leaves import Leaves
from gradsketch.gradients.curvature.objective import Objective, check_finite

__all__ = ["check_deterministic"]


def check_deterministic(objective: Objective) -> bool:
    """Evaluate every loss twice and refuse what differs: dropout, shuffled data, random losses.

    Returns whether the model calls scaled-dot-product attention.

    Raises:
        InputError: the losses differ, or no selected parameter has a part in them.
        NonFiniteError: a loss is not finite.
    """
    watch = _AttentionWatch()
    with watch:
        first = _all_losses(objective)
    second = _all_losses(objective)
    if first.shape != second.shape:
        raise InputError(
            f"data with {len(first)} examples at the first pass and {len(second)} at the second",
            "the same batches at every pass",
            "Wrap it in list(...)",
        )
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    if not torch.allclose(first, second, rtol=tolerance, atol=tolerance):
        raise _difference(objective.model, first, second, tolerance)
    return watch.seen


def _all_losses(objective: Objective) -> Float[Tensor, " N"]:
    # With gradients on, as in a product: some layers take another path without.
    leaves, parts, reached = Leaves(objective.values), [], False
    with torch.inference_mode(False), torch.enable_grad(), objective.at(leaves.tensors) as losses_of:
        for index, batch in enumerate(objective.batches()):
            losses = losses_of(batch)
            check_finite(losses, index)
            reached = reached or losses.requires_grad
            parts.append(losses.detach())
            del losses  # frees the graph before the next one is built
    objective.check_reached(reached)
    return torch.cat(parts)


def _difference(model: nn.Module, first: Tensor, second: Tensor, tolerance: float) -> InputError:
    change = float((first - second).abs().max())
    came = f"losses that change by up to {change:.2g} from one pass over the data to the next"
    wanted = "the same losses in the same order, or curvature products would belong to no function"
    random_layers = [n for n, m in model.named_modules() if m.training and "Dropout" in type(m).__name__]
    if torch.allclose(first.sort().values, second.sort().values, rtol=tolerance, atol=tolerance):
        return InputError(f"{came}: the order of the data changes", wanted, "Build the DataLoader with shuffle=False")
    if model.training:
        layers = f" with {len(random_layers)} dropout layers, {random_layers[0]!r} first" if random_layers else ""
        return InputError(f"{came}: the model is in train mode{layers}", wanted, "Call model.eval() first")
    return InputError(f"{came}: the loss or the model is random", wanted, "Fix its seed inside the loss function")


class _AttentionWatch(TorchFunctionMode):
    """Notices whether scaled-dot-product attention is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: bool = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is scaled_dot_product_attention
        return func(*args, **(kwargs or {}))
