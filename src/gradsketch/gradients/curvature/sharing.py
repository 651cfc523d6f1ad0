"""The parameters of a model that FSDP2 shares out among ranks, as leaves that can be differentiated twice.

FSDP2's own backward pass frees and reduces what it gathered, and cannot be differentiated again. So for as long as a
block lasts its hooks stand aside, and a module that reads a parameter gets what a function of autograd gathers from the
ranks' shares. The derivative of gathering is to add up the ranks' gradients and to hand each its share; the derivative
of that is gathering. Autograd would keep what was gathered for its backward passes. It is told to keep the share
instead, and gathers again where it needs the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradsketch.as_found import Trainability
from gradsketch.errors import InputError
from gradsketch.fsdp import is_shard, is_sharded, states_of
from gradsketch.gradients.curvature.graph import nodes_of
from gradsketch.gradients.parameters import Parameters
from gradsketch.lockstep import Lockstep
from gradsketch.space import Share, Space
from gradsketch.stand_ins import Readings, Source
from gradsketch.walks import modules_of

__all__ = ["Sharing", "sharing_of"]

_WANTED = "parameters that fully_shard(model) shares out by their rows over one mesh dim"


def sharing_of(model: nn.Module, parameters: Parameters) -> Sharing | None:
    """Return how ranks share out the model's parameters, or None of a model in one piece."""
    return Sharing(model, parameters) if is_sharded(model) else None


class Sharing:
    """Which rank holds what of the parameters, and how modules read the whole of them.

    Raises:
        InputError: another kind of sharing out than by rows over one mesh, or with casts or offloading.
    """

    def __init__(self, model: nn.Module, parameters: Parameters) -> None:
        self.model = model
        named = dict(model.named_parameters())
        _check(model, named)
        meshes = [tensor.device_mesh for tensor in named.values() if is_shard(tensor)]  # type: ignore[attr-defined]
        self.ranks = Lockstep(meshes[0].get_group(), meshes[0].device_type)
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
        self.space = Space(parameters.n, [self._shares[name] for name in self.names], self.ranks)

    @property
    def values(self) -> list[Tensor]:
        """What this rank holds of the selected parameters."""
        return [self._own[name] for name in self.names]

    def _share_of(self, name: str, tensor: Any) -> Tensor:
        share = self._shares[name]
        if not is_shard(tensor):
            return share.cut(tensor.detach().view(-1))
        local: Tensor = tensor.to_local().detach()
        if local.numel() != share.size or local.device.type != tensor.device_mesh.device_type:
            raise InputError(f"{name!r}, of which this rank holds {list(local.shape)}", _WANTED, _FIX)
        return local

    def check_equal(self) -> None:
        """Refuse parameters that every rank holds whole and that are not the same on all.

        Raises:
            InputError: one is not.
        """
        for name, tensor in self._read.items():
            if not is_shard(tensor):
                whole = self._shares[name].gathered(self._own[name])
                if not self.ranks.all(torch.equal(whole, tensor.detach())):
                    raise InputError(
                        f"{name!r}, which fully_shard did not take and which has other values on each rank",
                        "one model",
                        "Call fully_shard(model) on the whole model, or load the same weights on every rank",
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
        gathering = _Gathering(self._shares, self._own | dict(zip(self.names, chosen, strict=True)), wider)
        source = Source(self.model, gathering.read, gathering.read, lambda: None)
        with _without_hooks(self.model), Trainability(self.model) as found, gathering.saving():
            found.only([self._read[name] for name in self.names])  # so that check_leaves sees them
            readings = Readings(self.model, self._read, source)
            try:
                yield
            finally:
                readings.undo()


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


@dataclass
class _Gathering:
    """Gathers what modules read, and remembers which memory holds what was gathered."""

    shares: Mapping[str, Share]
    values: Mapping[str, Tensor]
    wider: torch.dtype | None

    def __post_init__(self) -> None:
        # A weak reference keeps the address of a storage from being given to another one.
        self._found: dict[int, tuple[StorageWeakRef, str]] = {}

    def read(self, name: str) -> Tensor:
        """Return the whole of a parameter, as a function of the ranks' shares."""
        whole = self._widened(_Gather.apply(self.values[name], self.shares[name]))
        self._note(whole, name)
        return whole

    def saving(self) -> Any:
        """Return a block in which autograd keeps shares in the place of what was gathered."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _widened(self, whole: Tensor) -> Tensor:
        narrow = self.wider is not None and whole.is_floating_point() and whole.itemsize < self.wider.itemsize
        return whole.to(self.wider) if narrow else whole

    def _note(self, whole: Tensor, name: str) -> None:
        self._found = {key: found for key, found in self._found.items() if not found[0].expired()}
        storage = whole.untyped_storage()
        self._found[storage._cdata] = StorageWeakRef(storage), name

    def _pack(self, tensor: Tensor) -> _Kept | _Own:
        found = self._found.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        if found is None or tensor._version:
            # Autograd leaves it to us to notice what is written to before it is used.
            return _Own(tensor.detach(), tensor._version)
        return _Kept(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: _Kept | _Own) -> Tensor:
        if isinstance(kept, _Kept):
            with torch.no_grad():
                whole = self._widened(self.shares[kept.name].gathered(self.values[kept.name].detach()))
                return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        return kept.tensor


class _Gather(torch.autograd.Function):
    """The whole of a tensor that ranks share out."""

    is_differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, local: Tensor, share: Share) -> Tensor:
        ctx.share, ctx.like = share, local.shape
        whole = share.gathered(local.detach())
        return whole.clone() if whole.data_ptr() == local.data_ptr() else whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Scatter.apply(gradient, ctx.share, ctx.like), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Gather.forward(ctx, tangent, ctx.share)


class _Scatter(torch.autograd.Function):
    """What a rank holds of the sum over ranks."""

    is_differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, whole: Tensor, share: Share, like: torch.Size) -> Tensor:
        ctx.share, ctx.like = share, like
        # Half precision is added up in single, as it is over batches.
        wide = whole.detach().to(torch.float32 if whole.itemsize < 4 else whole.dtype)
        return share.scattered(wide).to(whole.dtype).view(like)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Gather.apply(gradient, ctx.share), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Scatter.forward(ctx, tangent, ctx.share, ctx.like)
