"""Sequence to sequence: every target token is predicted from the source and the target tokens before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import pieces, tokens
from gradsketch.gradients.tasks.base import Batch, Task
from gradsketch.gradients.tasks.encoded import IGNORED, Encoded, encode_all, integers, stack
from gradsketch.gradients.tasks.logits import check_token_ids, logits_of
from gradsketch.gradients.tasks.model_inputs import check_positions, check_row, right_padded
from gradsketch.gradients.tasks.rows import Row, refuse_weights, sequence_of, tensor_inputs, tokenised
from gradsketch.gradients.tasks.tokens import Reduction

__all__ = ["Seq2SeqLM"]


# What goes to the decoder beside the labels, as long as they are.
_DECODER = ("decoder_input_ids", "decoder_attention_mask")


class Seq2SeqLM(Task):
    """Cross-entropy of each target given its source, in nats, for encoder-decoders such as T5 and BART.

    Raw examples are ``(source, target)`` pairs, dicts with ``source`` and ``target`` (or ``prompt`` and ``answer``), or
    tokenised dicts: ``labels``
    (−100: does not count), ``input_ids`` or another input of the encoder, such as ``input_features``, and optionally
    ``attention_mask``, ``decoder_input_ids`` and whatever else the model takes. ``losses`` takes a batch of these. The
    decoder's inputs are by default the labels moved to the right as the model itself does it for its own loss.

    Args:
        tokenizer: like a Hugging Face tokenizer, called with ``text_target=`` for targets; not needed for tokenised
            examples.
        max_length, max_target_length: sources and targets are cut to this many tokens, on the tokenizer's side; by
            default to its own limit.
        reduction: "mean" over an example's counted tokens, or "sum".

    Example:
        >>> task = gs.Seq2SeqLM(reduction="sum")  # minus the log-probability of the target
        >>> task.collate([{"input_ids": [4, 9, 2], "labels": [7, 3]}])["labels"]
        tensor([[7, 3]])

    Raises:
        InputError: an empty source or target, a token or label the model does not have, no start token, logits of
            another shape.
    """

    not_padded = ("labels", "decoder_input_ids", "decoder_attention_mask")

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        max_target_length: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        tokens.check_reduction(reduction)
        self.tokenizer, self.reduction = tokenizer, reduction
        self.max_length = tokens.limit_of(tokenizer, max_length)
        self.max_target_length = tokens.limit_of(tokenizer, max_target_length)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        return tokens.sequence_losses(*self.predictions(model, batch), self.reduction)

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        batch = right_padded(batch, fixed=("labels", *_DECODER))
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = _shifted_right(model, labels)
        check_token_ids(model, inputs["decoder_input_ids"])
        check_positions(model, labels.shape[1])
        return logits_of(model, inputs, labels.shape), labels

    def encode(self, example: Any) -> Encoded:
        if isinstance(example, Mapping) and example.get("labels") is not None:
            row, targets = self._source(example), self._targets(example)
        else:
            row, targets = self._texts(example)
        length = len(row.sequences.get("input_ids", ())) + len(targets["labels"])
        return Encoded(length, {**row.sequences, **targets}, row.values)

    def pieces(self, example: Any) -> list[pieces.Piece] | None:
        if isinstance(example, Mapping) and example.get("labels") is not None:
            row = self.encode(example).sequences
            labels = [max(label, 0) for label in row["labels"].tolist()]
            ids = row["input_ids"].tolist() if "input_ids" in row else []
            return pieces.decoded(self.tokenizer, ids) + pieces.decoded(self.tokenizer, labels)
        source, target = _source_and_target(example)
        encoded = self._target(target, **pieces.with_offsets(self.tokenizer))
        first = pieces.of_text(self.tokenizer, source, limit=self.max_length)
        return first + pieces.pieces(self.tokenizer, encoded, target)

    def collate(self, examples: Sequence[Any]) -> Batch:
        return stack(encode_all(self.encode, examples), self.tokenizer)

    def check(self, model: nn.Module, row: Encoded) -> None:
        check_row(model, row)

    def options(self) -> dict[str, str | int | float | bool]:
        return {
            "reduction": self.reduction,
            "max_length": self.max_length or 0,
            "max_target_length": self.max_target_length or 0,
            "vocabulary": tokens.vocabulary(self.tokenizer),
        }

    def _source(self, example: Mapping[str, Any]) -> Row:
        """Return a tokenised row's inputs of the encoder, which need not be tokens."""
        if example.get("input_ids") is not None:
            return tokenised(example, self.max_length, own=("labels", *_DECODER))
        refuse_weights(example)
        row = Row({}, tensor_inputs({n: value for n, value in example.items() if n not in ("labels", *_DECODER)}))
        if not row.values:
            raise tokens.unknown_example(example, "a tokenised dict with input_ids or another input of the encoder")
        return row

    def _targets(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given = {n: sequence_of(example[n], n) for n in ("labels", *_DECODER) if example.get(n) is not None}
        for name, values in given.items():
            if len(values) != len(given["labels"]):
                raise InputError(
                    f"{name} of {len(values)} entries beside labels of {len(given['labels'])}",
                    "one entry a label",
                    "Tokenise the example again, or leave the field out",
                )
        return {name: values[: self.max_target_length] for name, values in given.items()}

    def _target(self, target: str, **options: Any) -> Any:
        cut = {} if self.max_target_length is None else {"truncation": True, "max_length": self.max_target_length}
        return self.tokenizer(text_target=target, **cut, **options)

    def _texts(self, example: Any) -> tuple[Row, dict[str, np.ndarray]]:
        refuse_weights(example, text=True)
        source, target = _source_and_target(example)
        for text, name in ((source, "source"), (target, "target")):
            if not text:
                raise InputError(f"an empty {name}", "a source and a target of at least one character", "Drop it")
        ids = tokens.encode(self.tokenizer, source, limit=self.max_length)["input_ids"]
        labels = self._target(target)["input_ids"]
        return Row({"input_ids": integers(ids)}, {}), {"labels": integers(labels)}


def _source_and_target(example: Any) -> tuple[str, str]:
    pair = example
    if isinstance(example, Mapping):
        named = ("source", "target") if "source" in example else ("prompt", "answer")
        pair = tuple(example.get(name) for name in named)
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        return pair[0], pair[1]
    raise tokens.unknown_example(example, "(source, target), a dict with source and target, or a tokenised dict")


def _shifted_right(model: nn.Module, labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Return the decoder's input: as the model itself makes it, or else the start token and the labels but the last.

    Models differ (mBART puts the language, its last token, first), so that only the model's own way is that of its
    training.
    """
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        try:
            shifted: Tensor = shift(labels=labels.clone())  # some models write to them
        except (ValueError, AssertionError, TypeError) as error:
            raise _no_start(model, str(error)) from error
        return shifted
    start, padding = (_configured(model, name) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None:
        raise _no_start(model, "it names no decoder_start_token_id")
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED, start if padding is None else padding)


def _no_start(model: nn.Module, why: str) -> InputError:
    return InputError(
        f"{type(model).__name__}, which cannot move labels to the right ({why}), and no decoder_input_ids in the batch",
        "one of the two",
        "Set model.config.decoder_start_token_id and pad_token_id, or put decoder_input_ids in the rows",
    )


def _configured(model: nn.Module, name: str) -> int | None:
    """Return an entry of the model's configuration, or else of its generation configuration."""
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None
