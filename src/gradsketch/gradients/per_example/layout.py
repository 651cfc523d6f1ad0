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
        self.spoilt = False  # something not finite was seen, which is no proof of anything
        self._lengths: set[int] = set()
        # A checkpointed layer runs again during backward and must then decide as it did, whatever was learnt since.
        self._splits: dict[tuple[str, torch.Size], bool] = {}
        self._shared: dict[tuple[str, torch.Size], bool] = {}

    def split(self, call: str, leading: torch.Size) -> tuple[int, int] | None:
        """Return (b, t) for a call's leading dims, or None where the examples cannot be told apart."""
        count = leading.numel()
        if self.examples == 1:
            return 1, count
        if (call, leading) not in self._splits:
            self._splits[call, leading] = self._splittable(call, leading)
        return (self.examples, count // self.examples) if self._splits[call, leading] else None

    def unshare(self, call: str, index: Tensor) -> Tensor:
        """Repeat an index that all examples share, ``[1, t]`` or ``[t]``, for every example."""
        if self.examples == 1:
            return index
        if (call, index.shape) not in self._shared:
            self._shared[call, index.shape] = self._shareable(call, index.shape)
        return index.expand(self.examples, -1) if self._shared[call, index.shape] else index

    def note_flattening(self, before: torch.Size, after: torch.Size) -> None:
        """Remember that [b, t, …] became [b·t, …] in this pass: one dim of b·t rows is then believed."""
        merged = len(before) == len(after) + 1 and len(after) > 0 and before[2:] == after[1:]
        if merged and before[0] == self.examples and after[0] == before[0] * before[1]:
            self._lengths.add(before[1])

    def check(self, call: str, contribution: Contribution) -> None:
        """While proving: the idle example must get nothing."""
        if self.idle is None:
            return
        self.spoilt |= not all(bool(torch.isfinite(factor).all()) for factor in contribution.factors())
        if contribution.touches(self.idle):
            self.guessed[call] = "unknown"

    def _splittable(self, call: str, leading: torch.Size) -> bool:
        layout = self._guess(leading)
        agreed = self._agreed(call, layout)
        if agreed and layout == "first":
            self._lengths.add(leading.numel() // self.examples)
        return agreed

    def _shareable(self, call: str, shape: torch.Size) -> bool:
        if len(shape) == 2 and shape[0] == 1:
            return True
        known = self.proved.get(call) if self.proved is not None else None
        unproved = self.proved is None and self.may_share and self._guess(shape) == "unknown"
        if len(shape) != 1 or not (unproved or known == "shared"):
            return False
        self.guessed[call] = "shared"
        return True

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
