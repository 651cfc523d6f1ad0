"""An example as its task reads it: made once, kept small, and stacked with others into a batch.

A row is data alone, so a build finds what a model does not take before it forms a gradient. It encodes a row when the
row's part has its turn; checking, batching by length and collating use the same row. Where there are several
checkpoints, up to a gigabyte of rows, four bytes a number, is kept for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from gradsketch.errors import InputError

__all__ = ["IGNORED", "Encoded", "encode_all", "encode_one", "integers", "stack"]

# The label of a position that does not count, as in torch and Hugging Face.
IGNORED = -100
# What a sequence is padded with; anything else with zeros.
_FILLS = {"labels": IGNORED}
_TOKENS = ("input_ids", "decoder_input_ids")
# What a sequence that some rows of a batch lack means for them, from the number of their tokens.
_DEFAULTS: Mapping[str, Callable[[int], np.ndarray]] = {
    "attention_mask": lambda count: np.ones(count, np.int32),
    "token_type_ids": lambda count: np.zeros(count, np.int32),
    "position_ids": lambda count: np.arange(count, dtype=np.int32),
}

Field = TypeVar("Field")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded example, which every pass over the data shares, so that no text is tokenised twice.

    Args:
        length: cost in tokens.
        sequences: fields by name with one entry a token along their first dim; a batch pads them.
        values: fields that are whole, such as an image or a class; a batch stacks them as they are.
    """

    length: int
    sequences: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, Tensor | int | float] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory that the fields take."""
        tensors = sum(value.nbytes for value in self.values.values() if isinstance(value, Tensor))
        return tensors + sum(sequence.nbytes for sequence in self.sequences.values())


def encode_one(encode: Callable[[Any], Encoded], example: Any) -> Encoded:
    """Encode an example; what cannot be read is a bad row, whatever a tokenizer or processor raises.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return encode(example)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"an example that cannot be read ({type(error).__name__}: {str(error)[:200]})",
            "an example that the tokenizer or processor takes",
            "Repair or drop it",
        ) from error


def encode_all(encode: Callable[[Any], Encoded], examples: Sequence[Any]) -> list[Encoded]:
    """Encode the examples of a batch, but for those that are encoded already.

    Raises:
        InputError: what ``encode`` raises, with the example's position.
    """
    rows = []
    for position, example in enumerate(examples):
        try:
            rows.append(example if isinstance(example, Encoded) else encode_one(encode, example))
        except InputError as error:
            raise InputError(f"example {position} of the batch: {error.came}", error.wanted, error.fix) from error
    return rows


def integers(values: Sequence[int]) -> np.ndarray:
    """Return a sequence of token ids, masks or labels, four bytes each."""
    return np.asarray(values, dtype=np.int32)


def stack(rows: Sequence[Encoded], tokenizer: Any = None) -> dict[str, Tensor]:
    """Return a batch: sequences padded on the right ``[b, t, …]``, integers as int64, and values ``[b, …]``.

    Raises:
        InputError: a field that only some of the rows have.
    """
    # Padding is masked, so that any token does where the tokenizer has none for it.
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    names = dict.fromkeys(name for row in rows for name in row.sequences)
    if "input_ids" in names:
        names = dict.fromkeys(("input_ids", "attention_mask", *names))
    batch = {n: _padded([_sequence(r, n) for r in rows], pad_id if n in _TOKENS else _FILLS.get(n, 0)) for n in names}
    if "position_ids" in names:  # they start again in the padding, which makes it a document of its own
        lengths = torch.tensor([len(row.sequences["input_ids"]) for row in rows], device="cpu")[:, None]
        places = torch.arange(batch["position_ids"].shape[1], device="cpu")
        batch["position_ids"] = torch.where(places < lengths, batch["position_ids"], places - lengths)
    for name in dict.fromkeys(name for row in rows for name in row.values):
        batch[name] = default_collate([_present(row.values, name) for row in rows])
    return batch


def _sequence(row: Encoded, name: str) -> np.ndarray:
    if name not in row.sequences and name in _DEFAULTS:
        return _DEFAULTS[name](len(row.sequences["input_ids"]))
    return _present(row.sequences, name)


def _present(fields: Mapping[str, Field], name: str) -> Field:
    if name not in fields:
        raise InputError(f"rows of which only some have {name!r}", "the same fields in every row", "Add or drop it")
    return fields[name]


def _padded(rows: Sequence[np.ndarray], fill: int) -> Tensor:
    shape = (len(rows), max(len(row) for row in rows), *rows[0].shape[1:])
    kind = np.int64 if rows[0].dtype.kind in "iub" else rows[0].dtype
    out = np.full(shape, fill, dtype=kind)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)
