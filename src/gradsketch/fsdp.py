"""Models that FSDP2 (``fully_shard``) shares out among ranks: at rest in shards, gathered layer by layer as they run.

While a layer runs, FSDP2 puts another object in the place of each parameter: the whole of it, gathered from all ranks.
Autograd's graph knows only these. They are the same objects in every pass, whose memory is freed between passes.

Each gathering is a collective, so all ranks must run the same passes in the same order. ``Ranks`` is how they agree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.walks import modules_of, parameters_of

__all__ = ["Gathered", "Ranks", "at_rest", "class_of", "is_sharded", "resting", "whole"]


def _sharded_modules(model: nn.Module) -> list[Any]:
    # Whoever has called fully_shard has imported it; importing it takes a second.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in modules_of(model) if isinstance(m, fsdp.FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks share out parameters of the model by FSDP2."""
    return bool(_sharded_modules(model))


def at_rest(model: nn.Module) -> None:
    """Put every shard in its place: after a forward pass alone the last layers are still gathered."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Have the model at rest at both ends of a block."""
    at_rest(model)
    try:
        yield
    finally:
        at_rest(model)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece; where ranks share it out, all must ask for it."""
    full = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor if full is None else full()
    return result


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class that a model was written as; ``fully_shard`` makes a subclass of it."""
    return type(model).__mro__[2] if any(module is model for module in _sharded_modules(model)) else type(model)


class Ranks:
    """The ranks that share out a model; of a model in one piece, this process alone."""

    def __init__(self, model: nn.Module) -> None:
        meshes = [p.device_mesh for p in parameters_of(model) if hasattr(p, "device_mesh")]  # type: ignore[attr-defined]
        self._meshes = list(dict.fromkeys(meshes)) if is_sharded(model) else []

    @property
    def several(self) -> bool:
        """Whether there are others that have to keep in step."""
        return bool(self._meshes)

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number over all ranks, which all must call."""
        if not self._meshes:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64, device=self._meshes[0].device_type)
        for mesh in self._meshes:
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        return tuple(largest.tolist())


class Gathered:
    """What stands in autograd's graph for parameters: these themselves, or what FSDP2 gathers in their place.

    ``chosen`` maps names to such tensors, ``names`` their ids to names; ``others`` holds those that were not chosen.
    Call it where the model is at rest. Under FSDP2 all three fill up inside ``noting()``, as layers run.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._modules = _sharded_modules(model)
        self.chosen: dict[str, Tensor] = {} if self._modules else dict(tensors)
        self.names = {id(tensor): name for name, tensor in self.chosen.items()}
        self.others: dict[int, Tensor] = {}
        by_id = {id(tensor): name for name, tensor in tensors.items()}
        self._places = {
            (id(module), attribute): by_id.get(id(parameter))
            for module in (modules_of(model) if self._modules else ())
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        }

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note meanwhile what is gathered."""
        with ExitStack() as stack:
            for module in self._modules:
                # After FSDP2's own hook, which was registered before.
                stack.enter_context(module.register_forward_pre_hook(self._note))
            yield

    def _note(self, unit: nn.Module, _: Any) -> None:
        for module in modules_of(unit):
            for attribute, parameter in module._parameters.items():
                if parameter is None or hasattr(parameter, "device_mesh"):
                    continue
                name = self._places.get((id(module), attribute))
                if name is None:
                    self.others[id(parameter)] = parameter
                else:
                    self.chosen[name], self.names[id(parameter)] = parameter, name
