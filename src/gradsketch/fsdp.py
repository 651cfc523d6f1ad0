"""Models that FSDP2 (``fully_shard``) shares out among ranks: at rest in shards, gathered layer by layer as they run.

While a layer runs, FSDP2 puts another object in the place of each parameter: the whole of it, gathered from all ranks.
Autograd's graph knows only these. They are the same objects in every pass, whose memory is freed between passes.

Each gathering is a collective, so all ranks must run the same passes in the same order. ``Ranks`` is how they agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.lockstep import Lockstep
from gradsketch.tensor_parallel import is_shard, team_of
from gradsketch.walks import modules_of, parameters_of

__all__ = [
    "Gathered",
    "Ranks",
    "at_rest",
    "class_of",
    "is_shard",
    "is_sharded",
    "own_share",
    "require_unshared",
    "require_unsplit",
    "require_whole",
    "resting",
    "states_of",
    "units_of",
    "whole",
]


def units_of(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 gathers, each at its own time."""
    # Whoever has called fully_shard has imported it; importing it takes a second.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in modules_of(model) if isinstance(m, fsdp.FSDPModule)]


def states_of(model: nn.Module) -> list[Any]:
    """Return what FSDP2 remembers of the modules that it gathers."""
    return [module._get_fsdp_state() for module in units_of(model)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks share out parameters of the model by FSDP2."""
    return bool(units_of(model))


def at_rest(model: nn.Module) -> None:
    """Put every shard in its place: after a forward pass alone the last layers are still gathered."""
    for module in units_of(model):
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


def own_share(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    local = getattr(tensor, "to_local", None)
    result: Tensor = tensor if local is None else local()
    return result


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class that a model was written as; ``fully_shard`` makes a subclass of it."""
    return type(model).__mro__[2] if any(module is model for module in units_of(model)) else type(model)


def _tensors(inputs: Any) -> list[Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(inputs) if isinstance(value, Tensor)]


_LOAD = "Load the model in one piece"


def require_whole(model: nn.Module, what: str, fix: str = _LOAD) -> None:
    """Refuse a model of which ranks hold parts, for work that does not go in step.

    Raises:
        InputError: it is one.
    """
    require_unshared(model, what, fix)
    require_unsplit(model, what, fix)


def require_unshared(model: nn.Module, what: str, fix: str = _LOAD) -> None:
    """Refuse a model that FSDP2 shares out.

    Raises:
        InputError: it is one.
    """
    if is_sharded(model):
        raise InputError(f"{what} of a model that FSDP2 shares out among ranks", "a model in one piece", fix)


def require_unsplit(model: nn.Module, what: str, fix: str = _LOAD) -> None:
    """Refuse a model whose layers tensor parallelism splits.

    Raises:
        InputError: it is one.
    """
    if not is_sharded(model) and any(is_shard(parameter) for parameter in parameters_of(model)):
        raise InputError(f"{what} of a model that tensor parallelism splits", "a model in one piece", fix)


class Ranks:
    """The ranks that hold parts of a model; of a model in one piece, this process alone.

    Those among whom FSDP2 shares it out have rows of their own. Those over which tensor parallelism splits its layers
    are a ``team``, all of whom see the same rows, and the model is ``split``.

    Raises:
        InputError: both at once, or tensor parallelism over more than one dim of one mesh.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters: list[Any] = [p for p in parameters_of(model) if is_shard(p)]
        meshes = [parameter.device_mesh for parameter in parameters]
        self._meshes = list(dict.fromkeys(meshes)) if is_sharded(model) else []
        _refuse_both(model)
        self.split = bool(meshes) and not self._meshes
        self.team = team_of(model) if self.split else Lockstep()

    @property
    def several(self) -> bool:
        """Whether there are others that have to keep in step."""
        return bool(self._meshes) or self.split

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks, and writes, for the others."""
        return self.place[0] == 0 and self.team.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        """Return (i, n): of n ranks with rows of their own this is the i-th."""
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if self._meshes else (0, 1)

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number over all ranks, which all must call."""
        if not self._meshes:
            return self.team.most(*numbers)
        largest = torch.tensor(numbers, dtype=torch.int64, device=self._meshes[0].device_type)
        for mesh in self._meshes:
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        return tuple(largest.tolist())


def _refuse_both(model: nn.Module) -> None:
    """Refuse layers that were split before FSDP2 shared them out, or that it has left out."""
    shared = [parameter for state in states_of(model) for group in _groups(state) for parameter in group.fsdp_params]
    taken = {id(parameter.sharded_param) for parameter in shared}
    left = [p for p in parameters_of(model) if is_shard(p) and id(p) not in taken] if shared else []
    if left or any(parameter.is_dtensor for parameter in shared):
        raise InputError(
            "a model that FSDP2 shares out and tensor parallelism splits",
            "one of them",
            "Load the model with fully_shard alone, or with parallelize_module alone",
        )


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # until torch 2.12


class Gathered:
    """What stands in autograd's graph for parameters: these themselves, or what FSDP2 gathers in their place.

    ``names`` has the name of each that was chosen, and ``every`` all that was gathered, by id. Make it where the model
    is at rest. Under FSDP2 both fill up inside ``noting()``, as layers run.

    Raises:
        InputError: FSDP2 gathers other values for one name of a tied parameter than for another.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._modules = units_of(model)
        by_id = {id(tensor): name for name, tensor in tensors.items()}
        # What no call of fully_shard has taken stands in the graph itself.
        self.every = {id(tensor): tensor for tensor in tensors.values() if not (self._modules and is_shard(tensor))}
        self.names = {key: by_id[key] for key in self.every}
        self._places = {
            (id(module), attribute): by_id.get(id(parameter))
            for module in (modules_of(model) if self._modules else ())
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        }

    @contextmanager
    def noting(self, replaced: Callable[[Tensor, Tensor], None] = lambda before, after: None) -> Iterator[None]:
        """Note meanwhile what is gathered; ``replaced`` hears of a layer's inputs that FSDP2 replaces by copies."""
        given: dict[int, list[Tensor]] = {}

        def before(unit: nn.Module, *inputs: Any) -> None:
            given[id(unit)] = _tensors(inputs)

        def after(unit: nn.Module, *inputs: Any) -> None:
            for one, other in zip(given.pop(id(unit), []), _tensors(inputs), strict=False):
                if one is not other:
                    replaced(one, other)
            self._note(unit)

        with ExitStack() as stack:
            for module in self._modules:  # before and after FSDP2's own hook
                for hook in (before, after):
                    handle = module.register_forward_pre_hook(hook, prepend=hook is before, with_kwargs=True)
                    stack.enter_context(handle)
            yield

    @property
    def leaves(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of what was gathered for the chosen; a tied parameter may be gathered once a name."""
        return [(name, self.every[key]) for key, name in self.names.items()]

    def _note(self, unit: nn.Module) -> None:
        for module in modules_of(unit):
            for attribute, parameter in module._parameters.items():
                if parameter is None or is_shard(parameter) or id(parameter) in self.every:
                    continue
                self.every[id(parameter)] = parameter
                name = self._places.get((id(module), attribute))
                if name is not None:
                    self.names[id(parameter)] = name
                    self._require_tied(name)

    def _require_tied(self, name: str) -> None:
        first, *others = [tensor for key, tensor in self.leaves if key == name]
        if first.untyped_storage().size() and not all(torch.equal(first, other) for other in others):
            raise InputError(
                f"{name!r}, tied to a parameter of other values once FSDP2 has gathered both",
                "one parameter, or equal ones",
                "Put the modules that share it into one call: fully_shard([embedding, head])",
            )
