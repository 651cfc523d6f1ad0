"""One pass over data, in which every contribution to a gradient adds to the moments of its parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from gradsketch.errors import NonFiniteError
from gradsketch.gradients.data import Batcher, Batches, batch_length, to_device
from gradsketch.gradients.factors.labels import Draws
from gradsketch.gradients.factors.moments import Moments
from gradsketch.gradients.per_example.capture import Capture
from gradsketch.gradients.per_example.contributions import Consumer, Contribution
from gradsketch.gradients.tasks import Batch

__all__ = ["Pass"]

_Moments = TypeVar("_Moments", bound="Addable")


@runtime_checkable
class Addable(Moments, Protocol):
    """Moments that add up over batches."""

    def merge(self, other: Any, /) -> None:
        """Add what another has seen."""

    @property
    def is_finite(self) -> bool:
        """Whether all that was seen is."""


class Pass(Generic[_Moments]):
    """Adds batch after batch up; ``fresh`` returns moments without content, by parameter.

    With a ``seed`` labels are drawn from the model; without one they are those of the data.
    """

    def __init__(
        self, model: nn.Module, capture: Capture, fresh: Callable[[], dict[str, _Moments]], seed: int | None
    ) -> None:
        self.model, self.capture, self.fresh, self.seed = model, capture, fresh, seed
        self.moments, self.examples = fresh(), 0

    def over(self, batches: Batches, tokens: int, advance: Callable[[int], object]) -> None:
        """Work through the data, in batches as large as memory takes where they are made here.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        for count in self._mapped(batches, tokens):
            advance(count)
        for name, part in self.moments.items():
            if not part.is_finite:
                raise NonFiniteError(
                    f"the gradients of {name} are not finite for an example of the data",
                    "finite gradients",
                    "Sketch them with sketch_gradients, which names the example",
                )

    def _mapped(self, batches: Batches, tokens: int) -> Iterator[int]:
        device = next(iter(self.capture.tensors.values())).device
        if batches.is_raw:
            batcher = Batcher(batches.task, tokens=tokens, device=device)
            yield from (len(places) for places, _ in batcher.map_placed(self._add, batches.data))
            return
        start = 0
        for batch in batches:
            count = batch_length(batch)
            self._add(to_device(batch, device), list(range(start, start + count)))
            start += count
            yield count

    def _add(self, batch: Batch, places: list[int]) -> None:
        if self.seed is not None:
            with torch.no_grad():
                batch = self.capture.task.sampled(self.model, batch, Draws(self.seed, places))
        attempt: list[_OneBatch[_Moments]] = []

        def begin() -> Consumer:
            attempt[:] = [_OneBatch(self.fresh(), self.capture.tensors, batch_length(batch))]
            return attempt[0]

        losses = self.capture(batch, begin)
        for name, moments in attempt[0].finished().items():
            self.moments[name].merge(moments)
        self.examples += len(losses)


class _OneBatch(Generic[_Moments]):
    """Moments of one batch, and the gradients of its vectors, which add up over their uses before they are squared."""

    def __init__(self, moments: dict[str, _Moments], tensors: Mapping[str, Tensor], count: int) -> None:
        self._moments, self._tensors, self._count = moments, tensors, count
        self._vectors: dict[str, Tensor] = {}

    def __call__(self, name: str, contribution: Contribution, which: slice) -> None:
        tensor = self._tensors[name]
        if tensor.ndim > 1:
            contribution.measure(self._moments[name])
            return
        gradient = contribution.dense(1, tensor.numel()).flatten(1)
        if name not in self._vectors:
            self._vectors[name] = gradient.new_zeros(self._count, tensor.numel())
        self._vectors[name][which] += gradient

    def finished(self) -> dict[str, _Moments]:
        for name, gradient in self._vectors.items():
            self._moments[name].add_gradient(gradient)
        return self._moments
