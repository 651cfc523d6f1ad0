"""Which rows of a call belong to which example: guessed from shapes, proved on two examples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradsketch.gradients.per_example.contributions import Contribution

__all__ = ["Layout", "Layouts"]

# Leading dims [b, …]; one dim of b·t rows, example after example; no example dim at all; anything else.
Layout = Literal["first", "flat", "shared", "unknown"]


class Layouts:
    """The layout of every kind of call in one forward pass of ``examples`` examples.

    While proving, layouts are guessed from shapes, and ``check`` drops each that gives an example something while only
    the others' losses count. Later passes use what was proved: a shape that matches by chance, such as a sequence as
    long as the batch is large, then fools nobody. A batch of one needs no proof.
    """

    def __init__(self, examples: int, proved: dict[str, Layout] | None = None, *, may_share: bool = True) -> None:
        self.examples, self.proved, self.may_share = examples, proved, may_share
        self.guessed: dict[str, Layout] = {}
        self.idle: int | None = None
        self._lengths: set[int] = set()

    def split(self, call: str, leading: torch.Size) -> tuple[int, int] | None:
        """Return (b, t) for a call's leading dims, or None where the examples cannot be told apart."""
        count = leading.numel()
        if self.examples == 1:
            return 1, count
        layout = self._guess(leading)
        if not self._agreed(call, layout):
            return None
        if layout == "first":
            self._lengths.add(count // self.examples)
        return self.examples, count // self.examples

    def unshare(self, call: str, index: Tensor) -> Tensor:
        """Repeat an index that all examples share, ``[1, t]`` or ``[t]``, for every example."""
        if self.examples == 1:
            return index
        if index.ndim == 2 and index.shape[0] == 1:
            return index.expand(self.examples, -1)
        known = self.proved.get(call) if self.proved is not None else None
        unproved = self.proved is None and self.may_share and self._guess(index.shape) == "unknown"
        if index.ndim == 1 and (unproved or known == "shared"):
            self.guessed[call] = "shared"
            return index.expand(self.examples, -1)
        return index

    def note_flattening(self, before: torch.Size, after: torch.Size) -> None:
        """Remember that [b, t, …] became [b·t, …] in this pass: one dim of b·t rows is then believed."""
        merged = len(before) == len(after) + 1 and len(after) > 0 and before[2:] == after[1:]
        if merged and before[0] == self.examples and after[0] == before[0] * before[1]:
            self._lengths.add(before[1])

    def check(self, call: str, contribution: Contribution) -> None:
        """While proving: the idle example must get nothing."""
        if self.idle is not None and contribution.touches(self.idle):
            self.guessed[call] = "unknown"

    def _guess(self, leading: torch.Size) -> Layout:
        if len(leading) > 0 and leading[0] == self.examples:
            return "first"
        whole = len(leading) == 1 and leading[0] % self.examples == 0
        return "flat" if whole and leading[0] // self.examples in self._lengths else "unknown"

    def _agreed(self, call: str, layout: Layout) -> bool:
        if self.proved is not None:
            known = self.proved.get(call, "unknown")
            return known != "unknown" and layout == ("first" if known == "shared" else known)
        known = self.guessed.setdefault(call, layout)
        if known == "shared" and layout == "first":
            return True
        if known != layout:
            self.guessed[call] = "unknown"
        return self.guessed[call] != "unknown"
