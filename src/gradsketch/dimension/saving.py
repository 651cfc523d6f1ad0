"""A Subspace on disk: its w, how its sketch is made, and proof of what they belong to; not the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsketch.durable import read_record, read_tensors, require_same, write_record, write_tensors
from gradsketch.errors import InputError
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
    return torch.tensor(list(json.dumps(fingerprints).encode()), dtype=torch.uint8)


def keep_state_small(subspace: Subspace) -> None:
    """Make the state dict hold no more of the model than the buffers that training changed, and check it on loading."""
    subspace.register_state_dict_post_hook(_leave_base_out)
    subspace.register_load_state_dict_pre_hook(_check_fingerprint)
    subspace.register_load_state_dict_post_hook(_expect_no_base)


def _leave_base_out(subspace: Subspace, state: dict[str, Any], prefix: str, _: Any) -> None:
    base = f"{prefix}model."
    kept = {base + name for name in subspace.changed_buffers}
    for key in [key for key in state if key.startswith(base) and key not in kept]:
        del state[key]


def _check_fingerprint(subspace: Subspace, state: dict[str, Any], prefix: str, *_: Any) -> None:
    subspace._prefix = f"{prefix}model."
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
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(subspace._prefix)]
