"""Random batches of every kind: a first one of four rows, and a second one of three with other lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gradsketch as gs
from architectures.tiny import IMAGE, VOCABULARY

__all__ = [
    "Batches",
    "causal",
    "classified",
    "images",
    "masked",
    "noise",
    "pairs",
    "texts",
    "together",
    "with_images",
]

Batches = Callable[[], list[dict[str, Any]]]
_ROWS = 4, 3
_LENGTHS = (7, 5, 6, 3), (5, 4, 5)
_TARGETS = (3, 5, 4, 2), (4, 5, 3)
_LOWEST = 4  # smaller ids are special


def tokens(length: int, seed: int) -> list[int]:
    """Return token ids that are not special."""
    return torch.randint(_LOWEST, VOCABULARY - 5, (length,), generator=_random(seed)).tolist()


def causal(fixed: int | None = None) -> Batches:
    """Rows of different lengths, of one length where a model wants that; one answers a prompt."""

    def rows(lengths: Sequence[int], seed: int) -> list[dict[str, list[int]]]:
        made = [{"input_ids": tokens(fixed or length, seed + i)} for i, length in enumerate(lengths)]
        made[2]["labels"] = [-100, -100, *made[2]["input_ids"][2:]]
        return [{"labels": row["input_ids"], **row} for row in made]

    return _collated(gs.CausalLM(), rows)


def masked(fixed: int | None = None) -> Batches:
    """Rows of which every second token is hidden."""

    def rows(lengths: Sequence[int], seed: int) -> list[dict[str, list[int]]]:
        return [_hidden(tokens(fixed or length, seed + i)) for i, length in enumerate(lengths)]

    return _collated(gs.MaskedLM(), rows)


def classified(fixed: int | None = None, last: int | None = None) -> Batches:
    """Labelled rows; they end with the token ``last`` where a model reads its answer there."""

    def rows(lengths: Sequence[int], seed: int) -> list[dict[str, Any]]:
        made = [tokens(fixed or length, seed + i) for i, length in enumerate(lengths)]
        ids = [row if last is None else [*row[:-1], last] for row in made]
        return [{"input_ids": row, "label": i % 3} for i, row in enumerate(ids)]

    return _collated(gs.Classification(), rows)


def pairs(fixed: int | None = None) -> Batches:
    """Sources and targets, both of different lengths."""

    def rows(lengths: Sequence[int], seed: int) -> list[dict[str, list[int]]]:
        targets = _TARGETS[seed > 0]
        return [
            {"input_ids": tokens(fixed or length, seed + i), "labels": tokens(target, seed + 500 + i)}
            for i, (length, target) in enumerate(zip(lengths, targets, strict=True))
        ]

    return _collated(gs.Seq2SeqLM(), rows)


def texts(fixed: int | None = None) -> Batches:
    """Token ids and their mask, nothing to predict."""
    return lambda: [{name: value for name, value in b.items() if name != "labels"} for b in causal(fixed)()]


def images(*size: int, name: str = "pixel_values", labels: bool = True) -> Batches:
    """Random images (or films, or anything else of that size), with labels."""
    return noise(name, *(size if len(size) > 1 else (3, *(size or (IMAGE,)) * 2)), labels=labels)


def noise(name: str, *size: int, labels: bool = True) -> Batches:
    """Normal numbers of a given size under the name of a model's input, with labels."""

    def batch(rows: int, seed: int) -> dict[str, Tensor]:
        values = {name: torch.randn(rows, *size, generator=_random(seed), dtype=torch.float64)}
        return {**values, "labels": torch.arange(rows) % 3} if labels else values

    return lambda: [batch(rows, seed) for seed, rows in enumerate(_ROWS)]


def with_images(count: int, pixels: Batches, token: int = VOCABULARY - 1, **more: Any) -> Batches:
    """Texts of one length that hold ``count`` places for an image, and the image; ``more`` stands in every row."""

    def batch(seed: int, pictures: dict[str, Tensor]) -> dict[str, Any]:
        rows = len(next(iter(pictures.values())))
        ids = torch.tensor([tokens(count + 6 + seed, 100 * seed + i) for i in range(rows)])
        ids[:, 1 : 1 + count] = token
        extra = {name: torch.tensor(value).expand(rows, *torch.tensor(value).shape) for name, value in more.items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures, **extra}

    return lambda: [batch(seed, pictures) for seed, pictures in enumerate(pixels())]


def together(*parts: Batches) -> Batches:
    """Batches that hold the inputs of all parts."""
    return lambda: [
        {name: value for part in same for name, value in part.items()}
        for same in zip(*(part() for part in parts), strict=True)
    ]


def _collated(task: gs.Task, rows: Callable[[Sequence[int], int], list[Any]]) -> Batches:
    return lambda: [task.collate(rows(lengths, 10 * i)) for i, lengths in enumerate(_LENGTHS)]


def _hidden(ids: list[int]) -> dict[str, list[int]]:
    shown = [5 if t % 2 else token for t, token in enumerate(ids)]
    return {"input_ids": shown, "labels": [token if t % 2 else -100 for t, token in enumerate(ids)]}


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
