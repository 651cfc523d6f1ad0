"""What a Subspace cannot be made of, each refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from gradsketch.errors import InputError
from gradsketch.fsdp import is_shard
from gradsketch.gradients.parameters import Parameters
from gradsketch.sketches.base import Sketch

__all__ = ["check_differentiable_again", "check_held_whole", "check_not_transformed", "device_of"]

# By name, so that nothing of torch.distributed is imported for models that do without it.
_TRAIN_APART = "DistributedDataParallel"
_SHARD = "FullyShardedDataParallel"
_SHARD_2 = "FSDPModule"


def device_of(parameters: Parameters, sketch: Sketch, *, shared: bool = False) -> torch.device:
    """Return the device of parameters that this sketch can move; ``shared`` allows the shards of FSDP2.

    Raises:
        InputError: another n, parameters of whole numbers, of several devices, or sharded.
    """
    if sketch.n != parameters.n:
        raise InputError(
            f"{sketch!r} for {parameters!r}",
            f"a sketch with n={parameters.n}",
            f"Type {type(sketch).__name__}(parameters.n, {sketch.d})",
        )
    for name, tensor in parameters:
        if not tensor.is_floating_point():
            raise InputError(
                f"the parameter {name!r} of {tensor.dtype}, whose numbers are packed",
                "parameters of floating-point numbers",
                f"Leave it out: Parameters(model, exclude={name!r}), or glob all of its kind",
            )
        if is_shard(tensor) and not shared:
            raise _sharded(f"the parameter {name!r}, which is sharded over processes")
    devices = sorted({str(t.device) for _, t in parameters})
    if len(devices) > 1:
        raise InputError(
            f"parameters on {', '.join(devices)}", "parameters on one device", "Move the model with model.to(device)"
        )
    return torch.device(devices[0])


def check_held_whole(model: nn.Module, *, shared: bool = False) -> None:
    """Refuse a model inside which processes train apart, or share out the parameters that a Subspace reads.

    ``shared`` allows that FSDP2 does.

    Raises:
        InputError: it is one.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for module in model.modules():
        kinds = set(_names(module))
        if _TRAIN_APART in kinds:
            raise InputError(
                f"a {_TRAIN_APART} inside a Subspace, whose w every process would train by itself",
                f"a Subspace inside {_TRAIN_APART}",
                f"Wrap the other way round: {_TRAIN_APART}(Subspace(model, ...))",
            )
        if _SHARD in kinds or (_SHARD_2 in kinds and not shared):
            raise _sharded("FSDP, which shares out the parameters that a Subspace reads")


def check_differentiable_again(*, shared: bool) -> None:
    """Refuse a gradient that is itself to be differentiated, where ranks share out the model.

    Raises:
        InputError: they do.
    """
    if shared:
        raise InputError(
            "create_graph=True for a Subspace over a model that FSDP2 shares out",
            "gradients that are not differentiated again",
            "Leave create_graph out; for curvature call merge() or close(), then gs.hessian(model, ...)",
        )


def check_not_transformed(w: Tensor) -> None:
    """Refuse a w, or a gradient, that ``torch.func`` wraps: its transforms cannot enter the map from w to theta.

    Raises:
        InputError: it does.
    """
    if is_functorch_wrapped_tensor(w) or is_legacy_batchedtensor(w):  # the latter by is_grads_batched=True
        raise InputError(
            "a Subspace inside torch.func.grad, vmap, another of its transforms, or is_grads_batched=True",
            "plain autograd, one gradient at a time",
            "Per example type gs.sketch_gradients(subspace, ...); for curvature gs.hessian(subspace, ...)",
        )


def _names(module: nn.Module) -> Iterator[str]:
    return (cls.__name__ for cls in type(module).__mro__)


def _sharded(came: str) -> InputError:
    return InputError(
        came,
        "a model that every process holds whole, or that fully_shard shares out",
        f"Use {_TRAIN_APART}(Subspace(model, ...)), or call fully_shard(model) before you open the Subspace",
    )
