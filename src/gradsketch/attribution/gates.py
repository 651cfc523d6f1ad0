"""Which tokens of an example carry its gradient's product with a direction in parameter space?

Every module that owns parameters W adds to its output at token t what it would add if W moved along V, times a gate
g_t = 0. The derivative of the loss with respect to g_t is then the part of ⟨∇L, V⟩ that flows through the module at
token t: for a linear layer error_tᵀ V input_t, so that the gates of all modules and tokens add up to the product.
One forward and one backward pass, whatever the number of tokens; no gradient of a parameter is formed.

It needs no knowledge of layer types. What has no token, or no forward derivative, is reported apart, so that the parts
always add up to the score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.errors import InputError
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.linear_map import widened
from gradsketch.stand_ins import stand_ins_within

__all__ = ["token_products"]


def token_products(
    model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " t"], float]:
    """Return the part of ⟨∇L, direction⟩ at each token of one example, and the part at no single token.

    ``direction`` has tensors by parameter name; other parameters count as fixed. Tokens are those of ``input_ids``,
    followed by those of ``labels`` for an encoder-decoder. A module whose output has no token dim (a classification
    head on a pooled state) adds to the second result. Modules without a forward derivative (grouped experts, routers
    that return tuples) are left out of both.

    Raises:
        InputError: the batch is not one example with ``input_ids``.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        raise InputError("a batch without the tokens of one example", "input_ids of shape [1, t]", "Explain texts only")
    lengths = [ids.shape[1]] + ([batch["labels"].shape[1]] if _is_encoder_decoder(model) else [])
    dtype = widened(next(iter(direction.values())).dtype)
    gates = _Gates(lengths, dtype, ids.device)
    with evaluating(model), _gated(model, direction, gates), torch.enable_grad():
        loss = task.losses(model, batch).sum()
        if not loss.requires_grad:
            return torch.zeros(sum(lengths), dtype=torch.float32, device="cpu"), 0.0
        (parts,) = torch.autograd.grad(loss, [gates.values], allow_unused=True)
    if parts is None:  # no module with a direction took part
        return torch.zeros(sum(lengths), dtype=torch.float32, device="cpu"), 0.0
    return parts[:-1].float().cpu(), float(parts[-1])


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class _Gates:
    """One zero a token of every stack of layers (encoder, decoder), and one for what has no token."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
        self.lengths, self.stack = lengths, 0
        self.values = torch.zeros(sum(lengths) + 1, dtype=dtype, device=device, requires_grad=True)

    def shaped(self, change: Tensor) -> Tensor:
        """Return gates that broadcast over an output: one a token where its dims show the tokens, else the last."""
        tokens = self.lengths[self.stack]
        own: Tensor = torch.split(self.values[:-1], self.lengths)[self.stack]
        if change.ndim >= 3 and change.shape[0] == 1 and change.shape[1] == tokens:
            return own.reshape(1, -1, *[1] * (change.ndim - 2))
        if change.ndim == 2 and change.shape[0] == tokens:  # layers that flatten examples and tokens
            return own[:, None]
        return self.values[-1]


@contextmanager
def _gated(model: nn.Module, direction: Mapping[str, Tensor], gates: _Gates) -> Iterator[None]:
    """Hook every module that owns parameters with a direction; the hooks are gone afterwards, come what may."""
    by_tensor = {
        id(tensor): direction[name]
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if name in direction
    }
    busy: list[nn.Module] = []
    with ExitStack() as hooks:
        finders: Any = (model.get_encoder, model.get_decoder) if _is_encoder_decoder(model) else ()
        for number, find in enumerate(finders):
            hooks.callback(find().register_forward_pre_hook(_enter(gates, number)).remove)
        for module in model.modules():
            own = {n: by_tensor[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in by_tensor}
            if own:
                hooks.callback(module.register_forward_hook(_gate(own, gates, busy), with_kwargs=True).remove)
        yield


def _enter(gates: _Gates, stack: int) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        gates.stack = stack

    return hook


def _gate(own: Mapping[str, Tensor], gates: _Gates, busy: list[nn.Module]) -> Callable[..., Tensor | None]:
    """Return the hook of a module: output + gate · (what the output would change by if its parameters moved)."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        # While a module runs again to find its own change, its children's hooks must not see that run. A module whose
        # output is no tensor (a router), or that forward mode cannot go through (grouped experts), is left alone.
        if busy or not isinstance(output, Tensor):
            return None
        busy.append(module)
        try:
            with torch.no_grad():
                change = _change(module, own, args, kwargs)
        except NotImplementedError:
            return None
        finally:
            busy.pop()
        return output + (gates.shaped(change) * change).to(output.dtype)

    return hook


def _change(module: nn.Module, own: Mapping[str, Tensor], args: Any, kwargs: Any) -> Tensor:
    parameters = {name: getattr(module, name).detach() for name in own}
    tangents = {name: v.to(parameters[name]) for name, v in own.items()}
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # Autograd gives that row no gradient, so moving it must not count either.
        tangents["weight"] = tangents["weight"].clone()
        tangents["weight"][module.padding_idx] = 0
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def run(values: dict[str, Tensor]) -> Any:
        with stand_ins_within(module, values):
            return module(*args, **kwargs)

    change: Tensor = torch.func.jvp(run, (parameters,), (tangents,))[1]
    return change.detach()
