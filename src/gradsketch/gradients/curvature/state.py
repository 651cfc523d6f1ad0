"""What a kept graph was made from, compared by content.

Version counters and addresses are not enough: fused optimisers, the default of a Trainer, raise no counter.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsketch.fsdp import own_share
from gradsketch.gradients.data import tensors_of

__all__ = ["content_of", "state_of", "sum_of_bits"]

# Modules hold many dicts without an entry, of hooks most of all.
_DICTS = (dict, OrderedDict, set)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Containers longer than this are vocabularies rather than settings, and known by their length alone.
_LONG = 1000
# How deep plain objects are looked into: a task's options, a model's configuration, an adapter's scales.
_DEPTH = 4
# A prime, so that rows and columns of weights do not fall on the same place of a sum.
_WIDTH = 1021


def state_of(*roots: Any) -> tuple[Any, ...]:
    """Return what shows whether models, tasks and all that they read still are as they were.

    Read are all tensors, by sums of their bits (one pass over memory, 1 % of a product), and every plain Python value
    that modules, tasks and loss functions hold, because forward passes read them: a temperature, the scale of an
    adapter or whether it is disabled.
    """
    look = _Look()
    structure = [look.at(root, _DEPTH) for root in roots]
    return structure, [tensor.data_ptr() for tensor in map(_plain, look.tensors)], _sums(look.tensors), _autocast()


def content_of(batch: Any) -> tuple[Any, ...]:
    """Return what two batches share only if their tensors are equal, wherever they lie in memory."""
    tensors = list(tensors_of(batch))
    return [(tensor.shape, tensor.dtype) for tensor in tensors], _sums(tensors)


def _sums(tensors: Iterable[Tensor]) -> list[int]:
    sums = [_sum_of_bits(tensor) for tensor in tensors]
    # Asked for together: a GPU would be waited for at each.
    devices = {s.device for s in sums}
    numbers = {d: iter(torch.stack([s for s in sums if s.device == d]).cpu().tolist()) for d in devices}
    return [next(numbers[s.device]) for s in sums]


def sum_of_bits(tensor: Tensor) -> int:
    """Return a number that other tensors hardly ever have."""
    return int(_sum_of_bits(tensor))


def _autocast() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


class _Look:
    """Walks modules, containers, functions and plain objects, each once, and collects their tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: set[int] = set()

    def at(self, value: Any, depth: int) -> Any:
        """Return something that compares equal where the value does."""
        if isinstance(value, _PLAIN):
            return value
        key = id(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return "tensor"
        if key in self._seen or depth < 0 or _is_of_ranks(value):
            return key
        if isinstance(value, Mapping | list | tuple | set | frozenset | deque):
            return self._container(value, depth)
        if isinstance(value, np.ndarray):
            return value.tobytes() if value.nbytes < 1 << 20 else key
        self._seen.add(key)
        return key, self._inside(value, depth)

    def _container(self, value: Any, depth: int) -> Any:
        if len(value) > _LONG:
            return len(value)
        if isinstance(value, Mapping):
            return [key if isinstance(key, str) else id(key) for key in value], self._all(value.values(), depth)
        return self._all(value, depth)

    def _all(self, values: Iterable[Any], depth: int) -> list[Any]:
        # Most are plain values or empty, and a module holds dozens: they are told apart here, without a call for each.
        return [
            value if isinstance(value, _PLAIN) else [] if type(value) in _DICTS and not value else self.at(value, depth)
            for value in values
        ]

    def _inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            return self._all(vars(value).values(), _DEPTH)
        if isinstance(value, MethodType):
            return self._all((value.__self__, value.__func__), depth)
        if isinstance(value, FunctionType):
            return self._all(_read_by(value), depth - 1)
        if isinstance(value, type):
            return None
        return self._all(getattr(value, "__dict__", {}).values(), depth - 1)


def _is_of_ranks(value: Any) -> bool:
    """Whether an object is part of how ranks work together, which changes from pass to pass and decides no number."""
    return type(value).__module__.startswith("torch.distributed") and not isinstance(value, nn.Module)


def _read_by(function: FunctionType) -> list[Any]:
    """Return what a function reads besides its arguments: defaults, closed-over values and global plain values."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    kept = [value for value in named if isinstance(value, (*_PLAIN, Tensor, nn.Module, dict, list))]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *kept]


def _filled(cell: Any) -> bool:
    try:
        return bool(cell.cell_contents is not None)
    except ValueError:  # a variable that has no value yet
        return False


def _plain(tensor: Tensor) -> Tensor:
    tensor = own_share(tensor)
    return tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()


@torch.no_grad()
def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return a sum of 64-bit words, each weighted by its place in a row of fixed width."""
    flat = _plain(tensor).contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8
    words, weights = flat[: whole * 8].view(torch.int64), _weights(flat.device)
    rows = whole // _WIDTH
    total = _dot(words[rows * _WIDTH :], weights)
    if rows:
        total = total + _dot(words[: rows * _WIDTH].view(rows, _WIDTH).sum(0), weights)
    return total if whole * 8 == len(flat) else total * 3 + _dot(flat[whole * 8 :].long(), weights)


def _dot(words: Tensor, weights: Tensor) -> Tensor:
    weights = weights[: len(words)]
    return torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum()


@cache
def _weights(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _WIDTH + 1, 2, device=device)
