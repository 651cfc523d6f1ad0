"""Losses for models that no task of the library fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsketch as gs
from architectures.tiny import VOCABULARY

__all__ = ["alignment", "ctc", "dictation", "flat_images", "image_text", "outputs"]

# Scores between every pair of rows: each depends on all of the batch.
_ACROSS_ROWS = {"logits_per_image", "logits_per_text", "logits_per_video", "logits_per_audio", "past_key_values"}


@gs.Function
def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Everything the model returns for a row, bounded and weighed by fixed numbers."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows = len(next(iter(inputs.values())))
    parts = [part for part in _tensors(model(**inputs)) if part.ndim and len(part) == rows]
    weighed = [part.reshape(rows, -1).tanh() * torch.cos(torch.arange(part[0].numel()) + 1.0) for part in parts]
    return torch.stack([part.mean(1) for part in weighed]).sum(0)


@gs.Function
def alignment(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """How far a row's image is from its own text."""
    made = model(**batch)
    return 1 - functional.cosine_similarity(made.image_embeds, made.text_embeds, dim=-1)


@gs.Function
def image_text(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The next token, where that is not a place for an image."""
    return _next_token(model, batch)


@gs.Function
def flat_images(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same for models that want the patches of all images in one list."""
    kinds = (batch["input_ids"] == VOCABULARY - 1).long()  # 1 where an image stands
    return _next_token(
        model, {**batch, "mm_token_type_ids": kinds, "pixel_values": batch["pixel_values"].flatten(0, 1)}
    )


@gs.Function
def ctc(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Connectionist temporal classification of two symbols a row."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scores = model(**inputs).logits.log_softmax(-1).transpose(0, 1)
    symbols = torch.stack([batch["labels"] + 1, batch["labels"] + 4], 1)
    steps, rows = scores.shape[:2]
    lengths = torch.full((rows,), steps), torch.full((rows,), 2)
    return functional.ctc_loss(scores, symbols, *lengths, reduction="none")


@gs.Function
def dictation(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The text of a sound (or an image): three tokens a row."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    wanted = batch["labels"][:, None] + torch.tensor([4, 7, 10])
    given = torch.cat([torch.ones_like(wanted[:, :1]), wanted[:, :-1]], 1)
    logits = model(**inputs, decoder_input_ids=given, use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


def _next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    following = batch["input_ids"][:, 1:]
    logits = model(**batch, use_cache=False).logits[:, -following.shape[1] - 1 : -1]
    special = following >= logits.shape[-1] - 5
    each = functional.cross_entropy(logits.transpose(1, 2), following.masked_fill(special, -100), reduction="none")
    return each.sum(1) / (~special).sum(1)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif hasattr(output, "items"):
        for name, value in output.items():
            if name not in _ACROSS_ROWS:
                yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
