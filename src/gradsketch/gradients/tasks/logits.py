"""Calling a model for its logits, with every mismatch between model and batch named.

Losses are computed from logits, not asked of the model. Hugging Face narrows its own loss to float32 and averages over
the batch; here cross-entropy is per example, in the logits' precision or float32, with the labels moved instead of the
logits (no copy of batch × tokens × vocabulary). Ids out of range are refused before the model sees them, because on a
GPU they abort the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.encoded import IGNORED
from gradsketch.gradients.tasks.model_inputs import arguments, check_mask, check_positions, right_padded

__all__ = [
    "IGNORED",
    "check_ids",
    "check_token_ids",
    "class_predictions",
    "inputs_and_labels",
    "known_tokens",
    "logits_of",
]


def logits_of(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, leading: Sequence[int], *, causal: bool = False
) -> Tensor:
    """Call the model with its inputs and return its logits ``[*leading, classes]``.

    One tensor is passed by position, a dict by name (its one tensor by position where the model names it otherwise).
    The logits are the output's ``.logits`` or ``["logits"]``, the first entry of a tuple that is no scalar, or the
    output itself. Hugging Face models are called without their key-value cache. With ``causal`` padding on the right
    needs no mask.

    Raises:
        InputError: an input that the model does not take or is too long for it, no logits, or some of another shape.
    """
    logits = _logits(model, _call(model, inputs, causal))
    if len(leading) == 2 and logits.ndim == 3 and len(logits) == leading[0] and logits.shape[1] > leading[1]:
        more = logits.shape[1] - leading[1]
        raise InputError(
            f"{type(model).__name__} returned logits for {more} more positions than there are labels",
            "one position per label, which virtual tokens in front, as prompt tuning puts them, do not have",
            "Write the loss as a function (model, batch) → losses [b] that drops what belongs to no label: "
            f"logits[:, {more}:]",
        )
    if list(logits.shape[:-1]) != list(leading):
        raise InputError(
            f"{type(model).__name__} returned logits of shape {list(logits.shape)} for labels of shape {list(leading)}",
            f"logits of shape [{', '.join(str(size) for size in leading)}, classes]",
            "Use a model with the task's head, or the task that fits the model",
        )
    return logits


def inputs_and_labels(batch: Any) -> tuple[Mapping[str, Tensor] | Tensor, Tensor]:
    """Return what a model is given of a batch, padding on the right, and the labels.

    Raises:
        InputError: it is neither a dict of tensors with ``labels`` nor a tuple (x, labels).
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        padded = right_padded(batch)
        return {name: value for name, value in padded.items() if name != "labels"}, padded["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise InputError(
        f"a batch of type {type(batch).__name__} without labels",
        "a dict of tensors with labels, or a tuple (x, labels)",
        "Use the task Classification, or write a function of your own",
    )


def class_predictions(model: nn.Module, batch: Any) -> tuple[Float[Tensor, "*r c"], Int[Tensor, " *r"]]:
    """Return logits and the labels in the same places, once they fit each other.

    Raises:
        InputError: labels that are no classes of the model, or what ``logits_of`` refuses.
    """
    inputs, labels = inputs_and_labels(batch)
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"labels of dtype {labels.dtype}",
            "classes, whole numbers from 0",
            "For a regression or soft labels write a function of your own",
        )
    logits = logits_of(model, inputs, labels.shape)
    if logits.shape[-1] < 2:
        raise InputError(
            f"{type(model).__name__} returned logits of {logits.shape[-1]} class",
            "at least two classes",
            "Load the model with num_labels=2 or more, or write a function of your own",
        )
    check_ids(labels, logits.shape[-1], "label")
    return logits, labels


def _call(model: nn.Module, inputs: Mapping[str, Any] | Tensor, causal: bool) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    if "input_ids" in inputs:
        check_token_ids(model, inputs["input_ids"])
        check_positions(model, inputs["input_ids"].shape[1])
    check_mask(model, inputs.get("attention_mask"), causal=causal)
    positional, keywords = arguments(model, inputs)
    if keywords and hasattr(getattr(model, "config", None), "use_cache"):
        keywords["use_cache"] = False
    return model(*positional, **keywords)


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        logits = next((part for part in output if isinstance(part, Tensor) and part.ndim > 1), None)
    logits = output if isinstance(output, Tensor) else logits
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{type(model).__name__} returned a {type(output).__name__} without logits",
            "a tensor, a tuple or dict with logits, or an output with .logits",
            "Use a model with the task's head, or write the loss as a function (model, batch) → losses [b]",
        )
    return logits


def check_ids(ids: Int[Tensor, " ..."], size: int, what: str) -> None:
    """Refuse ids outside [0, size), which on a GPU would abort the process. The label IGNORED passes.

    Raises:
        InputError: an id is out of range, with the example's position.
    """
    if is_functorch_wrapped_tensor(ids):  # inside vmap values cannot be looked at
        return
    bad = (ids < 0) | (ids >= size)
    if what == "label":
        bad &= ids != IGNORED
    if not bad.any():
        return
    place = tuple(int(i) for i in bad.nonzero()[0])
    raise InputError(
        f"example {place[0]} of the batch holds the {what} {int(ids[place])}",
        f"a {what} from 0 to {size - 1}: the model has {size}",
        "Use the model's own tokenizer"
        if what == "token"
        else "Renumber the labels, or use a model with a larger head",
    )


def check_token_ids(model: nn.Module, ids: Int[Tensor, "b t"]) -> None:
    """Refuse token ids that the model's input embedding does not have, where it tells which one that is."""
    known = known_tokens(model)
    if known is not None:
        check_ids(ids, known, "token")


def known_tokens(model: nn.Module) -> int | None:
    """Return how many token ids a model has an embedding for; None where it does not tell, or has no table."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except NotImplementedError:  # models that hash characters have no table
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
