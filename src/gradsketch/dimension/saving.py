"""A Subspace on disk: its w, how its sketch is made, and proof of what they belong to; not the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.durable import read_record, read_tensors, require_same, write_record, write_tensors
from gradsketch.errors import InputError
from gradsketch.gradients.parameters import bare
from gradsketch.sketches.recipe import recipe_of

__all__ = ["as_tensor", "keep_state_small", "read", "write"]

_CONFIG, _STATE = "subspace.json", "subspace.pt"
# A ``gradsketch.Subspace``, which stands above this module and saves itself with it.
Subspace = Any


def write(subspace: Subspace, folder: Path) -> None:
    """Write how the sketch is made (subspace.json) and the state dict (subspace.pt)."""
    recipe = recipe_of(subspace.sketch)
    config = {"sketch": recipe, "parameters": subspace.selection.names, "fingerprints": subspace.fingerprints}
    write_tensors(folder / _STATE, subspace.state_dict())
    write_record(folder / _CONFIG, config)


def read(folder: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what ``write`` wrote: the configuration and the state dict.

    Raises:
        InputError: nothing was written there.
        StoreError: a file is damaged.
    """
    if not (folder / _CONFIG).exists():
        raise InputError(f"{folder} without {_CONFIG}", "a folder written by save_pretrained", "Check the path")
    return read_record(folder / _CONFIG), read_tensors(folder / _STATE, device)


def as_tensor(fingerprints: dict[str, str]) -> Tensor:
    """Return fingerprints as bytes in a tensor, which every file format of state dicts can hold."""
    return torch.tensor(list(json.dumps(fingerprints).encode()), dtype=torch.uint8, device="cpu")


def keep_state_small(subspace: Subspace) -> None:
    """Make the state dict hold no more of the model than the buffers that training changed, and check it on loading."""
    subspace.register_state_dict_post_hook(_leave_base_out)
    subspace.register_load_state_dict_pre_hook(_before_loading)
    subspace.register_load_state_dict_post_hook(_expect_no_base)


def _leave_base_out(subspace: Subspace, state: dict[str, Any], prefix: str, _: Any) -> None:
    base, inner = f"{prefix}model.", _prefix_of_bare(subspace.model)
    kept = {base + name for name in subspace.changed_buffers}
    for key in [key for key in state if key.startswith(base)]:
        value = state.pop(key)
        if key in kept:  # named as in the bare model, for it may be loaded on one that is compiled, or is not
            state[base + key.removeprefix(base).removeprefix(inner)] = value


def _prefix_of_bare(model: nn.Module) -> str:
    """Return what stands before the names of the model inside wrappers for compilation: nothing if there are none."""
    inside = bare(model)
    return next(f"{path}." if path else "" for path, module in model.named_modules() if module is inside)


def _before_loading(subspace: Subspace, state: dict[str, Any], prefix: str, *_: Any) -> None:
    subspace._prefix = f"{prefix}model."
    _check_fingerprint(subspace, state, prefix)
    subspace._pause()
    base, inner = subspace._prefix, _prefix_of_bare(subspace.model)
    for key in [key for key in state if key.startswith(base) and inner]:
        state[base + inner + key.removeprefix(base)] = state.pop(key)


def _check_fingerprint(subspace: Subspace, state: dict[str, Any], prefix: str) -> None:
    saved = state.get(f"{prefix}_extra_state")
    if saved is None:
        return
    require_same(
        subspace.fingerprints,
        json.loads(bytes(saved.tolist()).decode()),
        "the state dict",
        fix="Load it with the same base weights, parameters, sketch kind, d and seed",
    )


def _expect_no_base(subspace: Subspace, keys: Any) -> None:
    subspace._resume()
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(subspace._prefix)]
