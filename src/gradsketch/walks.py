"""Every module, parameter or buffer of a model, each once, in torch's order, without the names that torch makes up.

Work on one batch walks through the whole model a dozen times, and making up names is most of what a walk takes.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["buffers_of", "modules_of", "parameters_of"]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in reversed(list(module._modules.values())) if child is not None]
    return list(found.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Return what ``model.parameters()`` yields."""
    every = {id(p): p for module in modules_of(model) for p in module._parameters.values() if p is not None}
    return list(every.values())


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Return what ``model.buffers()`` yields."""
    every = {id(b): b for module in modules_of(model) for b in module._buffers.values() if b is not None}
    return list(every.values())
