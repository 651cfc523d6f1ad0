"""What every task over tokens shares: tokenising, and cross-entropy per example."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.encoded import integers
from gradsketch.gradients.tasks.logits import IGNORED, check_ids
from gradsketch.linear_map import widened

__all__ = [
    "Reduction",
    "check_reduction",
    "encode",
    "limit_of",
    "sequence_losses",
    "tokenised",
    "unknown_example",
    "vocabulary",
]

Reduction = Literal["sum", "mean"]


def sequence_losses(
    logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"], reduction: Reduction
) -> Float[Tensor, " b"]:
    """Return each sequence's cross-entropy, summed or averaged over the tokens that count (0 where none does).

    ``logits[:, t]`` predicts ``labels[:, t]``.
    """
    check_ids(labels, logits.shape[-1], "label")
    losses = functional.cross_entropy(
        logits.to(widened(logits.dtype)).flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    total = losses.view(labels.shape).sum(-1)
    return total if reduction == "sum" else total / (labels != IGNORED).sum(-1).clamp(min=1)


def encode(tokenizer: Any, text: str, pair: str | None = None, *, limit: int | None, **options: Any) -> Any:
    """Tokenise one text (or pair of texts), cut on the right to ``limit`` tokens where one is given.

    Raises:
        InputError: there is no tokenizer.
    """
    if tokenizer is None:
        raise InputError(
            f"the raw text {text[:40]!r}, but the task has no tokenizer",
            "tokenised examples, or a tokenizer",
            "Pass the tokenizer to the task: CausalLM(tokenizer)",
        )
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    texts = (text,) if pair is None else (text, pair)
    return tokenizer(*texts, **cut, **options)


def tokenised(
    example: Mapping[str, Any], limit: int | None, names: Sequence[str] = ("token_type_ids",)
) -> dict[str, np.ndarray]:
    """Return a tokenised example's sequences: its padding at either end removed, then cut on the right to ``limit``.

    Raises:
        InputError: no token is left, lengths differ, or there are several sequences.
    """
    ids = _flat(example["input_ids"])
    mask = _flat(example.get("attention_mask", [1] * len(ids)))
    if 1 not in mask:
        raise InputError("an example without a token", "at least one token that attention_mask shows", "Drop it")
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    keep = slice(first, last if limit is None else min(last, first + limit))
    row = {"input_ids": ids, "attention_mask": mask} | {n: _flat(example[n]) for n in names if n in example}
    for name, values in row.items():
        if len(values) != len(ids):
            raise InputError(
                f"{name} of {len(values)} entries beside input_ids of {len(ids)}",
                "one entry a token in each",
                "Tokenise the example again, or leave the field out",
            )
    return {name: integers(values[keep]) for name, values in row.items()}


def _flat(values: Any) -> list[int]:
    """Return the integers of a tensor, array or list that holds one sequence."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    values = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if any(isinstance(value, list) for value in values):
        raise InputError("an example of several sequences", "one sequence an example", "Pass its rows one by one")
    return [int(value) for value in values]


def limit_of(tokenizer: Any, max_length: int | None) -> int | None:
    """Return ``max_length``, or else the tokenizer's own limit where it has a real one.

    Raises:
        InputError: fewer than two tokens.
    """
    if max_length is not None and (isinstance(max_length, bool) or max_length < 2):
        raise InputError(f"max_length={max_length!r}", "at least 2 tokens, or None", "Type max_length=512")
    own = getattr(tokenizer, "model_max_length", None)
    return max_length if max_length is not None or own is None or own > 1 << 30 else int(own)


def check_reduction(reduction: str) -> None:
    """Refuse anything but "sum" and "mean"."""
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction={reduction!r}", '"sum" or "mean"', 'Type reduction="mean"')


def unknown_example(example: Any, wanted: str) -> InputError:
    """Return the error for an example of a form that the task does not know."""
    keys = f" with the keys {', '.join(map(str, example))}" if isinstance(example, Mapping) else ""
    return InputError(
        f"an example of type {type(example).__name__}{keys}", wanted, "Convert it, or write your own Task.collate"
    )


def vocabulary(tokenizer: Any) -> str:
    """Hash a tokenizer's vocabulary: the same on every machine, whatever folder it was loaded from."""
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    return hashlib.sha256(repr((type(tokenizer).__name__, words)).encode()).hexdigest()[:16]
