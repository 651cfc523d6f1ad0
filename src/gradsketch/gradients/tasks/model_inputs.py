"""What a model takes: every field of a batch reaches it, or is refused by name.

Padding stands on the right before a model sees it. Some models count positions from the left edge, some from the mask,
and some know no mask at all; ``right_padded`` turns each row instead of asking which kind a model is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.encoded import Encoded

__all__ = ["arguments", "check_mask", "check_positions", "check_row", "position_limit", "right_padded", "taken_names"]

Answer = TypeVar("Answer")

# Tokenizers write these for every model. One that does not take the first knows one kind of token only; the second is
# dropped after ``check_mask``.
_OPTIONAL = ("token_type_ids", "attention_mask")
_IMAGES = ("pixel_values", "image")
# Names of tables of learned positions, and of towers whose positions are not those of tokens.
_POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings?|pos_embeddings?|positional_embeddings?|embed_positions)$")
_OF_IMAGES = re.compile(r"vision|visual|image")


def _once_per_model(ask: Callable[[nn.Module], Answer]) -> Callable[[nn.Module], Answer]:
    """Remember the answer: signatures and modules take milliseconds to walk through, batches come by the thousand."""
    answers: WeakKeyDictionary[nn.Module, Answer] = WeakKeyDictionary()

    def asked(model: nn.Module) -> Answer:
        if model not in answers:
            answers[model] = ask(model)
        return answers[model]

    return asked


@_once_per_model
def taken_names(model: nn.Module) -> frozenset[str] | None:
    """Return the names of inputs that a model takes; None where it takes any name.

    A model with ``**kwargs`` hands them to the modules inside, so that the names which these declare count as well:
    otherwise Hugging Face models would swallow every field in silence.
    """
    own, rest = _declared(model)
    if not rest:
        return own
    return own.union(*(_declared(module)[0] for module in model.modules())) if own else None


def _declared(module: nn.Module) -> tuple[frozenset[str], bool]:
    """Return the names in the signature of a module's forward, and whether it takes others besides."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return frozenset(named), any(p.kind is p.VAR_KEYWORD for p in parameters)


def arguments(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs as arguments of the model: by name, but a single one by position where it is named otherwise.

    Raises:
        InputError: an input that the model does not take.
    """
    names, given = taken_names(model), {name: value for name, value in inputs.items() if value is not None}
    if names is None:
        return (), given
    unused = [name for name in given if name not in names and name not in _OPTIONAL]
    if len(unused) == 1 and not names & given.keys():
        return (given[unused[0]],), {}
    if unused:
        raise InputError(
            f"the field {unused[0]!r}, which {type(model).__name__} does not take",
            "fields that the model's forward names",
            "Drop or rename the field, or write the loss as a function (model, batch) → losses [b]",
        )
    return (), {name: value for name, value in given.items() if name in names}


def check_row(model: nn.Module, row: Encoded) -> None:
    """Refuse an encoded row that the model cannot use, before a batch of them is made.

    Raises:
        InputError: a field that the model does not take, or more tokens than it has positions.
    """
    arguments(model, {name: True for name in (*row.sequences, *row.values) if name != "labels"})
    for name in ("input_ids", "labels"):
        check_positions(model, len(row.sequences.get(name, ())))


def check_mask(model: nn.Module, mask: Tensor | None, *, causal: bool) -> None:
    """Refuse padding that a model would read as text: it takes no attention_mask, or one under another name.

    A causal model reads from left to right, so that padding on the right changes nothing before it.

    Raises:
        InputError: padding, for a model without attention_mask.
    """
    names = taken_names(model)
    if mask is None or names is None or "attention_mask" in names or is_functorch_wrapped_tensor(mask):
        return
    shown = mask != 0
    if shown.all() or (causal and not (shown[:, 1:] & ~shown[:, :-1]).any()):
        return
    like = sorted(name for name in names if "mask" in name or "length" in name)
    raise InputError(
        f"a padded batch for {type(model).__name__}, which takes no attention_mask"
        + (f" (but {', '.join(like)})" if like else ""),
        "a model that knows padding, or rows of one length",
        "Name the argument of its forward attention_mask, or put every row in a batch of its own: batch_tokens=1",
    )


@_once_per_model
def position_limit(model: nn.Module) -> int | None:
    """Return how many tokens a model's table of learned positions holds; None where there is no such table."""
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    if not isinstance(most, int):
        return None
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name) and not _OF_IMAGES.search(name)
    ]
    # Some tables keep rows for an offset: OPT and BART two beyond the limit, RoBERTa up to its padding's within it.
    offsets = [0 if table.padding_idx is None else table.padding_idx + 1 for table in tables]
    sizes = [table.num_embeddings for table in tables]
    return min(
        (most if size > most else size - offset for size, offset in zip(sizes, offsets, strict=True)), default=None
    )


def check_positions(model: nn.Module, tokens: int) -> None:
    """Refuse more tokens than the model has positions for, which on a GPU would abort the process.

    Raises:
        InputError: there are more.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{tokens} tokens for {type(model).__name__}, which has {limit} positions",
            f"at most {limit} tokens",
            f"Cut longer texts: max_length={limit}",
        )


def right_padded(batch: Mapping[str, Any], fixed: Iterable[str] = ()) -> Mapping[str, Any]:
    """Return a batch whose padding stands behind the tokens: each row is what it would be alone, wherever it stood.

    Positions are counted from the left edge by some models and from the mask by others; without padding on the left
    all agree. ``fixed`` names fields that are no sequence of the same tokens.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return batch
    if not is_functorch_wrapped_tensor(mask) and bool((mask[:, :1] != 0).all()):
        return batch
    b, t = mask.shape
    first = (mask != 0).int().argmax(dim=1, keepdim=True)
    places = (first + torch.arange(t, device=mask.device)) % t

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != (b, t) or name in fixed or name.startswith(_IMAGES):
            return value
        return value.gather(1, places.view(b, t, *[1] * (value.ndim - 2)).expand(value.shape))

    return {name: moved(name, value) for name, value in batch.items()}
