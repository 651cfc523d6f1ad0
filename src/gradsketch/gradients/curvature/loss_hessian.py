"""The Hessian of the mean loss, as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from gradsketch.gradients.curvature.base import Curvature, Mode, Recorded
from gradsketch.gradients.curvature.gradient import add_gradients
from gradsketch.gradients.curvature.leaves import Leaves, derivatives
from gradsketch.gradients.curvature.objective import LossesOf, Objective
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import Batch, TaskLike
from gradsketch.linear_map import LinearMap

__all__ = ["Hessian", "hessian"]


def hessian(
    model: nn.Module,
    task: TaskLike,
    data: Any,
    parameters: Selection = None,
    *,
    mode: Mode = "auto",
    batch_size: int = 8,
    check: bool = True,
) -> LinearMap:
    """Return the Hessian of the mean loss over the data, as a self-adjoint map on vectors ``[..., n]``.

    H = (1/N) Σ_i ∇²loss_i, over all N examples of all batches: batches of unequal length weigh by their examples.
    The model is used as it is when a product is taken, and left as it was. Vectors of one call share the forward pass
    and its graph. ``parameters`` (default: all trainable ones) choose the block, e.g. ``Parameters(model, "h.0.*")``.

    Modes: "grad-of-grad" (reverse over reverse; graphs are kept from product to product if they fit into 512 MiB,
    that of a single batch always), "jvp-of-grad" (forward over reverse), "central-difference" of gradients at weights
    in float64 (two such gradients; for kernels without double backward). "auto" is the first, or the last where
    double backward is missing or wrong. The first two take scaled-dot-product attention by its math path and run what
    is compiled uncompiled. Differentiating a forward-mode product once more is not offered: PyTorch's fused
    normalisation layers get it wrong.

    The first product is held against central differences with several step lengths; ``H.check`` is what was found, a
    warning says what matters, and ``H.error_along(v)`` measures the error of a product along a vector.

    Rows that an embedding's ``padding_idx`` freezes count as frozen in "grad-of-grad"; in the other two modes padding
    must not reach the loss.

    Weights in half precision are differentiated as they are and summed over batches in float32. A change of the model,
    the task or the batch between products is seen, however it was made.

    Args:
        model: any module.
        task: a task, or a function (model, batch) → losses ``[b]``.
        data: one batch, a DataLoader, or a sequence of examples that the task collates ``batch_size`` at a time.
        parameters: those to differentiate by, a selection or globs of names; by default all that are trainable.
        mode: how products are computed.
        batch_size: examples a batch, for sequences of examples.
        check: evaluate the losses twice first, and refuse data or models that give other losses the second time; hold
            the first product against differences. Without it only hand-written functions are.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> squares = lambda model, batch: model(batch[0]).flatten(1).square().sum(1)
        >>> H = gs.hessian(model, squares, (torch.eye(2),))
        >>> H(torch.tensor([1.0, 3.0]))
        tensor([1., 3.])

    Raises:
        InputError: empty or unrepeatable data, random losses, no loss per example, no parameter reached.
        NonFiniteError: a loss or a product is not finite; the message names the batch.
    """
    return Hessian(Objective(model, task, data, parameters, batch_size), mode, check=check)


class Hessian(Curvature):
    """Derivative of the gradient of the mean loss along a vector; built by ``hessian``."""

    def _record(self, leaves: Leaves, losses_of: LossesOf, batch: Batch) -> Recorded:
        losses = losses_of(batch)
        if not losses.requires_grad:
            return Recorded(leaves, [], len(losses), False)
        grads = derivatives(losses.sum(), leaves.tensors, create_graph=True, allow_unused=True)
        # Edges rather than gradients: the graph is needed from here on, the n numbers are not. A parameter the loss
        # does not use, or uses linearly, has no edge.
        edges = [(i, get_gradient_edge(g)) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        return Recorded(leaves, edges, len(losses), True, roots=(losses.grad_fn,))

    def _replay(self, recorded: Recorded, vector: list[Tensor], *, retain: bool) -> None:
        edges = [edge for _, edge in recorded.edges]
        recorded.leaves.backward(edges, [vector[i] for i, _ in recorded.edges], retain=retain)

    def _push(self, leaves: Leaves, tangents: list[Tensor], batch: Batch) -> tuple[int, bool]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, v) for t, v in zip(leaves.tensors, tangents, strict=True)]
            with self.objective.at(duals) as losses_of:
                losses = losses_of(batch)
                if not losses.requires_grad:
                    return len(losses), False
                # Recording the backward pass makes PyTorch take formulas that carry tangents (SiLU has another one).
                grads = derivatives(losses.sum(), duals, create_graph=True, allow_unused=True)
            for index, grad in enumerate(grads):
                tangent = None if grad is None else forward_ad.unpack_dual(grad).tangent
                if tangent is not None:
                    leaves.add(index, tangent)
            return len(losses), True

    def _add_difference(
        self, vector: Tensor, step: float, dtype: torch.dtype | None, out: Tensor, weight: float
    ) -> tuple[int, bool]:
        totals = (0, False)
        for sign in (1.0, -1.0):
            leaves = self._shifted(vector, sign * step, dtype)
            totals = add_gradients(self.objective, leaves, out, sign * weight / (2 * step))
            del leaves  # before the next ones are made
        return totals
