"""Classification of texts, images or any tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import pieces, tokens
from gradsketch.gradients.tasks.base import Batch, Task
from gradsketch.gradients.tasks.encoded import Encoded, encode_all, integers, stack
from gradsketch.gradients.tasks.logits import inputs_and_labels
from gradsketch.gradients.tasks.model_inputs import check_row
from gradsketch.gradients.tasks.rows import Row, refuse_weights, tensor_inputs, tokenised
from gradsketch.linear_map import widened

__all__ = ["Classification"]


class Classification(Task):
    """Cross-entropy of each example's class, in nats.

    Raw examples are ``(x, label)`` pairs or dicts with ``label`` (or ``labels``). ``x`` is a text, a pair of texts, an
    image that the processor takes, or a tensor; in a dict it stands under ``text`` (and ``text_pair``), ``image``,
    ``input_ids`` (tokenised), or any names of tensors the model takes, such as ``pixel_values``. Arrays beside them go
    to the model too, and are refused by name if it does not take them. ``losses`` takes a dict of the model's inputs
    with ``labels [b]``, or a tuple ``(x, labels)``.

    Args:
        processor: like a Hugging Face tokenizer or image processor; not needed for tensors and tokenised examples.
        classes: names of the classes in order, where labels are names; otherwise they count from 0.
        max_length: texts are cut to this many tokens, on the tokenizer's side; by default to its own limit.

    Example:
        >>> task = gs.Classification(classes=["ham", "spam"])
        >>> batch = task.collate([(torch.randn(20), "spam"), (torch.randn(20), "ham")])
        >>> task.losses(torch.nn.Linear(20, 2), batch).shape
        torch.Size([2])

    Raises:
        InputError: an empty text, a label that is unknown or out of range, a token the model does not have, logits of
            another shape.
    """

    not_padded = ("labels",)

    def __init__(
        self, processor: Any = None, *, classes: Sequence[str] | None = None, max_length: int | None = None
    ) -> None:
        self.processor = processor
        self.classes = None if classes is None else tuple(classes)
        self.max_length = tokens.limit_of(processor, max_length)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        logits, labels = self.predictions(model, batch)
        return functional.cross_entropy(logits.to(widened(logits.dtype)), labels.long(), reduction="none")

    def sampled(self, model: nn.Module, batch: Batch, draw: Callable[[Tensor], Tensor]) -> Batch:
        inputs, _ = inputs_and_labels(batch)
        labels = draw(self.predictions(model, batch)[0])
        return {**inputs, "labels": labels} if isinstance(inputs, Mapping) else (inputs, labels)

    def encode(self, example: Any) -> Encoded:
        refuse_weights(example, text=True)
        x, others, label = _parts(example)
        row = self._inputs(x)
        values: dict[str, Any] = {**row.values, **tensor_inputs(others), "labels": self._class(label)}
        return Encoded(len(row.sequences.get("input_ids", (1,))), row.sequences, values)

    def pieces(self, example: Any) -> list[pieces.Piece] | None:
        x = _parts(example)[0]
        if isinstance(x, Mapping) and "input_ids" in x:
            return pieces.decoded(self.processor, self._inputs(x).sequences["input_ids"].tolist())
        if isinstance(x, str):
            return pieces.of_text(self.processor, x, limit=self.max_length)
        if isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(part, str) for part in x):
            return pieces.of_text(self.processor, *x, limit=self.max_length)
        return None

    def collate(self, examples: Sequence[Any]) -> Batch:
        batch = stack(encode_all(self.encode, examples), self.processor)
        return (batch["x"], batch["labels"]) if set(batch) == {"x", "labels"} else batch

    def check(self, model: nn.Module, row: Encoded) -> None:
        if row.values.keys() != {"x", "labels"}:
            check_row(model, row)

    def options(self) -> dict[str, str | int | float | bool]:
        return {
            "classes": repr(self.classes or ""),
            "max_length": self.max_length or 0,
            "vocabulary": tokens.vocabulary(self.processor),
        }

    def _inputs(self, x: Any) -> Row:
        """Return the model's inputs: sequences of a text, or else whole values (a lone tensor as ``x``)."""
        if isinstance(x, Mapping) and "input_ids" in x:
            return tokenised(x, self.max_length, own=("label", "labels"))
        if isinstance(x, Mapping):
            return Row({}, tensor_inputs(x))
        if isinstance(x, str):
            return Row(self._text(x), {})
        if isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(part, str) for part in x):
            return Row(self._text(*x), {})
        if hasattr(self.processor, "image_processor_type"):
            return Row({}, {name: values[0] for name, values in self.processor(x, return_tensors="pt").items()})
        return Row({}, {"x": x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")})

    def _text(self, text: str, pair: str | None = None) -> dict[str, np.ndarray]:
        if not text:
            raise InputError("an empty text", "some text to classify", "Drop it")
        encoded = tokens.encode(self.processor, text, pair, limit=self.max_length)
        return {name: integers(values) for name, values in encoded.items()}

    def _class(self, label: Any) -> int:
        if isinstance(label, str) and self.classes is not None and label in self.classes:
            return self.classes.index(label)
        number = label.item() if hasattr(label, "item") and math.prod(label.shape) == 1 else label
        if isinstance(number, int) and (self.classes is None or 0 <= number < len(self.classes)) and number >= 0:
            return int(number)
        raise InputError(
            f"the label {label!r}",
            "a class number from 0" if self.classes is None else f"one of {', '.join(self.classes)}, or its number",
            'Name the classes: Classification(tokenizer, classes=["ham", "spam"])'
            if isinstance(label, str)
            else "Renumber the labels from 0",
        )


def _parts(example: Any) -> tuple[Any, dict[str, Any], Any]:
    """Split an example into what is classified, other fields that may be inputs of the model, and the label."""
    if isinstance(example, tuple | list) and len(example) == 2:
        return example[0], {}, example[1]
    label = None
    if isinstance(example, Mapping):
        label = example["label"] if example.get("label") is not None else example.get("labels")
    if label is None:
        raise tokens.unknown_example(example, "(x, label), or a dict with label and text, image, input_ids or tensors")
    if "input_ids" in example:
        return example, {}, label
    rest = {name: value for name, value in example.items() if name not in ("label", "labels")}
    for name in ("text", "image"):
        if name in rest:
            x, pair = rest.pop(name), rest.pop("text_pair", None)
            arrays = {other: value for other, value in rest.items() if hasattr(value, "shape")}
            return x if pair is None else (x, pair), arrays, label
    if not tensor_inputs(rest):
        raise tokens.unknown_example(example, "a dict with text, image, input_ids or tensors beside its label")
    return rest, {}, label
