"""From a user's data to batches: the same at every pass, or as large as memory takes.

``Batcher`` sorts by length, longest first, so what does not fit fails in the first seconds; the budget of tokens that
fitted is kept for the rest of the run.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import Batch, Task

__all__ = [
    "Batcher",
    "Batches",
    "batch_length",
    "batch_slice",
    "differentiable",
    "each_tensor",
    "is_out_of_memory",
    "read_all",
    "tensors_of",
    "to_device",
    "without_padding",
]

Result = TypeVar("Result")


class Batches:
    """A fixed sequence of batches over a user's data, the same at every pass.

    ``data`` is one batch (a dict or tuple of tensors), a DataLoader that does not shuffle, or a sequence of raw
    examples, which the task collates ``batch_size`` at a time (``is_raw``).

    Raises:
        InputError: the data is empty, cannot be read twice (a generator), comes in another order at every pass, or
            holds examples of different shapes that the task does not pad.
    """

    def __init__(self, task: Task, data: Any, batch_size: int = 8) -> None:
        if isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r}", "a positive integer", "Leave it out for 8")
        self.task, self.data, self.batch_size = task, data, batch_size
        self._is_batch = _is_batch(data)
        self.is_raw = not (self._is_batch or isinstance(data, DataLoader))
        if isinstance(data, Iterator) or not hasattr(data, "__len__"):
            raise InputError(
                f"data of type {type(data).__name__}, which can be read only once",
                "a list, a dataset with a length, a DataLoader, or one batch of tensors",
                "Wrap it in list(...)",
            )
        self._count: int | None = None
        # An iterable has no order but its own; whether that is fixed shows in the losses of two passes.
        own_order = isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)
        if isinstance(data, DataLoader) and not own_order and not isinstance(data.sampler, SequentialSampler):
            raise InputError(
                f"a DataLoader with a {type(data.sampler).__name__}",
                "the same batches at every pass",
                "Build it with shuffle=False",
            )
        if not own_order and len(data) == 0:
            raise InputError("data that yields nothing", "at least one example", "Check the path or the filter")

    def __iter__(self) -> Iterator[Batch]:
        if self._is_batch:
            yield self.data
        elif isinstance(self.data, DataLoader):
            yield from self.data
        else:
            for start in range(0, len(self.data), self.batch_size):
                stop = min(start + self.batch_size, len(self.data))
                yield self._collated([self.data[i] for i in range(start, stop)])

    def __len__(self) -> int:
        if self._is_batch:
            return 1
        return self._counted() if isinstance(self.data, DataLoader) else -(-len(self.data) // self.batch_size)

    def _counted(self) -> int:
        """Return how many batches a DataLoader yields; one over an iterable without a length is read to know."""
        try:
            return len(self.data)
        except TypeError:
            if self._count is None:
                self._count = sum(1 for _ in self.data)
            return self._count

    def _collated(self, examples: list[Any]) -> Batch:
        try:
            return self.task.collate(examples)
        except RuntimeError as error:
            shapes = [[list(tensor.shape) for tensor in tensors_of(example)] for example in examples]
            if all(shape == shapes[0] for shape in shapes):
                raise
            raise InputError(
                f"examples whose tensors differ in shape, {shapes[0]} and {next(s for s in shapes if s != shapes[0])}",
                "examples that can be stacked, or a task whose collate pads them",
                "One batch of tensors must be a tuple or a dict: type tuple(data); several need a DataLoader",
            ) from error


class Batcher:
    """Runs work over raw examples in batches as large as memory takes.

    Examples of like length share a batch, longest first; a batch holds at most ``tokens`` tokens, padding included,
    and ``examples`` examples (but at least one). Where the work runs out of memory, ``tokens`` becomes half of what
    the batch held, for good, and the work goes on from there.

    Example:
        >>> batcher = Batcher(gs.CausalLM(), tokens=8)
        >>> data = [{"input_ids": [1] * length} for length in (2, 5, 4, 2)]
        >>> [(places, list(batch["input_ids"].shape)) for places, batch in batcher.map(lambda batch: batch, data)]
        [([1], [1, 5]), ([2, 0], [2, 4]), ([3], [1, 2])]

    Raises:
        InputError: an example the task cannot read, or one that runs out of memory alone; the message has its place.
    """

    def __init__(
        self, task: Task, *, tokens: int = 4096, examples: int = 64, device: torch.device | str = "cpu"
    ) -> None:
        for name, value in (("tokens", tokens), ("examples", examples)):
            if isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value!r}", "a positive integer", f"Type {name}=64")
        self.task, self.tokens, self.examples, self.device = task, tokens, examples, device

    def map(
        self,
        work: Callable[[Batch], Result],
        examples: Sequence[Any],
        lengths: Sequence[int] | None = None,
        name: Callable[[int], str] = "example {}".format,
    ) -> Iterator[tuple[list[int], Result]]:
        """Yield, for every batch, the places of its examples in ``examples`` and the work's result.

        Examples may be encoded. Where their lengths are given, those that are not are encoded a batch at a time.
        ``name`` says what a person calls the example at a place, for errors.
        """
        yield from self.map_placed(lambda batch, _: work(batch), examples, lengths, name)

    def map_placed(
        self,
        work: Callable[[Batch, list[int]], Result],
        examples: Sequence[Any],
        lengths: Sequence[int] | None = None,
        name: Callable[[int], str] = "example {}".format,
    ) -> Iterator[tuple[list[int], Result]]:
        """Do the same for work that is also told the places of a batch's examples."""
        if lengths is None:
            examples, lengths = read_all(self.task, examples)
        order = sorted(range(len(examples)), key=lambda place: -lengths[place])
        start = 0
        while start < len(order):
            longest = max(1, lengths[order[start]])
            places = order[start : start + max(1, min(self.examples, self.tokens // longest))]
            done, result = self._attempt(work, places, [examples[place] for place in places])
            if done:
                start += len(places)
                yield places, result
            elif len(places) > 1:
                self.tokens = max(1, len(places) * longest // 2)
            else:
                raise InputError(
                    f"{name(places[0])} of {longest} tokens does not fit into memory, even alone",
                    "examples that fit",
                    "Lower the task's max_length, or switch on gradient checkpointing",
                )

    def batch(self, examples: list[Any]) -> Batch:
        """Return encoded examples as one batch on the device."""
        return to_device(self.task.collate(examples), self.device)

    def _attempt(
        self, work: Callable[[Batch, list[int]], Result], places: list[int], examples: list[Any]
    ) -> tuple[bool, Any]:
        """Return (True, result), or (False, None) where memory ran out; nothing of the attempt is kept then."""
        try:
            return True, work(self.batch(examples), places)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, with the exception gone, are the tensors of the failed attempt free.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False, None


def read_all(
    task: Task, examples: Sequence[Any], name: Callable[[int], str] = "example {}".format
) -> tuple[list[Any], list[int]]:
    """Return the examples as the task's ``collate`` takes them, and their lengths.

    ``name`` says what a person calls the example at a place, for errors.

    Raises:
        InputError: an example that the task cannot read, with its place.
    """
    rows, lengths = [], []
    for place in range(len(examples)):
        try:
            rows.append(task.read(examples[place]))
            lengths.append(task.length(rows[-1]))
        except InputError as error:
            raise InputError(f"{name(place)}: {error.came}", error.wanted, error.fix) from error
    return rows, lengths


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
    )


def _is_batch(data: Any) -> bool:
    if isinstance(data, Tensor):
        return True
    values = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, tuple) else []
    return bool(values) and all(isinstance(v, Tensor) for v in values)


def batch_length(batch: Batch) -> int:
    """Return the number of examples: the first dim of the tensors in the batch, which must agree.

    Raises:
        InputError: no example, no tensor, or tensors whose first dims differ.
    """
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors_of(batch)}
    if len(sizes) == 1 and 0 not in sizes:
        return sizes.pop()
    raise InputError(
        f"a batch of tensors whose first dims are {sorted(sizes)}" if sizes else "a batch without a tensor",
        "tensors whose first dim counts the examples",
        "Collate the examples with task.collate(examples)",
    )


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Yield every tensor of a batch, whatever its type."""
    if isinstance(batch, Tensor):
        yield batch
    for _, value in _parts(batch):
        yield from tensors_of(value)


def batch_slice(batch: Batch, start: int, stop: int) -> Batch:
    """Return examples ``start … stop-1`` of a batch, of the batch's own type.

    Lists and arrays with an entry per example are cut as tensors are.

    Raises:
        InputError: a list of numbers, or an array, of another length.
    """
    length = batch_length(batch)

    def cut(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop]
        if not _counts(value):
            return value
        if len(value) == length:
            return value[start:stop]
        if isinstance(value, list | tuple) and not _has_numbers(value):
            return value
        raise InputError(
            f"{name or 'a field'} of length {len(value)} in a batch of {length} examples",
            "one entry per example, in a tensor, array or list",
            "Keep what all examples share in the loss function itself",
        )

    return _mapped(batch, cut)


def without_padding(row: Batch, keep: Collection[str] = ()) -> Batch | None:
    """Return a batch of one row without the columns at its ends that its ``attention_mask`` leaves out.

    Every field ``[1, t, …]`` is cut, but for those named in ``keep``. None where there is no padding or no mask.
    """
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(mask.any()):
        return None
    columns = mask[0].nonzero()[:, 0]
    first, last = int(columns[0]), int(columns[-1]) + 1
    if last - first == mask.shape[1]:
        return None

    def cut(value: Any, name: str) -> Any:
        along = isinstance(value, Tensor) and value.shape[:2] == mask.shape and name not in keep
        return value[:, first:last] if along else value

    return _mapped(row, cut)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with every tensor in it on ``device``."""
    return each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def differentiable(batch: Batch) -> Batch:
    """Return a copy for one pass: autograd can save its tensors, and a model may write to it or take fields out."""
    return each_tensor(batch, _differentiable)


def _differentiable(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with every tensor in it changed; its type stays."""
    return _mapped(batch, lambda value, _: change(value) if isinstance(value, Tensor) else value)


def _counts(value: Any) -> bool:
    """Whether a value that is no structure of tensors has entries: a list, a tuple or an array."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _has_numbers(values: Sequence[Any]) -> bool:
    return any(isinstance(v, int | float | np.number) or (_counts(v) and _has_numbers(v)) for v in values)


def _parts(batch: Batch) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a structure with their names; nothing where it is none, or holds no tensor."""
    if isinstance(batch, Mapping):
        yield from batch.items()
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from ((part.name, getattr(batch, part.name)) for part in fields(batch))
    elif isinstance(batch, list | tuple):
        yield from enumerate(batch)


def _mapped(batch: Batch, change: Callable[[Any, str], Any], name: str = "") -> Batch:
    """Return a batch of the same type with ``change(value, name)`` for every tensor, and whatever holds none."""
    if next(tensors_of(batch), None) is None or isinstance(batch, Tensor):
        return change(batch, name)
    parts = {key: _mapped(value, change, str(key)) for key, value in _parts(batch)}
    if isinstance(batch, list | tuple):
        return type(batch)(*parts.values()) if hasattr(batch, "_fields") else type(batch)(parts.values())
    if isinstance(batch, Mapping) and not isinstance(batch, MutableMapping):
        return parts
    changed = copy.copy(batch)
    for key, value in parts.items():
        if isinstance(changed, MutableMapping):
            changed[key] = value
        else:
            object.__setattr__(changed, key, value)  # also where a dataclass is frozen
    return changed
