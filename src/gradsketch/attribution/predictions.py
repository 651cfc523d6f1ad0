"""Which predicted tokens of an example carry its gradient's product with a direction in parameter space?

The loss of a causal language model is a sum over the tokens that it predicts, L = Σ_t ℓ_t, so ⟨∇L, V⟩ = Σ_t ⟨∇ℓ_t, V⟩:
each predicted token has its own part, and the others have none. With weights w on the terms, ⟨∇ Σ w_t ℓ_t, V⟩ is
linear in w, and its derivative with respect to w is all parts at once: two backward passes, whatever the number of
tokens.

Gates, which say where in the layers a gradient flows, put the weight on the word *before* the one that was learned.
Readers then took "Lima" in the colour of "lowered the score" for what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsketch.as_found import evaluating
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.linear_map import widened

__all__ = ["prediction_products"]

# Of the sum of absolute parts: what rounding may take away from their sum.
_TOLERANCE = 1e-3


def prediction_products(
    model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor]
) -> Float[Tensor, " t"] | None:
    """Return ⟨∇ℓ_t, direction⟩ for each token t of one example, at the token that ℓ_t is the prediction of.

    None where the task's loss is no sum over predicted tokens. ``direction`` has tensors by parameter name.
    """
    chosen = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in direction}
    # Fused attention cannot be differentiated twice.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        losses = task.token_losses(model, batch)
        if losses is None:
            return None
        if not losses.requires_grad:
            return torch.zeros(losses.shape[1], dtype=torch.float32, device="cpu")
        tangents = [direction[name].to(p) for name, p in chosen.items()]
        term = (losses[0], list(chosen.values()), tangents)
        parts = _all_at_once(*term)
        parts = _one_by_one(*term) if parts is None else parts
    return parts.float().cpu()


def _all_at_once(
    losses: Float[Tensor, " t"], parameters: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Float[Tensor, " t"] | None:
    """Return the parts, or None where an operation cannot be differentiated twice, or says so wrongly.

    A hand-written backward pass may lose terms in silence. Because the product is linear in the weights, its parts then
    no longer add up to it.
    """
    weights = torch.ones_like(losses, requires_grad=True)
    try:
        gradients = torch.autograd.grad(losses, parameters, weights, create_graph=True, allow_unused=True)
        product = _product(gradients, tangents)
        (parts,) = torch.autograd.grad(product, weights, retain_graph=True)
    except (RuntimeError, NotImplementedError):
        return None
    lost = (parts.sum() - product).abs()
    return parts.detach() if lost <= _TOLERANCE * parts.abs().sum() else None


def _one_by_one(
    losses: Float[Tensor, " t"], parameters: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Float[Tensor, " t"]:
    """Return the parts by one backward pass a token that counts."""
    parts = torch.zeros_like(losses)
    for place in losses.detach().nonzero().flatten().tolist():
        gradients = torch.autograd.grad(losses[place], parameters, retain_graph=True, allow_unused=True)
        parts[place] = _product(gradients, tangents).detach()
    return parts.detach()


def _product(gradients: Sequence[Tensor | None], tangents: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, tangents, strict=True)
    terms = [(g.to(widened(g.dtype)) * v.to(widened(v.dtype))).sum() for g, v in pairs if g is not None]
    return torch.stack(terms).sum()
