"""The parameters of a model that FSDP2 shares out among ranks, as leaves that can be differentiated twice.

FSDP2's own backward pass frees and reduces what it gathered, and cannot be differentiated again. So for as long as a
block lasts its hooks stand aside, and a module that reads a parameter gets what a function of autograd gathers from the
ranks' shares. The derivative of gathering is to add up the ranks' gradients and to hand each its share; the derivative
of that is gathering. Autograd would keep what was gathered for its backward passes. It is told to keep the share
instead, and gathers again where it needs the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradsketch.as_found import Trainability
from gradsketch.errors import InputError
from gradsketch.fsdp import at_rest, is_shard, is_sharded, own_share, states_of, units_of
from gradsketch.gradients.curvature.graph import nodes_of
from gradsketch.gradients.curvature.state import sum_of_bits
from gradsketch.gradients.fingerprints import digest
from gradsketch.gradients.parameters import Parameters
from gradsketch.lockstep import Lockstep
from gradsketch.space import Share, Space, gathered, scattered
from gradsketch.stand_ins import Readings, Source, held
from gradsketch.walks import modules_of, parameters_of

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
        self._read = {n: tensor for n, tensor in named.items() if is_shard(tensor) or id(tensor) in chosen}
        self._shares = {
            name: Share(t.shape, t.shape[0] if is_shard(t) else t.numel(), self.ranks, place)
            for place, (name, t) in enumerate(self._read.items())
        }
        self._own = {name: self._share_of(name, tensor) for name, tensor in self._read.items()}
        names = {id(tensor): name for name, tensor in self._read.items()}
        self.names = [names[id(tensor)] for _, tensor in parameters]
        self._units = _units_of(model, self._read)
        self._again = _Last()
        self._check_equal(parameters)
        self.space = Space(parameters.n, [self._shares[name] for name in self.names], self.ranks)

    @property
    def values(self) -> list[Tensor]:
        """What this rank holds of the selected parameters."""
        return [self._own[name] for name in self.names]

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
        for name, tensor in self._read.items():
            if id(tensor) in leaves:
                raise InputError(
                    f"a loss that reads {name!r} as FSDP2 keeps it, in shards",
                    "parameters that are read as attributes of their modules, which gathers them",
                    "Write model.layer.weight rather than model.parameters() or full_tensor() in the loss",
                )

    @contextmanager
    def at(self, chosen: Sequence[Tensor], wider: torch.dtype | None) -> Iterator[None]:
        """Have modules read the whole of what ranks share out, ``chosen`` in the place of the selected parameters.

        The model must be at rest. Keep the block open until all backward passes are over.
        """
        values = self._own | dict(zip(self.names, chosen, strict=True))
        gathering = _Gathering(self._shares, values, self._units, wider, self._again)
        source = Source(self.model, gathering.read, gathering.read, lambda: None)
        with _without_hooks(self.model), Trainability(self.model) as found, gathering.saving():
            found.only([self._read[name] for name in self.names])  # so that check_leaves sees them
            readings = Readings(self.model, self._read, source)
            try:
                yield
            finally:
                readings.undo()
                gathering.present.drop()
                self._again.drop()


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


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Keep FSDP2 from gathering and freeing meanwhile."""
    states = {id(state) for state in states_of(model)}
    with ExitStack() as stack:
        for module in modules_of(model):
            both: tuple[dict[int, Any], ...] = (module._forward_pre_hooks, module._forward_hooks)
            for hooks in both:
                if any(_is_of(hook, states) for hook in hooks.values()):
                    stack.callback(_put_back, hooks, dict(hooks))
                    for key in [key for key, hook in hooks.items() if _is_of(hook, states)]:
                        del hooks[key]
        yield


def _is_of(hook: Any, states: set[int]) -> bool:
    bound = inspect.unwrap(hook, stop=lambda function: hasattr(function, "__self__"))
    return id(getattr(bound, "__self__", None)) in states


