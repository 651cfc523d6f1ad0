"""Several checkpoints of one model: put their weights in, one after the other, and take them out again."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from gradsketch.durable import require_undamaged
from gradsketch.errors import InputError
from gradsketch.stand_ins import stand_ins

__all__ = ["Checkpoint", "as_checkpoints", "checked_weights", "weights_of"]

# A state dict, or where to read one: a .safetensors or torch file, or a folder that holds one.
Weights = Mapping[str, Tensor] | str | Path

# Before the names of weights that a compiled model, or one for several devices, saved.
_WRAPPERS = ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of the model at one moment of training, and their share in the sum of scores.

    TracIn (Pruthi et al. 2020, equation 1) sums over checkpoints with the learning rate of each as ``weight``.
    ``weights`` of None stands for the model as it is.
    """

    name: str
    weights: Weights | None
    weight: float


def as_checkpoints(
    checkpoints: Sequence[Weights] | Mapping[str, Weights] | None, weights: Sequence[float] | None
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints to index, each with its weight (by default all the same, adding up to one).

    Raises:
        InputError: no checkpoint, or weights that are not as many finite numbers.
    """
    if checkpoints is None:
        named: dict[str, Weights | None] = {"model": None}
    elif isinstance(checkpoints, Mapping):
        named = dict(checkpoints)
    else:
        named = {_name(c, i): c for i, c in enumerate(checkpoints)}
    if not named or (checkpoints is not None and len(named) != len(checkpoints)):
        raise InputError("no checkpoint, or two of one name", "at least one, each with its own name", "Pass a dict")
    _require_own_tensors(named)
    weights = [1 / len(named)] * len(named) if weights is None else checked_weights(weights, len(named))
    return tuple(Checkpoint(n, c, w) for (n, c), w in zip(named.items(), weights, strict=True))


def checked_weights(weights: Sequence[float], checkpoints: int) -> list[float]:
    """Return the weights of so many checkpoints.

    Raises:
        InputError: they are not as many finite numbers, or all are 0.
    """
    if len(weights) != checkpoints or not all(isinstance(w, Real | Tensor) and math.isfinite(w) for w in weights):
        raise InputError(
            f"{len(weights)} weights {list(weights)} for {checkpoints} checkpoints",
            "one finite number a checkpoint, such as its learning rate",
            "Pass weights=[...] of that length, or leave it out",
        )
    if not any(weights):
        raise InputError(
            f"weights {list(map(float, weights))}, with which every score is 0",
            "one that is not 0",
            "Check the learning rates, or leave weights out to count all checkpoints alike",
        )
    return list(map(float, weights))


def _require_own_tensors(named: Mapping[str, Weights | None]) -> None:
    """Refuse state dicts that share their tensors: training changed them all, and they hold its end several times."""
    seen: dict[tuple[int, ...], str] = {}
    for name, weights in named.items():
        if isinstance(weights, Mapping):
            first = seen.setdefault(tuple(t.data_ptr() for t in weights.values() if isinstance(t, Tensor)), name)
            if first != name:
                raise InputError(
                    f"checkpoints {first!r} and {name!r}, which are the same tensors",
                    "a copy for each, because state_dict() does not copy",
                    "Keep {name: t.clone() for name, t in model.state_dict().items()} at each checkpoint",
                )


@contextmanager
def weights_of(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Put copies of the model's weights and buffers in their place, loaded from a checkpoint, until the block ends.

    The model's own are not written to, so nothing has to be written back, whatever happens. Loading into copies is
    what ``load_state_dict`` does with any model, old names, hooks and ties included.

    Raises:
        InputError: the weights cannot be read or do not fit the model.
    """
    if checkpoint.weights is None:
        yield
        return
    state = _read(checkpoint.weights) if isinstance(checkpoint.weights, str | Path) else checkpoint.weights
    state = _unwrapped(state, model)
    weights: dict[str, Tensor] = {name: deepcopy(parameter) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with stand_ins(model, weights | buffers):
        _load(model, state, checkpoint.name)
        yield


def _unwrapped(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return weights under the model's own names, where all have that of a wrapper before them."""
    own = model.state_dict().keys()
    for wrapper in _WRAPPERS:
        inside = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
        if state.keys().isdisjoint(own) and inside.keys() <= own:
            return inside
    return state


def _name(checkpoint: Weights, number: int) -> str:
    return Path(checkpoint).name if isinstance(checkpoint, str | Path) else f"checkpoint-{number}"


def _load(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    try:
        outcome = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise _unfit(name, str(error)) from error
    # Tied weights are saved once, so a missing name is fine where another name of the same tensor was given.
    given = {id(tensor) for key, tensor in model.named_parameters(remove_duplicate=False) if key in state}
    own = dict(model.named_parameters(remove_duplicate=False))
    missing = [key for key in outcome.missing_keys if key in own and id(own[key]) not in given]
    if missing or outcome.unexpected_keys:
        raise _unfit(name, f"missing {missing[:3]}, unexpected {list(outcome.unexpected_keys)[:3]}")


def _read(path: str | Path) -> dict[str, Tensor]:
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"the checkpoint {path}, which holds no weights",
            "a .safetensors or torch file, or a folder with one, as save_pretrained writes it",
            "Check the path",
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_file(file)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    require_undamaged(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state.get("state_dict", state))
    except ImportError as error:
        raise InputError(f"{path.name} without safetensors", "it", "Run pip install safetensors") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}, a pickle that holds more than tensors: loading it could run any program",
            "a file of tensors by name",
            "If you trust who made it, load it and save its state dict yourself",
        ) from error
    except Exception as error:  # unpickling raises whatever it likes
        raise InputError(f"{path} cannot be read ({error})", "a file of tensors by name", "Save it again") from error


def _unfit(name: str, why: str) -> InputError:
    return InputError(
        f"checkpoint {name!r} does not fit the model: {why[:400]}",
        "the names and shapes of the model's own state dict",
        "Pass checkpoints of this very model",
    )
