"""A pretend accelerator: tensors that say they are on another device, and hold numbers of the CPU.

An operation that mixes them with tensors of the CPU fails, as on a GPU. The host reading a number of the device is
counted, because there it waits for all work that was given out before. ``meta`` serves as the device's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "MixedError", "OnDevice", "PretendDevice", "bare", "moved", "pretend_device"]

DEVICE = torch.device("meta")
# Operations that take tensors of both devices on a GPU too: copies, and indices from the CPU.
BOTH = {"_to_copy", "copy_", "_copy_from", "set_", "index", "index_put_", "_index_put_impl_"}


class MixedError(RuntimeError):
    """A GPU would refuse this."""


class OnDevice(Tensor):
    """A tensor on the pretend device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        out = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        out.inner = inner
        return out

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file holds numbers, wherever they were

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Makes tensors on the device where it is asked for, and counts how often the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if waits_for_device(func, args, kwargs):
            self.waits.append(str(func))
        return run(func, args, kwargs)


def waits_for_device(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the host would wait: for a number, for a shape that depends on numbers, or for a copy to the CPU."""
    if not any(isinstance(t, OnDevice) for t in tree_leaves((args, kwargs))):
        return False
    name = func.overloadpacket.__name__
    if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero"):
        return True
    if name == "index":  # a mask as an index
        return any(isinstance(t, OnDevice) and t.dtype == torch.bool for t in tree_leaves(args[1]))
    to_cpu = name == "_to_copy" and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    return to_cpu or (name == "copy_" and not isinstance(args[0], OnDevice))


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Do an operation on the numbers, and say where its result is."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    others = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim > 0 and t.numel() > 0]
    if ours and others and name not in BOTH:
        raise MixedError(f"{func} of the device's tensor and one of the CPU, shape {tuple(others[0].shape)}")
    asked = kwargs.get("device")
    inner = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    out = func(*tree_map(bare, args), **tree_map(bare, inner))
    if name == "copy_":
        here = isinstance(args[0], OnDevice)
    else:
        here = torch.device(asked).type == DEVICE.type if asked is not None else bool(ours)
    if not here:
        return args[0] if name == "copy_" else out
    out = tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def bare(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def moved(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers on the device, in place; ties stay ties."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                on_device = nn.Parameter(OnDevice(parameter.detach().clone()), parameter.requires_grad)
                module._parameters[name] = seen.setdefault(id(parameter), on_device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer.clone())
    return model


@contextmanager
def pretend_device() -> Iterator[PretendDevice]:
    """Let the device be there, with autocast as on real ones, and its tensors taken for plain ones."""
    autocast = torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch, PretendDevice() as device:
        patch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != (DEVICE.type,) and autocast(*kind))
        patch.setattr("gradsketch.gradients.per_example.refusals._unsupported", lambda *_: [])
        yield device
