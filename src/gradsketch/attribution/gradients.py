"""Sketches of many examples' gradients at one checkpoint, in batches as large as memory takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.errors import NonFiniteError
from gradsketch.gradients.data import Batcher
from gradsketch.gradients.per_example.contributions import ByParameter
from gradsketch.gradients.per_example.sketcher import GradientSketcher
from gradsketch.gradients.tasks import Task

__all__ = ["GradientSource", "Sketched"]


@dataclass(frozen=True)
class Sketched:
    """Sketches and losses of examples in their own order; ``skipped`` gives the reason by position."""

    sketches: Float[Tensor, "n d"]
    losses: Float[Tensor, " n"]
    skipped: dict[int, str]


class GradientSource:
    """Sketches examples for one model and sketch; the batch size that memory allows is found once and kept."""

    def __init__(
        self, model: nn.Module, task: Task, sketch: ByParameter, *, batch_tokens: int = 4096, skip_bad: bool = False
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.d = model, sketch.d
        self.batcher = Batcher(task, tokens=batch_tokens, device=device)
        self.sketcher, self.skip_bad = GradientSketcher(model, task, sketch, on_non_finite="skip"), skip_bad

    def __call__(
        self,
        examples: Sequence[Any],
        lengths: Sequence[int] | None = None,
        advance: Callable[[int], Any] = lambda count: None,
        name: Callable[[int], str] = "example {}".format,
    ) -> Sketched:
        """Sketch examples, encoded or not, in evaluation mode (no dropout); ``advance`` hears of every batch done.

        ``name`` says what a person calls the example at a position, for errors.

        Raises:
            InputError: an example the task cannot read, or one too large for memory.
            NonFiniteError: a loss or gradient is not finite, and skipping was not asked for.
        """
        sketches = torch.empty(len(examples), self.d, dtype=torch.float32, device="cpu")
        losses = sketches.new_empty(len(examples))
        skipped: dict[int, str] = {}
        with evaluating(self.model, of_gradients=True):
            for places, result in self.batcher.map(self.sketcher, examples, lengths, name):
                sketches[places] = result.values.float().cpu()
                losses[places] = result.losses.float().cpu()
                skipped |= {places[position]: reason for position, reason in result.skipped.items()}
                if skipped and not self.skip_bad:
                    raise _not_finite(name, skipped)
                advance(len(places))
        losses[list(skipped)] = torch.nan
        return Sketched(sketches, losses, skipped)

    def keep_up(self, example: Any) -> None:
        """Sketch an encoded example, for nothing, until no rank of a sharded model has one of its own left."""
        with evaluating(self.model, of_gradients=True):
            self.sketcher.keep_up(self.batcher.batch([example]))


def _not_finite(name: Callable[[int], str], skipped: dict[int, str]) -> NonFiniteError:
    place, reason = next(iter(skipped.items()))
    return NonFiniteError(
        f"{name(place)}: {reason}",
        "finite losses and gradients",
        "Look at this example, compute in float32, or leave such rows out with skip_bad=True",
    )
