"""Greedy answers that do not depend on the company a prompt is answered in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.model_inputs import position_limit

__all__ = ["greedy"]

Row = list[int]


def greedy(model: nn.Module, rows: list[Row], most: int, padding: int, batch_size: int) -> list[Row]:
    """Return the tokens that a model writes after each row of tokens, at most ``most``.

    Padding stands where the model knows it: on the right for an encoder, on the left of what is continued. Where the
    shortest prompt of the first padded batch gets another answer alone, the model does not know padding on that side,
    and prompts of one length share a batch from then on. Where learned positions end, so does the answer.

    Raises:
        InputError: a prompt that leaves no position to write to.
    """
    allowed = [_allowed(model, len(row), most) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (allowed[i], len(rows[i])))
    trusted: bool | None = None
    answers: dict[int, Row] = {}
    for room, same_room in groupby(order, key=lambda i: allowed[i]):
        for places in _cut(list(same_room), batch_size):
            batch = [rows[i] for i in places]
            written = _written(model, batch, room, padding)
            if trusted is None and len(batch[0]) != len(batch[-1]):
                trusted = _written(model, batch[:1], room, padding) == written[:1]
            if trusted is False:
                written = [row for part in _same_length(batch) for row in _written(model, part, room, padding)]
            answers.update(zip(places, written, strict=True))
    return [answers[i] for i in range(len(rows))]


def _allowed(model: nn.Module, length: int, most: int) -> int:
    """Return how many tokens can be written after a prompt of this length."""
    limit = position_limit(model)
    if limit is None:
        return most
    # The last token that is written is read by nobody, so that it takes no position.
    room = min(most, limit if _has_encoder(model) else limit - length + 1)
    if length > limit or room < 1:
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens={most} for {type(model).__name__}, which has {limit}"
            " positions",
            f"prompts of at most {limit} tokens",
            "Shorten the longest prompts, or leave them out",
        )
    return room


def _written(model: nn.Module, rows: list[Row], most: int, padding: int) -> list[Row]:
    """Return what the model writes after each row of one batch, up to the token that ends an answer."""
    device, encodes = next(model.parameters()).device, _has_encoder(model)
    length = max(len(row) for row in rows)
    ids, mask = (
        _padded([values(row) for row in rows], length, fill, device, left=not encodes)
        for values, fill in ((list, padding), (lambda row: [1] * len(row), 0))
    )
    generate: Any = model.generate
    options = {"max_new_tokens": most, "do_sample": False, "pad_token_id": padding}
    out = generate(input_ids=ids, attention_mask=mask, **options)
    ends = _ends(model)
    # An encoder-decoder repeats the token that starts its decoder, the others the prompt.
    return [_until(row, ends) for row in out[:, 1 if encodes else length :].tolist()]


def _padded(rows: list[Row], length: int, fill: int, device: torch.device, *, left: bool) -> Int64[Tensor, "b t"]:
    pads = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([p + row if left else row + p for p, row in zip(pads, rows, strict=True)], device=device)


def _until(row: Row, ends: set[int]) -> Row:
    """Return a row up to its first end: behind it stands padding, as much as the longest answer of the batch takes."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _ends(model: nn.Module) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _same_length(rows: list[Row]) -> Iterator[list[Row]]:
    return (list(part) for _, part in groupby(rows, key=len))


def _cut(places: list[int], size: int) -> Iterator[list[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))
