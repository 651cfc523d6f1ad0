"""Labels drawn from a model's own distribution, with which the mean outer product of gradients is the true Fisher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsketch.random import Stream

__all__ = ["Draws"]

# Random numbers of one example: it may have so many predictions.
_AN_EXAMPLE = 1 << 24


class Draws:
    """Draws classes from logits; what an example draws depends on its place in the data, not on its batch.

    Example:
        >>> from gradsketch.gradients.factors.labels import Draws
        >>> Draws(0, places=[7])(torch.tensor([[0.0, 50.0]]))
        tensor([1])
    """

    def __init__(self, seed: int, places: Sequence[int]) -> None:
        self._stream, self._places = Stream(seed, "labels"), places

    def __call__(self, logits: Float[Tensor, "b *t c"]) -> Int[Tensor, "b ..."]:
        """Return one class for each row of logits."""
        return torch.stack([self._drawn(*pair) for pair in zip(logits, self._places, strict=True)])

    def _drawn(self, logits: Float[Tensor, "*t c"], place: int) -> Int[Tensor, " ..."]:
        """Invert the distribution function of one example's predictions."""
        below = logits.detach().double().softmax(-1).cumsum(-1).view(-1, logits.shape[-1])
        uniform = self._stream.uniforms(place * _AN_EXAMPLE, len(below), device=logits.device)
        # The last sum is one up to rounding only.
        drawn = torch.searchsorted(below, (uniform * below[:, -1])[:, None]).clamp_max(logits.shape[-1] - 1)
        return drawn.view(logits.shape[:-1])
