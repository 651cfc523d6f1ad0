"""A program is used on a device once it has been right there.

Compilers, drivers and devices that nobody here has seen decide what a kernel computes. So each one, told apart by all
that decides which of its ways is taken (device, type, alignment, layout), does a small piece of work first, which is
held against the definition. If it fails or differs, a warning says so, and torch's own operations do the work from then
on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from gradsketch.errors import GradsketchWarning

__all__ = ["can_run_on", "is_plain", "relative_error", "switched_off", "trusted"]

# Rounding gives 3e-7; a wrong sign, a lost block or a race far more.
_TOLERANCE = 1e-5
_DEVICES = ("cuda",)
_TENSORS: tuple[type, ...] = (Tensor, torch.nn.Parameter)
_verdicts: dict[Hashable, bool] = {}
_off = False


@contextmanager
def switched_off() -> Iterator[None]:
    """Let torch's own operations do the work inside: to compare with the kernels."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def is_plain(x: Tensor) -> bool:
    """Whether a kernel may read a tensor's memory: outside compilers and ``torch.func``, with no derivative wanted."""
    if _off or type(x) not in _TENSORS or torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x):
        return False
    backward = x.requires_grad and torch.is_grad_enabled()
    return not backward and forward_ad.unpack_dual(x).tangent is None


def can_run_on(x: Tensor) -> bool:
    """Whether kernels can be launched on a tensor: a plain one on a GPU, and Triton is there."""
    return x.device.type in _DEVICES and is_plain(x) and _triton_is_there()


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None


def trusted(name: str, like: Tensor, variant: Hashable, trial: Callable[[], float]) -> bool:
    """Whether a program may be used; ``trial`` returns the relative error of a small piece of work by this variant."""
    key = name, like.device, like.dtype, variant
    if key not in _verdicts:
        _verdicts[key] = _passes(name, like, trial)
    return _verdicts[key]


def relative_error(came: Tensor, exact: Tensor) -> float:
    """Return a trial's error; infinite where a number is not finite, which no comparison would find.

    What should be zeros, as the prefix of a sketch may, is compared with the least number above.
    """
    exact = exact.double()
    error = float((came.cpu().double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def _passes(name: str, like: Tensor, trial: Callable[[], float]) -> bool:
    try:
        error = trial()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as failure:  # whatever a compiler, a driver or a device may raise
        came = f"failed with {type(failure).__name__} ({str(failure).strip().partition(chr(10))[0]})"
    else:
        if error <= _TOLERANCE:
            return True
        came = f"differs from torch by {error:.1e}"
    warnings.warn(
        f"The kernel {name} for {like.dtype} on {like.device} {came}. torch's own operations do its work, which is "
        "slower. Please report this with the versions of torch and of Triton or the compiler, and the device's name.",
        GradsketchWarning,
        stacklevel=2,
    )
    return False
