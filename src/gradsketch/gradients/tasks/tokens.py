"""What every task over tokens shares: tokenising, and cross-entropy per example."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.encoded import IGNORED
from gradsketch.gradients.tasks.logits import check_ids
from gradsketch.linear_map import widened

__all__ = [
    "PROBES",
    "Reduction",
    "check_reduction",
    "each_loss",
    "encode",
    "limit_of",
    "sequence_losses",
    "unknown_example",
    "vocabulary",
]

Reduction = Literal["sum", "mean"]

# Texts whose ids tell tokenizers of one vocabulary apart: first and last tokens, the space before a text, spaces, case,
# accents, compatibility forms, digits, scripts, special tokens in the text.
PROBES = (
    "a",
    " a",
    "A b  c\n\td ",
    "e\u0301 \u00e9 na\u00efve Stra\u00dfe",
    "\ufb01 \uff11\u00b2 \u2126",
    "don't, 12,345.6!",
    "\u65e5\u672c \u0627\u0644\u0639 \U0001f642",
    "<s>a</s> [CLS] <pad>",
)


def sequence_losses(
    logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"], reduction: Reduction
) -> Float[Tensor, " b"]:
    """Return each sequence's cross-entropy, summed or averaged over the tokens that count (0 where none does).

    ``logits[:, t]`` predicts ``labels[:, t]``.
    """
    total = _cross_entropies(logits, labels).sum(-1)
    return total if reduction == "sum" else total / _counted(labels)


def each_loss(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"], reduction: Reduction) -> Float[Tensor, "b t"]:
    """Return the terms of ``sequence_losses``: what each label adds to its sequence's loss."""
    losses = _cross_entropies(logits, labels)
    return losses if reduction == "sum" else losses / _counted(labels)[:, None]


def _cross_entropies(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    check_ids(labels, logits.shape[-1], "label")
    losses = functional.cross_entropy(
        logits.to(widened(logits.dtype)).flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


def _counted(labels: Int[Tensor, "b t"]) -> Int[Tensor, " b"]:
    return (labels != IGNORED).sum(-1).clamp(min=1)


def encode(tokenizer: Any, text: str, pair: str | None = None, *, limit: int | None, **options: Any) -> Any:
    """Tokenise one text (or pair of texts), cut to ``limit`` tokens where one is given, on the side the tokenizer cuts.

    A first token that stands in the text already is not doubled.

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
    encoded = tokenizer(*texts, **cut, **options)
    # A chat template has written the first token already, and the tokenizer writes it again.
    first, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if first and text.startswith(first) and list(encoded["input_ids"][:2]) == [bos, bos]:
        return {name: values[1:] for name, values in encoded.items()}
    return encoded


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
    """Hash a tokenizer's words and how it uses them: the same on every machine, wherever it was loaded from."""
    words = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    probes: list[Any] = [_ids(tokenizer, text) for text in PROBES]
    if getattr(tokenizer, "truncation_side", "right") != "right":
        probes.append("cut on the left")
    return hashlib.sha256(repr((type(tokenizer).__name__, words, probes)).encode()).hexdigest()[:16]


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """Return a text's ids, or None of what reads no plain text, such as a processor of images."""
    try:
        return [int(i) for i in tokenizer(text)["input_ids"]]
    except Exception:  # what is no tokenizer raises whatever it likes
        return None
