"""The numbers of a tiled sketch: kept entries, in order, added up with random signs."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.random import Stream

__all__ = ["Run", "Sums", "sums_stream"]


class Run(NamedTuple):
    """Entries ``begin`` to ``end``, the first of which is added to number ``first``."""

    first: int
    begin: int
    end: int


class Sums:
    """d numbers, each a sum of several of the ``kept`` entries with random signs, or one of them, or none.

    More entries than numbers are added in rounds. Each round begins at a random number, so that the entries of one
    number rarely share a row or a column: without that the noise on inputs of rank one was 16 % above the model's.
    Fewer entries are spread evenly over the numbers, from a random start.

    ``layout_d`` is the size the entries were chosen for, d unless this is the prefix of a larger sketch.
    """

    def __init__(self, kept: int, d: int, layout_d: int, scale: float, stream: Stream) -> None:
        self.kept, self.d, self.layout_d, self.scale, self.stream = kept, d, layout_d, scale, stream
        self.adds = kept > layout_d
        self.step = 1 if self.adds else layout_d // kept

    @property
    def starts(self) -> list[int]:
        """The number to which the first entry of each round is added."""
        if not self.adds:
            free = self.layout_d - (self.kept - 1) * self.step
            return [int(self.stream.child("start").integers(0, 1, free))]
        rounds = -(-self.kept // self.layout_d)
        starts: list[int] = self.stream.child("starts").integers(0, rounds, self.layout_d).tolist()
        return starts

    @cached_property
    def runs(self) -> list[Run]:
        """Which entries are added to numbers that lie ``step`` apart; those beyond d belong to the larger sketch."""
        if not self.adds:
            (start,) = self.starts
            runs = [Run(start, 0, self.kept)]
        else:
            runs = []
            for begin, start in zip(range(0, self.kept, self.layout_d), self.starts, strict=True):
                end = min(begin + self.layout_d, self.kept)
                turn = min(begin + self.layout_d - start, end)
                runs += [Run(start, begin, turn), Run(0, turn, end)]
        ends = [min(run.end, run.begin + -(-(self.d - run.first) // self.step)) for run in runs]
        cut = [run._replace(end=end) for run, end in zip(runs, ends, strict=True)]
        return [run for run in cut if run.end > run.begin]

    def signs(self, like: Tensor) -> Float[Tensor, " kept"] | None:
        """Return the sign of each entry, or None where each is a number of its own."""
        return _signs(self.stream.seed, self.kept, like.dtype, like.device) if self.adds else None

    def add(self, out: Float[Tensor, "b d"], entries: Float[Tensor, "b at_least_kept"]) -> None:
        """Add the numbers, scaled."""
        signs = self.signs(entries)
        signed = entries if signs is None else entries[:, : self.kept] * signs
        for run in self.runs:
            self._numbers(out, run).add_(signed[:, run.begin : run.end], alpha=self.scale)

    def adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b kept"]:
        """Return what each kept entry is multiplied with: the adjoint of the sums, without the scale."""
        entries = w.new_zeros(len(w), self.kept)
        for run in self.runs:
            entries[:, run.begin : run.end] = self._numbers(w, run)
        signs = self.signs(w)
        return entries if signs is None else entries * signs

    def _numbers(self, out: Float[Tensor, "b d"], run: Run) -> Float[Tensor, "b run"]:
        return out[:, run.first : run.first + (run.end - run.begin - 1) * self.step + 1 : self.step]


@lru_cache(maxsize=8)
def _signs(seed: int, count: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " count"]:
    """Return the signs of entries, the same for all matrices of a sketch: their sides have signs of their own."""
    return sums_stream(seed).signs(0, count, dtype=dtype, device=device)


def sums_stream(seed: int) -> Stream:
    """Return the stream of the signs with which entries are added up."""
    return Stream(seed, "Tiling", "sums")
