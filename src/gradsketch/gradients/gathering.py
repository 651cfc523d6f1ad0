"""What modules read of a model that ranks share out: gathered unit by unit, by a function that can be differentiated.

FSDP2's own backward pass frees and reduces what it gathered, and cannot be differentiated again. So its hooks stand
aside, and a module that reads a parameter gets what a function of autograd gathers from the ranks' shares. The
derivative of gathering is to add up the ranks' gradients and to hand each its share; the derivative of that is
gathering. Autograd would keep what was gathered for its backward passes. It is told to keep the share instead, and
gathers again where it needs the whole.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradsketch.errors import InputError
from gradsketch.fsdp import is_sharded, states_of
from gradsketch.space import Share, gathered, scattered
from gradsketch.stand_ins import is_open
from gradsketch.walks import modules_of

__all__ = ["Gathering", "Last", "Memory", "hooks_aside", "require_closed"]


def require_closed(model: nn.Module, what: str) -> None:
    """Refuse a model that ranks share out and that is open in a Subspace, which gathers in a way of its own.

    Raises:
        InputError: it is one.
    """
    if is_sharded(model) and is_open(model):
        raise InputError(
            f"{what} of a model that FSDP2 shares out and that is open in a Subspace",
            "a model at rest",
            "Call merge() or close() on the Subspace first",
        )


@contextmanager
def hooks_aside(model: nn.Module) -> Iterator[None]:
    """Keep FSDP2 from gathering and freeing meanwhile."""
    states = {id(state) for state in states_of(model)}
    with ExitStack() as stack:
        for module in modules_of(model):
            both: tuple[dict[int, Any], ...] = (module._forward_pre_hooks, module._forward_hooks)
            for hooks in both:
                if any(_is_of(hook, states) for hook in hooks.values()):
                    stack.callback(_put_back, hooks, dict(hooks), states)
                    for key in [key for key, hook in hooks.items() if _is_of(hook, states)]:
                        del hooks[key]
        yield


def _is_of(hook: Any, states: set[int]) -> bool:
    bound = inspect.unwrap(hook, stop=lambda function: hasattr(function, "__self__"))
    return id(getattr(bound, "__self__", None)) in states


def _put_back(hooks: dict[int, Any], found: dict[int, Any], states: set[int]) -> None:
    """Put what stood aside where it was, among hooks of others, some of which may have come or gone meanwhile."""
    now = dict(hooks)
    hooks.clear()
    hooks.update({key: hook for key, hook in found.items() if key in now or _is_of(hook, states)})
    hooks.update(now)


class _Kept(NamedTuple):
    """What autograd keeps in the place of something gathered: where it comes from, and which view of it it was."""

    gathering: Gathering
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Own(NamedTuple):
    """Any other tensor that autograd keeps, with the version it must still have."""

    tensor: Tensor
    version: int


class Last:
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


class Memory:
    """Which memory holds what was gathered, so that autograd need not keep it."""

    def __init__(self) -> None:
        self.again = Last()
        # A weak reference keeps the address of a storage from being given to another one.
        self._noted: dict[int, tuple[StorageWeakRef, weakref.ref[Gathering], str]] = {}

    def note(self, gathering: Gathering, wholes: Mapping[str, Tensor]) -> None:
        """Remember what was gathered."""
        self._noted = {key: noted for key, noted in self._noted.items() if not noted[0].expired()}
        for name, whole in wholes.items():
            storage = whole.untyped_storage()
            self._noted[storage._cdata] = StorageWeakRef(storage), weakref.ref(gathering), name

    def saving(self) -> Any:
        """Return a block in which autograd keeps shares in the place of what was gathered."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpacked)

    def _pack(self, tensor: Tensor) -> _Kept | _Own:
        _, made_by, name = self._noted.get(tensor.untyped_storage()._cdata, _NOWHERE) if _is_dense(tensor) else _NOWHERE
        gathering = made_by()
        if gathering is None or tensor._version:
            # Autograd leaves it to us to notice what is written to before it is used.
            return _Own(tensor.detach(), tensor._version)
        return _Kept(gathering, name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


_NOWHERE: tuple[Any, Callable[[], None], str] = (None, lambda: None, "")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def _unpacked(kept: _Kept | _Own) -> Tensor:
    if isinstance(kept, _Kept):
        whole = kept.gathering.again(kept.name)
        return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)
    if kept.tensor._version != kept.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation"
        )
    return kept.tensor


@dataclass(eq=False)
class Gathering:
    """Gathers what modules read, unit by unit as FSDP2 does.

    The parameters of a unit are gathered in one exchange, and let go of when one of another unit is read. ``tap`` makes
    of what this rank holds of a tensor what is gathered, at each gathering.
    """

    shares: Mapping[str, Share]
    values: Mapping[str, Tensor]
    units: Mapping[str, Any]
    memory: Memory
    wider: torch.dtype | None = None
    tap: Callable[[str, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.present = Last()
        self._groups: dict[Any, list[str]] = {}
        for name in self.values:
            self._groups.setdefault(self._group_of(name), []).append(name)

    def read(self, name: str) -> Tensor:
        """Return the whole of a parameter, as a function of the ranks' shares."""
        group = self._group_of(name)
        # What is read where no gradients are recorded is a constant.
        return self.present.get((group, torch.is_grad_enabled()), partial(self._read, group))[name]

    @torch.no_grad()
    def again(self, name: str) -> Tensor:
        """Return what was read, gathered again unless it was the last, for a backward pass."""
        group = self._group_of(name)
        self.present.drop()  # the forward pass is over
        return self.memory.again.get((self, group), partial(self._read_again, group))[name]

    def _group_of(self, name: str) -> Any:
        value = self.values[name]
        return self.units[name], value.dtype, value.requires_grad

    def _read(self, group: Any) -> dict[str, Tensor]:
        names = self._groups[group]
        pieces = [self.values[name] if self.tap is None else self.tap(name, self.values[name]) for name in names]
        wholes = _Gather.apply([self.shares[name] for name in names], *pieces)
        found = {name: self._widened(whole) for name, whole in zip(names, wholes, strict=True)}
        self.memory.note(self, found)
        return found

    def _read_again(self, group: Any) -> dict[str, Tensor]:
        names = self._groups[group]
        wholes = gathered([self.shares[name] for name in names], [self.values[name].detach() for name in names])
        return {name: self._widened(whole) for name, whole in zip(names, wholes, strict=True)}

    def _widened(self, whole: Tensor) -> Tensor:
        narrow = self.wider is not None and whole.is_floating_point() and whole.itemsize < self.wider.itemsize
        return whole.to(self.wider) if narrow else whole


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
