"""Models whose layers tensor parallelism splits over ranks: parameters that stay in parts while they run.

Each rank of a *team* sees the same rows and computes its part of every layer. Torch writes the parts as DTensors, whose
gradients are DTensors too. What reaches a layer is gathered before it is used, so the contributions to a gradient are
those of one process, on every rank. Ranks share the work of sketching: each takes the parameters that are its own.

Every gathering is a collective, and so is most of a split layer. So ranks meet before each such layer and in each step
of a backward pass, and a rank that fails says so there (see ``lockstep``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.lockstep import Lockstep
from gradsketch.walks import modules_of, parameters_of

__all__ = ["are_added_up", "conversions_heard", "is_shard", "meeting", "team_of"]

# What makes a DTensor of a plain tensor, a plain tensor of a DTensor, or another DTensor with the same entries.
_CONVERSIONS = ("from_local", "to_local", "redistribute", "full_tensor")


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "device_mesh")


def are_added_up(parameter: Tensor) -> bool:
    """Whether each rank has a part of the gradient of a parameter that all hold whole, as of norms of split heads.

    Transformers' own backward pass adds these parts up, by a hook that a forward pass registers.
    """
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    names = [(getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) for hook in hooks.values()]
    return names == [("transformers.distributed.tensor_parallel", "_all_reduce_grad")]


def team_of(model: nn.Module) -> Lockstep:
    """Return the ranks that hold parts of a model's layers; of a model in one piece, this process alone.

    Raises:
        InputError: parameters are split over several meshes, or over one of several dims.
    """
    parameters: list[Any] = [p for p in parameters_of(model) if is_shard(p)]
    meshes = list(dict.fromkeys(parameter.device_mesh for parameter in parameters))
    if not meshes:
        return Lockstep()
    if len(meshes) > 1 or meshes[0].ndim > 1:
        raise InputError(
            f"a model that is split over {len(meshes)} meshes of {max(mesh.ndim for mesh in meshes)} dims",
            "tensor parallelism over one mesh of one dim",
            'Type parallelize_module(model, mesh["tp"], plan), and leave fully_shard out',
        )
    return Lockstep(meshes[0].get_group(), meshes[0].device_type)


@contextmanager
def meeting(model: nn.Module, team: Lockstep) -> Iterator[None]:
    """Have the team meet before each layer that it holds in parts, where a rank that has failed is heard."""
    with ExitStack() as stack:
        for place, module in enumerate(modules_of(model) if team.several else ()):
            if any(p is not None and is_shard(p) for p in module._parameters.values()):
                meet = functools.partial(_meet, team, place)
                stack.enter_context(module.register_forward_pre_hook(meet, prepend=True))
        yield


def _meet(team: Lockstep, place: int, *_: Any) -> None:
    team.meet(place)


@contextmanager
def conversions_heard(heard: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Tell meanwhile of each conversion from and to a DTensor: of what, and what it has become.

    Torch's functions are intercepted, and these are none: they are methods around autograd functions, which a mode sees
    from inside only, where nobody knows whose part a part is.
    """
    kind: Any = sys.modules["torch.distributed.tensor"].DTensor  # whoever has split a model has imported it
    own = {name: vars(kind)[name] for name in _CONVERSIONS}
    for name, method in own.items():
        setattr(kind, name, _told(method, heard))
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(kind, name, method)


def _told(method: Any, heard: Callable[[Tensor, Tensor], None]) -> Any:
    function = getattr(method, "__func__", method)

    @functools.wraps(function)
    def conversion(source: Tensor, *args: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction():
            result = function(source, *args, **options)
        heard(source, result)
        return result

    return staticmethod(conversion) if isinstance(method, staticmethod) else conversion
