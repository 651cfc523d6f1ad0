"""Classification of texts, images or any tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import tokens
from gradsketch.gradients.tasks.base import Batch, Task
from gradsketch.gradients.tasks.logits import check_ids, check_token_ids, logits_of
from gradsketch.linear_map import widened

__all__ = ["Classification"]


class Classification(Task):
    """Cross-entropy of each example's class, in nats.

    Raw examples are ``(x, label)`` pairs or dicts with ``label`` (or ``labels``). ``x`` is a text, a pair of texts, an
    image that the processor takes, or a tensor; in a dict it stands under ``text`` (and ``text_pair``), ``image``,
    ``input_ids`` (tokenised), or any names of tensors the model takes, such as ``pixel_values``. ``losses`` takes a
    dict of the model's inputs with ``labels [b]``, or a tuple ``(x, labels)``.

    Args:
        processor: like a Hugging Face tokenizer or image processor; not needed for tensors and tokenised examples.
        classes: names of the classes in order, where labels are names; otherwise they count from 0.
        max_length: texts are cut on the right to this many tokens; by default to the tokenizer's own limit.

    Example:
        >>> task = gs.Classification(classes=["ham", "spam"])
        >>> batch = task.collate([(torch.randn(20), "spam"), (torch.randn(20), "ham")])
        >>> task.losses(torch.nn.Linear(20, 2), batch).shape
        torch.Size([2])

    Raises:
        InputError: an empty text, a label that is unknown or out of range, a token the model does not have, logits of
            another shape.
    """

    def __init__(
        self, processor: Any = None, *, classes: Sequence[str] | None = None, max_length: int | None = None
    ) -> None:
        self.processor = processor
        self.classes = None if classes is None else tuple(classes)
        self.max_length = tokens.limit_of(processor, max_length)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        inputs, labels = _inputs_and_labels(batch)
        if isinstance(inputs, Mapping) and "input_ids" in inputs:
            check_token_ids(model, inputs["input_ids"])
        logits = logits_of(model, inputs, labels.shape)
        if logits.shape[-1] < 2:
            raise InputError(
                f"{type(model).__name__} returned logits of {logits.shape[-1]} class",
                "at least two classes",
                "Load the model with num_labels=2 or more, or write the loss as a function (model, batch) → losses [b]",
            )
        check_ids(labels, logits.shape[-1], "label")
        return functional.cross_entropy(logits.to(widened(logits.dtype)), labels.long(), reduction="none")

    def collate(self, examples: Sequence[Any]) -> Batch:
        rows = tokens.encoded(self._encode, examples)
        labels = torch.tensor([row.pop("labels") for row in rows])
        if "input_ids" in rows[0]:
            return {**tokens.stacked(rows, self.processor), "labels": labels}
        inputs: dict[str, Tensor] = default_collate(rows)
        return (inputs["x"], labels) if set(inputs) == {"x"} else {**inputs, "labels": labels}

    def length(self, example: Any) -> int:
        row = self._encode(example)
        return len(row["input_ids"]) if "input_ids" in row else 1

    def options(self) -> dict[str, str | int | float | bool]:
        return {
            "classes": repr(self.classes or ""),
            "max_length": self.max_length or 0,
            "vocabulary": tokens.vocabulary(self.processor),
        }

    def _encode(self, example: Any) -> dict[str, Any]:
        """Return an example's model inputs (a lone tensor as ``x``) and its ``labels``, an integer."""
        x, label = _input_and_label(example)
        if isinstance(x, Mapping) and "input_ids" in x:
            row: dict[str, Any] = dict(tokens.tokenised(x, self.max_length))
        elif isinstance(x, Mapping):
            row = {name: torch.as_tensor(value) for name, value in x.items()}
        elif isinstance(x, str):
            row = self._text(x)
        elif isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(part, str) for part in x):
            row = self._text(*x)
        elif hasattr(self.processor, "image_processor_type"):
            row = {name: values[0] for name, values in self.processor(x, return_tensors="pt").items()}
        else:
            row = {"x": torch.as_tensor(x)}
        return {**row, "labels": self._class(label)}

    def _text(self, text: str, pair: str | None = None) -> dict[str, Any]:
        if not text:
            raise InputError("an empty text", "some text to classify", "Drop it")
        encoded = tokens.encode(self.processor, text, pair, limit=self.max_length)
        return {name: list(values) for name, values in encoded.items()}

    def _class(self, label: Any) -> int:
        if isinstance(label, str) and self.classes is not None and label in self.classes:
            return self.classes.index(label)
        number = label.item() if hasattr(label, "item") else label
        if isinstance(number, int) and (self.classes is None or 0 <= number < len(self.classes)) and number >= 0:
            return int(number)
        raise InputError(
            f"the label {label!r}",
            "a class number from 0" if self.classes is None else f"one of {', '.join(self.classes)}, or its number",
            'Name the classes: Classification(tokenizer, classes=["ham", "spam"])'
            if isinstance(label, str)
            else "Renumber the labels from 0",
        )


def _input_and_label(example: Any) -> tuple[Any, Any]:
    """Split an example; of a dict, only tensors and arrays are kept where it holds neither text nor image."""
    if isinstance(example, tuple | list) and len(example) == 2:
        return example[0], example[1]
    label = None
    if isinstance(example, Mapping):
        label = example.get("label", example.get("labels"))
    if label is None:
        raise tokens.unknown_example(example, "(x, label), or a dict with label and text, image, input_ids or tensors")
    if "input_ids" in example:
        return example, label
    if "text" in example:
        return (example["text"], example["text_pair"]) if "text_pair" in example else example["text"], label
    if "image" in example:
        return example["image"], label
    tensors = {n: v for n, v in example.items() if n not in ("label", "labels") and hasattr(v, "shape")}
    if not tensors:
        raise tokens.unknown_example(example, "a dict with text, image, input_ids or tensors beside its label")
    return tensors, label


def _inputs_and_labels(batch: Batch) -> tuple[Mapping[str, Tensor] | Tensor, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise tokens.unknown_example(batch, "a batch that is a dict of tensors with labels, or a tuple (x, labels)")
