"""Is the loss the same function at every pass, and in any company? Products of one that changes are of nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.curvature.leaves import Leaves
from gradsketch.gradients.curvature.objective import Objective, check_finite
from gradsketch.gradients.data import tensors_of
from gradsketch.gradients.fingerprints import digest
from gradsketch.gradients.tasks import Batch
from gradsketch.stand_ins import held

__all__ = ["check_deterministic", "refuse_listed_batches"]


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
        raise _difference(objective, first, second, tolerance)
    _tell_of_company(objective, first)
    return watch.seen


def _tell_of_company(objective: Objective, losses: Float[Tensor, " N"]) -> None:
    """Warn where batches are made here and the losses of the first one are others in smaller ones."""
    data = objective.data
    count = min(data.batch_size, len(data.data)) if data.is_raw else 1
    size = -(-count // 2)
    if not objective.ranks.all(count > 1 and len(losses) == len(data.data)):  # a rank may have a row alone
        return
    examples = [data.data[i] for i in range(count)]
    halves = (examples[:size], examples[size:])
    parts = [_losses_or_none(objective, partial(data.task.collate, half)) for half in halves]
    found = [part.detach() for part in parts if part is not None]
    together = losses[:count]
    if len(found) != 2 or len(apart := torch.cat(found)) != count:
        return
    tolerance = _company_tolerance(objective)
    off = (apart - together).abs() > tolerance * (1 + together.abs())
    for place in off.cpu().nonzero()[:1, 0].tolist():
        warnings.warn(
            f"the loss of example {place} is {float(together[place]):.6g} in a batch of {count} and"
            f" {float(apart[place]):.6g} in one of {size}, so that curvature changes with batch_size. Write the loss"
            " per example, call model.eval() where BatchNorm is the cause, or pass the batches you mean: one batch,"
            " or a DataLoader",
            GradsketchWarning,
            stacklevel=6,
        )


def _company_tolerance(objective: Objective) -> float:
    """Return what rounding explains between batches of other sizes and paddings."""
    kinds = [t.dtype for t in held(objective.model).values() if t.is_floating_point()]
    narrow = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    eps = max(torch.finfo(torch.bfloat16 if narrow else kind).eps for kind in kinds)
    return min(10 * math.sqrt(eps), 0.1)


def _all_losses(objective: Objective) -> Float[Tensor, " N"]:
    # With gradients on, as in a product: some layers take another path without.
    parts, reached = [], False
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        objective.at(Leaves(objective.values).tensors) as losses_of,
    ):
        for index, batch in enumerate(objective.batches()):
            losses = losses_of(batch)
            check_finite(losses, index)
            reached = reached or losses.requires_grad
            parts.append(losses.detach())
            del losses  # frees the graph before the next one is built
    objective.check_reached(reached)
    return torch.cat(parts)


def _difference(objective: Objective, first: Tensor, second: Tensor, tolerance: float) -> InputError:
    model = objective.model
    change = float((first - second).abs().max())
    came = f"losses that change by up to {change:.2g} from one pass over the data to the next"
    wanted = "the same losses in the same order, or curvature products would belong to no function"
    random_layers = [n for n, m in model.named_modules() if m.training and "Dropout" in type(m).__name__]
    if torch.allclose(first.sort().values, second.sort().values, rtol=tolerance, atol=tolerance):
        return InputError(f"{came}: the order of the data changes", wanted, "Build the DataLoader with shuffle=False")
    if len({digest(next(iter(objective.own_batches()))) for _ in range(3)}) > 1:
        came = f"{came}: the data is another at every reading"
        return InputError(came, wanted, "Switch random augmentation off, or read the data once: list(dataset)")
    if model.training:
        layers = f" with {len(random_layers)} dropout layers, {random_layers[0]!r} first" if random_layers else ""
        return InputError(f"{came}: the model is in train mode{layers}", wanted, "Call model.eval() first")
    return InputError(f"{came}: the loss or the model is random", wanted, "Fix its seed inside the loss function")


def refuse_listed_batches(objective: Objective) -> None:
    """Refuse a list of batches where examples are expected: every row would count as a part of one example.

    The example of a sequence may have the same shapes. So an item counts as a batch only where the loss takes it as
    one, and as an example either cannot be taken or comes to the sum or the mean of its rows.

    Raises:
        InputError: a list of batches.
    """
    data, task, agreed = objective.data, objective.task, objective.ranks.all
    item = data.data[0] if data.is_raw and task.stacks else None
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors_of(item)}
    if not agreed(not isinstance(item, Tensor) and len(sizes) == 1 and min(sizes) > 1):
        return
    rows = _losses_or_none(objective, lambda: item)
    if not agreed(rows is not None and len(rows) == min(sizes)):
        return
    assert rows is not None
    example = _losses_or_none(objective, lambda: task.collate([item]))
    if example is None or any(torch.allclose(example, rows_as_one) for rows_as_one in (rows.sum(), rows.mean())):
        raise InputError(
            f"a list whose items the loss takes as batches, of {len(rows)} rows the first",
            "a list of examples, a DataLoader, or one batch",
            "Several batches need a DataLoader(dataset, batch_size=...), one batch is a tuple or a dict by itself;"
            " for examples that are sequences, collate them into one batch first",
        )


def _losses_or_none(objective: Objective, make: Callable[[], Batch]) -> Tensor | None:
    try:
        with objective.ranks.together(), torch.inference_mode(False), torch.no_grad():
            batch = next(objective.only(make()).batches())
            with objective.at(objective.values) as losses_of:
                return losses_of(batch)
    except Exception:  # the task's own, whatever it raises for what it cannot take
        return None


class _AttentionWatch(TorchFunctionMode):
    """Notices whether scaled-dot-product attention is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: bool = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is scaled_dot_product_attention
        return func(*args, **(kwargs or {}))