def _put_back(hooks: dict[int, Any], found: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(found)


class _Kept(NamedTuple):
    """What autograd keeps in the place of something gathered: where it comes from, and which view of it it was."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Own(NamedTuple):
    """Any other tensor that autograd keeps, with the version it must still have."""

    tensor: Tensor
    version: int


class _Last:
    """What was gathered last, which is asked for again soon: all parameters of one unit."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget it."""
        self._key: Any = None
        self._found: dict[str, Tensor] = {}

    def get(self, key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what was made for a key, or make it, with nothing else held meanwhile."""
        if self._key != key:
            self.drop()
            self._found, self._key = make(), key
        return self._found


@dataclass(eq=False)
class _Gathering:
    """Gathers what modules read, unit by unit as FSDP2 does, and remembers which memory holds what was gathered.

    The parameters of a unit are gathered in one exchange, and let go of when one of another unit is read.
    """

    shares: Mapping[str, Share]
    values: Mapping[str, Tensor]
    units: Mapping[str, Any]
    wider: torch.dtype | None
    again: _Last

    def __post_init__(self) -> None:
        # A weak reference keeps the address of a storage from being given to another one.
        self._noted: dict[int, tuple[StorageWeakRef, str]] = {}
        self.present = _Last()
        self._groups: dict[Any, list[str]] = {}
        for name in self.values:
            self._groups.setdefault(self._group_of(name), []).append(name)

    def read(self, name: str) -> Tensor:
        """Return the whole of a parameter, as a function of the ranks' shares."""
        group = self._group_of(name)
        # What is read where no gradients are recorded is a constant.
        return self.present.get((group, torch.is_grad_enabled()), partial(self._read, group))[name]

    def _group_of(self, name: str) -> Any:
        value = self.values[name]
        return self.units[name], value.dtype, value.requires_grad

    def _read(self, group: Any) -> dict[str, Tensor]:
        names = self._groups[group]
        wholes = _Gather.apply([self.shares[name] for name in names], *[self.values[name] for name in names])
        found = {name: self._widened(whole) for name, whole in zip(names, wholes, strict=True)}
        self._noted = {key: noted for key, noted in self._noted.items() if not noted[0].expired()}
        for name, whole in found.items():
            storage = whole.untyped_storage()
            self._noted[storage._cdata] = StorageWeakRef(storage), name
        return found

    def _widened(self, whole: Tensor) -> Tensor:
        narrow = self.wider is not None and whole.is_floating_point() and whole.itemsize < self.wider.itemsize
        return whole.to(self.wider) if narrow else whole

    def saving(self) -> Any:
        """Return a block in which autograd keeps shares in the place of what was gathered."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Kept | _Own:
        found = self._noted.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        if found is None or tensor._version:
            # Autograd leaves it to us to notice what is written to before it is used.
            return _Own(tensor.detach(), tensor._version)
        return _Kept(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: _Kept | _Own) -> Tensor:
        if isinstance(kept, _Kept):
            group = self._group_of(kept.name)
            self.present.drop()  # the forward pass is over
            with torch.no_grad():
                whole = self.again.get((self, group), partial(self._gathered_again, group))[kept.name]
                return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        return kept.tensor

    def _gathered_again(self, group: Any) -> dict[str, Tensor]:
        names = self._groups[group]
        wholes = gathered([self.shares[name] for name in names], [self.values[name].detach() for name in names])
        return {name: self._widened(whole) for name, whole in zip(names, wholes, strict=True)}


class _Gather(torch.autograd.Function):
    """The whole of tensors that ranks share out."""

    is_differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, shares: list[Share], *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.shares, ctx.like = shares, [piece.shape for piece in pieces]
        wholes = gathered(shares, [piece.detach() for piece in pieces])
        # One rank alone gathers nothing: what is read is still to have memory of its own, by which it is known again.
        return tuple(wholes if shares[0].ranks.several else [whole.clone() for whole in wholes])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *_Scatter.apply(ctx.shares, ctx.like, *gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        given = [t for t in tangents if t is not None]
        filled = [given[0].new_zeros(shape) if t is None else t for t, shape in zip(tangents, ctx.like, strict=True)]
        return _Gather.forward(ctx, ctx.shares, *filled)


class _Scatter(torch.autograd.Function):
    """What a rank holds of sums over ranks."""

    is_differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, shares: list[Share], like: list[torch.Size], *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.shares, ctx.like = shares, like
        # Half precision is added up in single, as it is over batches.
        wide = [w.detach().to(torch.float32 if w.itemsize < 4 else w.dtype) for w in wholes]
        parts = zip(scattered(shares, wide), wholes, like, strict=True)
        return tuple(part.to(whole.dtype).view(shape).clone() for part, whole, shape in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *_Gather.apply(ctx.shares, *gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _Scatter.forward(ctx, ctx.shares, ctx.like, *tangents)
