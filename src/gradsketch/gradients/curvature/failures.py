"""Why a curvature product failed, in one sentence that says what to type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradsketch.errors import InputError, NonFiniteError

__all__ = ["WrongDerivativeError", "lacks_double_backward", "non_finite", "reentrant", "translated"]


class WrongDerivativeError(RuntimeError):
    """Differentiating twice gave a product that differences of gradients contradict."""


# What PyTorch says where a backward pass cannot itself be differentiated.
_NO_DOUBLE_BACKWARD = (
    "is not implemented",
    "does not currently support double backward",
    "trying to differentiate twice a function that was marked with @once_differentiable",
    "Expected a proper Tensor but got None",  # native_layer_norm without a weight
)
_NO_FORWARD_MODE = ("Trying to use forward AD with", "You must implement the jvp function", "forward AD is not")
_REENTRANT = "use_reentrant=True"


def lacks_double_backward(error: RuntimeError) -> bool:
    """Whether an error says that an operation has no double backward."""
    return any(phrase in str(error) for phrase in _NO_DOUBLE_BACKWARD)


@contextmanager
def translated(model: nn.Module) -> Iterator[None]:
    """Say what to change where layers are checkpointed in the re-entrant way, or an operation has no forward mode.

    Raises:
        InputError: instead of PyTorch's own error.
    """
    name = type(model).__name__
    try:
        yield
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in _NO_FORWARD_MODE):
            raise InputError(
                f"mode='jvp-of-grad' for {name}, which has an operation without forward-mode derivative"
                f" ({str(error).splitlines()[0][:120]})",
                "operations that all have one",
                "Leave mode out, or type mode='central-difference'",
            ) from error
        if _REENTRANT in str(error):
            raise reentrant(model) from error
        raise


def reentrant(model: nn.Module) -> InputError:
    """Return the error for layers whose backward pass cannot be asked for chosen gradients."""
    return InputError(
        f"{type(model).__name__} with layers that are checkpointed in the re-entrant way",
        "checkpointing whose backward pass can be asked for chosen gradients",
        "Pass use_reentrant=False to checkpoint, or call model.gradient_checkpointing_enable("
        "gradient_checkpointing_kwargs={'use_reentrant': False})",
    )


def non_finite(values: Sequence[Tensor], mode: str) -> NonFiniteError:
    """Return the error for a product that is not finite where all losses are."""
    if any(value.dtype == torch.float16 for value in values) and mode != "central-difference":
        fix = "Load the model in float32 or bfloat16 (--dtype float32), or type mode='central-difference'"
        return NonFiniteError(
            "a second derivative beyond the range of float16, in which the model computes", "finite products", fix
        )
    return NonFiniteError(
        "a curvature product that is not finite, though all losses are",
        "a loss that is twice differentiable at the weights",
        "Look for square roots, powers or norms of what is exactly zero, or load the model in float64",
    )
