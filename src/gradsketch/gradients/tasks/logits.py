"""Calling a model for its logits, with every mismatch between model and batch named."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsketch.errors import InputError

__all__ = ["IGNORED", "check_ids", "check_token_ids", "logits_of"]

# The label of a position that does not count, as in torch and Hugging Face.
IGNORED = -100


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor, leading: Sequence[int]) -> Tensor:
    """Call the model with those inputs that it takes and return its logits ``[*leading, classes]``.

    One tensor is passed by position, a dict by name (by position where the model takes none of the names).
    The logits are the output's ``.logits``, its first entry where it is a tuple, or the output itself. Hugging Face
    models are called without their key-value cache.

    Raises:
        InputError: the model returns no logits, or logits of another shape.
    """
    logits = _first_tensor(model, _call(model, inputs))
    if list(logits.shape[:-1]) != list(leading):
        raise InputError(
            f"{type(model).__name__} returned logits of shape {list(logits.shape)} for labels of shape {list(leading)}",
            f"logits of shape [{', '.join(str(size) for size in leading)}, classes]",
            "Use a model with the task's head, or the task that fits the model",
        )
    return logits


def _call(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    keywords: dict[str, Any] = dict(inputs)
    if hasattr(getattr(model, "config", None), "use_cache"):
        keywords["use_cache"] = False
    names = inspect.signature(model.forward).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in names.values()):
        keywords = {key: value for key, value in keywords.items() if key in names}
    return model(**keywords) if keywords else model(next(iter(inputs.values())))


def _first_tensor(model: nn.Module, output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{type(model).__name__} returned a {type(output).__name__} without logits",
            "a tensor, a tuple that starts with one, or an output with .logits",
            "Use a model with the task's head, or write the loss as a function (model, batch) → losses [b]",
        )
    return logits


def check_ids(ids: Int[Tensor, ...], size: int, what: str) -> None:
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
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if isinstance(embedding, nn.Embedding):
        check_ids(ids, embedding.num_embeddings, "token")
