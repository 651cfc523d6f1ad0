"""Tokenised rows as data sets hold them: a field that could decide a loss is used, passed on, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.encoded import IGNORED

__all__ = ["Row", "counted_labels", "is_input", "refuse_weights", "sequence_of", "tensor_inputs", "tokenised"]

# 1 where a token counts, as TRL and chat templates write it; the others are labelled with -100.
_COUNTED = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
_PER_TOKEN = ("attention_mask", "labels", "token_type_ids", "position_ids", *_COUNTED)
# They would scale a loss, and no task does that.
_WEIGHTS = tuple(f"{kind}weight{s}" for kind in ("", "loss_", "sample_", "token_", "example_") for s in ("", "s"))
# What tokenizers write about a text beside the model's inputs.
_ABOUT_THE_TEXT = ("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "num_truncated_tokens")
# Inputs of one whole example, also where a data set holds them as nested lists.
_WHOLE = (
    "pixel_values", "pixel_mask", "image_sizes", "image_grid_thw", "input_features", "input_values", "inputs_embeds",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The fields of a tokenised row: those with one entry per token, and those that are whole."""

    sequences: dict[str, np.ndarray]
    values: dict[str, Tensor]


def tokenised(example: Mapping[str, Any], limit: int | None, own: Sequence[str] = ()) -> Row:
    """Read a tokenised row: its padding at either end removed, then cut on the right to ``limit``.

    A list of numbers as long as ``input_ids`` is a sequence, any other array a value. Both go on to the model, which
    takes them or refuses them by name. All else is a fact about the row. ``own`` names what the task reads itself.

    Raises:
        InputError: no token is left, lengths differ, several sequences, weights, or a mask of more than 0 and 1.
    """
    refuse_weights(example)
    skipped = ("input_ids", *_ABOUT_THE_TEXT, *own)
    ids = sequence_of(example["input_ids"], "input_ids")
    of_one = len(example["input_ids"]) != len(ids)  # as tokenizers and processors return tensors: [1, …]
    sequences, values = {"input_ids": ids, "attention_mask": np.ones_like(ids)}, {}
    for name, value in example.items():
        array = None if value is None or name in skipped else _numbers(value, of_one)
        if array is None:
            continue
        if name in _PER_TOKEN:
            sequences[name] = sequence_of(value, name)
        elif len(array) == len(ids) and name not in _WHOLE:
            sequences[name] = np.asarray(array)
        elif name in _WHOLE or hasattr(value, "shape"):
            values[name] = torch.as_tensor(array, device="cpu")
    return Row({name: entries[_shown(sequences, limit)] for name, entries in sequences.items()}, values)


def counted_labels(sequences: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return sequences with labels, −100 where a mask of counted tokens has a 0; those masks are gone then.

    Raises:
        InputError: a mask of more than 0 and 1, or one that leaves no token to count.
    """
    labels = sequences.get("labels", sequences["input_ids"])
    for name in _COUNTED:
        if name in sequences:
            labels = np.where(_binary(sequences[name], name) == 1, labels, np.int32(IGNORED))
    return {**{name: entries for name, entries in sequences.items() if name not in _COUNTED}, "labels": labels}


def tensor_inputs(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the fields that can be inputs of a model, as tensors: arrays, and lists of numbers."""
    arrays = {name: _numbers(value, of_one=False) for name, value in fields.items()}
    return {name: torch.as_tensor(array, device="cpu") for name, array in arrays.items() if array is not None}


def is_input(name: str, value: Any, tokens: int | None) -> bool:
    """Whether a field is, or may be, an input of a model rather than a fact about a row of so many tokens."""
    known = ("input_ids", "decoder_input_ids", "decoder_attention_mask", *_PER_TOKEN, *_ABOUT_THE_TEXT, *_WHOLE)
    return name in known or (isinstance(value, list | tuple) and len(value) == tokens and not isinstance(value[0], str))


def refuse_weights(example: Any, *, text: bool = False) -> None:
    """Refuse a row that says how much it, or a token of it, counts; the ``weight`` of a text may be what it is about.

    Raises:
        InputError: it does.
    """
    for name in _WEIGHTS if isinstance(example, Mapping) else ():
        if example.get(name) is not None and not (text and name in ("weight", "weights")):
            raise InputError(
                f"a row with {name!r}, which no task applies",
                "rows that count alike",
                "Write the loss as a function (model, batch) → losses [b] that multiplies by it, or rename a mere fact",
            )


def sequence_of(values: Any, name: str) -> np.ndarray:
    """Return the whole numbers of a tensor, array or list that holds one sequence.

    Raises:
        InputError: several sequences, or other numbers.
    """
    array = np.asarray(values)
    array = array[0] if array.ndim == 2 and len(array) == 1 else array
    if array.ndim != 1:
        what = "an example of several sequences" if name == "input_ids" else f"{name} of shape {list(array.shape)}"
        raise InputError(what, "one sequence an example, and one entry a token", "Pass its rows one by one")
    if array.size and (array.dtype.kind not in "iubf" or not (abs(array) < 2**31).all() or (array % 1).any()):
        raise InputError(f"{name} with entries of another kind", "whole numbers", "Tokenise the example again")
    return array.astype(np.int32)


def _numbers(value: Any, of_one: bool) -> Tensor | np.ndarray | None:
    """Return a value as an array of numbers, without a leading dim of one; None where it is none."""
    array: Any
    if isinstance(value, list | tuple):
        try:
            array = np.asarray(value)
        except ValueError:  # ragged
            return None
        array = array.astype(np.float32) if array.dtype == np.float64 else array
    elif isinstance(value, Tensor | np.ndarray):
        array = value
    else:
        return None
    if array.ndim == 0 or (isinstance(array, np.ndarray) and array.dtype.kind not in "iubf"):
        return None
    numbers: Tensor | np.ndarray = array[0] if of_one and array.ndim > 1 and len(array) == 1 else array
    return numbers


def _shown(sequences: Mapping[str, np.ndarray], limit: int | None) -> slice:
    """Return which tokens stay: from the first to the last that attention_mask shows."""
    count = len(sequences["input_ids"])
    for name, entries in sequences.items():
        if len(entries) != count:
            raise InputError(
                f"{name} of {len(entries)} entries beside input_ids of {count}",
                "one entry a token in each",
                "Tokenise the example again, or leave the field out",
            )
    places = _binary(sequences["attention_mask"], "attention_mask").nonzero()[0]
    first, last = int(places[0]), int(places[-1]) + 1
    return slice(first, last if limit is None else min(last, first + limit))


def _binary(mask: np.ndarray, name: str) -> np.ndarray:
    if not np.isin(mask, (0, 1)).all():
        raise InputError(f"{name} of {sorted(set(mask.tolist()))[:5]}", "0 and 1 only", "Drop or convert the field")
    if not mask.any():
        raise InputError(f"an example without a token that {name} shows", "at least one", "Drop it")
    return mask
