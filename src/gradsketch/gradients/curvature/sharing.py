"""The parameters of a model that FSDP2 shares out among ranks: who holds what, as leaves that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.as_found import Trainability
from gradsketch.errors import InputError
from gradsketch.fsdp import at_rest, is_shard, is_sharded, own_share, states_of, units_of
from gradsketch.gradients.curvature.graph import nodes_of
from gradsketch.gradients.curvature.state import sum_of_bits
from gradsketch.gradients.fingerprints import digest
from gradsketch.gradients.gathering import Gathering, Memory, hooks_aside
from gradsketch.gradients.parameters import Parameters
from gradsketch.lockstep import Lockstep
from gradsketch.space import Share, Space, gathered
from gradsketch.stand_ins import Readings, Source, held
from gradsketch.walks import parameters_of

__all__ = ["Sharing", "in_step_over", "sharing_of"]

_WANTED = "parameters that fully_shard(model) shares out by their rows over one mesh dim"


def in_step_over(model: nn.Module) -> Lockstep:
    """Return the ranks that share out a model; of a model in one piece, this process alone."""
    at_rest(model)
    shards: list[Any] = [p for p in parameters_of(model) if is_shard(p)] if is_sharded(model) else []
    return Lockstep(shards[0].device_mesh.get_group(0), shards[0].device_mesh.device_type) if shards else Lockstep()


def sharing_of(model: nn.Module, parameters: Parameters, ranks: Lockstep) -> Sharing | None:
    """Return how ranks share out the model's parameters, or None of a model in one piece."""
    return Sharing(model, parameters, ranks) if is_sharded(model) else None


class Sharing:
    """Which rank holds what of the parameters, and how modules read the whole of them.

    Raises:
        InputError: another kind of sharing out than by rows over one mesh, or with casts or offloading.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, ranks: Lockstep) -> None:
        self.model, self.ranks = model, ranks
        named = dict(model.named_parameters())
        _check(model, named)
        # What no call of fully_shard took is whole on every rank. Of it too each rank holds a share as a leaf, so that
        # no vector is whole.
        chosen = {id(tensor) for _, tensor in parameters}
        self.read = {n: tensor for n, tensor in named.items() if is_shard(tensor) or id(tensor) in chosen}
        self._shares = {
            name: Share(t.shape, t.shape[0] if is_shard(t) else t.numel(), self.ranks, place)
            for place, (name, t) in enumerate(self.read.items())
        }
        self._own = self.held()
        names = {id(tensor): name for name, tensor in self.read.items()}
        self.names = [names[id(tensor)] for _, tensor in parameters]
        self._units = _units_of(model, self.read)
        self.memory = Memory()
        self._check_equal(parameters)
        self.space = Space(parameters.n, [self._shares[name] for name in self.names], self.ranks)

    @property
    def values(self) -> list[Tensor]:
        """What this rank holds of the selected parameters."""
        return [self._own[name] for name in self.names]

    def held(self) -> dict[str, Tensor]:
        """Return what this rank holds at present of all tensors that modules read, by name."""
        return {name: self._share_of(name, tensor) for name, tensor in self.read.items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write what ranks hold of tensors into the model."""
        for name, value in values.items():
            tensor = self.read[name]
            whole = value if is_shard(tensor) else gathered([self._shares[name]], [value])[0]
            own_share(tensor).copy_(whole)

    def _share_of(self, name: str, tensor: Any) -> Tensor:
        share = self._shares[name]
        if not is_shard(tensor):
            return share.cut(tensor.detach().view(-1))
        local = own_share(tensor).detach()
        if local.numel() != share.size or local.device.type != tensor.device_mesh.device_type:
            raise InputError(f"{name!r}, of which this rank holds {list(local.shape)}", _WANTED, _FIX)
        return local

    def _check_equal(self, parameters: Parameters) -> None:
        """Refuse what would make another function on each rank: another selection, modes, or what all hold whole."""
        if not self.ranks.same(int(parameters.fingerprint()[:15], 16)):
            raise InputError("other parameters on each rank", "the same selection", "Pass the same names to every rank")
        if not self.ranks.same(int(digest([module.training for module in self.model.modules()])[:15], 16)):
            raise InputError("a model in other modes on each rank", "one mode", "Call model.eval() on every rank")
        for name, tensor in held(self.model).items():
            if not is_shard(tensor) and not self.ranks.same(sum_of_bits(tensor)):
                raise InputError(
                    f"{name!r}, which has other values on each rank",
                    "shards of one model, and the same values in what every rank holds whole",
                    "Call fully_shard(model) on the whole model, and load the same weights and buffers on every rank",
                )

    def check_leaves(self, losses: Tensor) -> None:
        """Refuse losses that depend on a parameter by another way than the modules that read it.

        Raises:
            InputError: they do; that part of the derivative would be missing.
        """
        leaves = {id(getattr(node, "variable", None)) for node in nodes_of([losses.grad_fn])}
        for name, tensor in self.read.items():
            if id(tensor) in leaves:
                raise InputError(
                    f"a loss that reads {name!r} as FSDP2 keeps it, in shards",
                    "parameters that are read as attributes of their modules, which gathers them",
                    "Write model.layer.weight rather than model.parameters() or full_tensor() in the loss",
                )

    def gathering(
        self,
        values: Mapping[str, Tensor],
        wider: torch.dtype | None = None,
        tap: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Gathering:
        """Return how modules read tensors of which this rank holds ``values``."""
        return Gathering(self._shares, values, self._units, self.memory, wider, tap)

    @contextmanager
    def at(self, chosen: Sequence[Tensor], wider: torch.dtype | None) -> Iterator[None]:
        """Have modules read the whole of what ranks share out, ``chosen`` in the place of the selected parameters.

        The model must be at rest. Keep the block open until all backward passes are over.
        """
        values = self._own | dict(zip(self.names, chosen, strict=True))
        gathering = self.gathering(values, wider)
        source = Source(self.model, gathering.read, gathering.read, lambda: None)
        with hooks_aside(self.model), Trainability(self.model) as found, self.memory.saving():
            found.only([self.read[name] for name in self.names])  # so that check_leaves sees them
            readings = Readings(self.model, self.read, source)
            try:
                yield
            finally:
                readings.undo()
                gathering.present.drop()
                self.memory.again.drop()


_FIX = "Call fully_shard without shard_placement_fn, mp_policy and offload_policy, on a mesh of one dim"


def _check(model: nn.Module, named: Mapping[str, Any]) -> None:
    for name, tensor in named.items():
        if is_shard(tensor) and not (tensor.device_mesh.ndim == 1 and tensor.placements[0].is_shard(0)):
            raise InputError(f"{name!r}, shared out as {tensor.placements}", _WANTED, _FIX)
    if len({tensor.device_mesh for tensor in named.values() if is_shard(tensor)}) != 1:
        raise InputError("parameters shared out over several meshes, or none", _WANTED, _FIX)
    for state in states_of(model):
        policy = state._mp_policy
        if any((policy.param_dtype, policy.reduce_dtype, policy.output_dtype)):
            raise InputError(f"a model that fully_shard casts ({policy})", _WANTED, _FIX)


def _units_of(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return by name which unit of fully_shard a parameter belongs to; what none took is one by itself."""
    unit_of = {id(p): place for place, unit in enumerate(units_of(model)) for p in parameters_of(unit)}
    return {name: unit_of[id(tensor)] if is_shard(tensor) else name for name, tensor in named.items()}
