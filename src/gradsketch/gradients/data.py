"""From a user's data to batches that can be read again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import Batch, Task

__all__ = ["Batches", "batch_length", "to_device"]


class Batches:
    """A fixed sequence of batches over a user's data, the same at every pass.

    ``data`` is one batch (a dict or tuple of tensors), a DataLoader, or a sequence of raw examples, which the task
    collates ``batch_size`` at a time.

    Raises:
        InputError: the data is empty or cannot be read twice (a generator).
    """

    def __init__(self, task: Task, data: Any, batch_size: int = 8) -> None:
        self.task, self.data, self.batch_size = task, data, batch_size
        self._is_batch = _is_batch(data)
        if isinstance(data, Iterator) or not hasattr(data, "__len__"):
            raise InputError(
                f"data of type {type(data).__name__}, which can be read only once",
                "a list, a dataset with a length, a DataLoader, or one batch of tensors",
                "Wrap it in list(...)",
            )
        if len(data) == 0:
            raise InputError("data that yields nothing", "at least one example", "Check the path or the filter")

    def __iter__(self) -> Iterator[Batch]:
        if self._is_batch:
            yield self.data
        elif isinstance(self.data, DataLoader):
            yield from self.data
        else:
            for start in range(0, len(self.data), self.batch_size):
                stop = min(start + self.batch_size, len(self.data))
                yield self.task.collate([self.data[i] for i in range(start, stop)])

    def __len__(self) -> int:
        if self._is_batch:
            return 1
        return len(self.data) if isinstance(self.data, DataLoader) else -(-len(self.data) // self.batch_size)


def _is_batch(data: Any) -> bool:
    if isinstance(data, Tensor):
        return True
    values = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, tuple) else []
    return bool(values) and all(isinstance(v, Tensor) for v in values)


def batch_length(batch: Batch) -> int:
    """Return the number of examples: the first dim of the first tensor found."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    values: Sequence[Any] = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    return next(batch_length(v) for v in values if isinstance(v, Tensor | Mapping | tuple | list))


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with every tensor in it on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
