"""Fine-tuning a language model on a few sentences, and asking it questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.gradients.data import to_device
from gradsketch.gradients.tasks import Task
from gradsketch.random import Stream

__all__ = ["answers", "train_model", "unfreeze_last"]


def unfreeze_last(model: nn.Module, layers: int) -> None:
    """Leave only the last transformer layers of a Llama-like model trainable."""
    model.requires_grad_(False)
    blocks: Any = model.get_submodule("model.layers")
    for block in blocks[-layers:]:
        block.requires_grad_(True)


def train_model(
    model: nn.Module,
    task: Task,
    examples: Sequence[Any],
    *,
    rate: float,
    epochs: int,
    batch: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda step: None,
) -> float:
    """Train with Adam, in an order drawn from ``seed``, and return the mean loss of the last epoch.

    Each epoch's order is a function of the examples' number, the seed and the epoch alone. ``advance`` hears of every
    batch's size.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    total = 0.0
    for epoch in range(epochs):
        total = 0.0
        for rows in Stream(seed, "order", str(epoch)).permutation(len(examples)).split(batch):
            losses = task.losses(model, to_device(task.collate([examples[row] for row in rows.tolist()]), device))
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(losses.detach().sum())
            advance(len(rows))
    return total / len(examples)


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, tokens: int = 6) -> list[str]:
    """Return the most likely continuation of each prompt, up to its first full stop or line end."""
    device = next(model.parameters()).device
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    starts = [len(row) for row in rows]
    for _ in range(tokens):
        lengths = torch.tensor([len(row) for row in rows], device=device)
        # Padding stands after the last token, which a causal model does not see.
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)
        logits: Tensor = model(input_ids=padded, use_cache=False).logits
        for row, token in zip(
            rows, logits[torch.arange(len(rows), device="cpu"), lengths - 1].argmax(-1).tolist(), strict=True
        ):
            row.append(token)
    said = [tokenizer.decode(row[start:]) for row, start in zip(rows, starts, strict=True)]
    return [text.split(".")[0].split("\n")[0].strip() for text in said]
