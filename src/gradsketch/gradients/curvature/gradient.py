"""The gradient of the mean loss, the one whose derivative the Hessian is."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.gradients.curvature.failures import translated
from gradsketch.gradients.curvature.leaves import Leaves
from gradsketch.gradients.curvature.objective import Objective
from gradsketch.gradients.curvature.probe import refuse_listed_batches
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import TaskLike
from gradsketch.linear_map import widened

__all__ = ["add_gradients", "loss_gradient"]


def loss_gradient(
    model: nn.Module,
    task: TaskLike,
    data: Any,
    parameters: Selection = None,
    *,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " n"]:
    """Return the gradient of the mean loss over the data, the one whose derivative ``hessian`` is.

    On the device of the first parameter, accumulated in ``dtype`` (float64 for weights in float64, float32 for narrower
    ones); parameters the loss does not use get zeros.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> gs.loss_gradient(model, task, data).shape
        torch.Size([42])

    Raises:
        InputError: empty data, no loss per example, no parameter reached.
        NonFiniteError: a loss is not finite; the message names the batch.
    """
    objective = Objective(model, task, data, parameters, batch_size)
    ranks, space = objective.ranks, objective.space
    with ranks.together(), torch.inference_mode(False), torch.enable_grad(), translated(model):
        refuse_listed_batches(objective)
        leaves = Leaves(objective.values)
        first = leaves.tensors[0]
        out = torch.zeros(space.size, dtype=dtype or widened(first.dtype), device=first.device)
        examples, reached = add_gradients(objective, leaves, out)
        objective.check_reached(reached)
        if ranks.any(not torch.isfinite(out).all()):
            objective.explain_non_finite()
        return space.whole(out.div_(ranks.total(examples)))


def add_gradients(
    objective: Objective, leaves: Leaves, target: Float[Tensor, " n"], scale: float = 1.0
) -> tuple[int, bool]:
    """Add scale·Σ_i ∇loss_i at the leaves to ``target``; return the number of examples and whether any was reached."""
    examples, reached = 0, False
    with leaves.adding_to(target, scale), objective.at(leaves.tensors) as losses_of:
        for batch in objective.batches():
            losses = losses_of(batch)
            leaves.backward([losses.sum()] if losses.requires_grad else [])
            examples, reached = examples + len(losses), reached or losses.requires_grad
            del losses  # frees the graph before the next one is built
    return examples, reached
