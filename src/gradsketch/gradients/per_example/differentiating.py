"""What every work with per-example gradients asks of a model, and puts back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from gradsketch.as_found import Gradients, Trainability, Written, buffers_aside, uncompiled
from gradsketch.errors import InputError
from gradsketch.fsdp import resting
from gradsketch.gradients.gathering import require_closed
from gradsketch.gradients.per_example.refusals import coupled, reentrant
from gradsketch.stand_ins import ALONE, read_instead
from gradsketch.walks import modules_of

__all__ = ["differentiating"]


@contextmanager
def differentiating(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Make exactly the chosen parameters require grad, run every submodule uncompiled, and put all back at the end.

    Raises:
        InputError: inside torch.func, a BatchNorm in training mode, a chosen parameter that a Subspace stands in for,
            or a model that checkpoints activations in a way that ``torch.autograd.grad`` cannot go through.
    """
    with ALONE, resting(model):
        require_closed(model, "per-example gradients")
        _refuse_transforms()
        _refuse_coupled(model)
        _refuse_stand_ins(model, tensors)
        with (
            torch.inference_mode(False),
            Trainability(model, tensors.values()) as trainability,
            Gradients(model),
            Written(model),
            buffers_aside(model),
            uncompiled(model),
            torch.enable_grad(),
            _faults_named(),
        ):
            trainability.only(tensors.values())
            yield


def _refuse_transforms() -> None:
    if peek_interpreter_stack() is not None:
        raise InputError(
            "a call inside torch.vmap or another transform of torch.func",
            "a call outside, because torch.func can neither map nor differentiate a backward pass of the model",
            "Sketch the whole batch in one call, which returns one row an example; for derivatives take gs.hessian",
        )


def _refuse_coupled(model: nn.Module) -> None:
    for module in modules_of(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise coupled("a BatchNorm in training mode")
        if getattr(module, "scale_grad_by_freq", False):
            raise coupled(
                f"a {type(module).__name__} with scale_grad_by_freq=True, which counts tokens of the whole batch",
                "Set its scale_grad_by_freq = False",
            )


def _refuse_stand_ins(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    chosen = {id(tensor) for tensor in tensors.values()}
    unread = [reading.name for reading in read_instead(model).values() if id(reading.parameter) in chosen]
    if unread:
        raise InputError(
            f"{unread[0]!r} of a {type(model).__name__} that is open in a Subspace, which reads other values there",
            "gradients of parameters that the model reads",
            "Call merge() or close() first, or ask for gradients in w: pass the Subspace itself and its own w",
        )


@contextmanager
def _faults_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise InputError(
                "a model that keeps a part of its graph from one forward pass to the next",
                "a graph that each forward pass makes anew",
                "Call model.train() and switch dropout off if it caches in eval mode, or drop the cache between calls",
            ) from error
        if "use_reentrant=True" not in str(error):
            raise
        raise reentrant() from error
