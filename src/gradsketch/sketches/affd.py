"""AFFD: two orthonormal transforms around a random diagonal.

The default is local, with signs. By the fold identity the outer transform has length d. Blocks of H_4096 in place of
the inner H_n leave the variance formula as it is for d ≤ 4096, and make the sketch one read of the vector. Signs in
place of Gaussians lower the variance a little and need 1/32 of the random numbers. AFJL is cheaper still, and worse on
gradients of layers whose widths are powers of two, because it folds them onto each other
(benchmarks/sketch_quality.py).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.forms import (
    AsPrinted,
    FoldedBlocks,
    FoldedWhole,
    Form,
    Preconditioner,
    power_of_two_at_least,
    preconditioner,
)
from gradsketch.sketches.recipe import register
from gradsketch.transforms.diagonal import Normals, Signs
from gradsketch.transforms.hadamard import Hadamard
from gradsketch.transforms.pieces import piece_length

__all__ = ["AFFD"]

# Blocks of the local form, three products of width 16. Inner products of vectors spread over many blocks do not notice
# them; the worst case keeps a variance of order 1/4096. Longer blocks cost one product more for every factor of 16.
_BLOCK = 4096


@register
class AFFD(Sketch):
    """R_d · √(n/d) · H · G · H · B: dense quality for little more than one read of the vector.

    B holds random signs, G a second random diagonal, H is a Walsh–Hadamard transform. Choices:

    * ``form="local"`` (default): the inner transform acts on blocks of 4096 entries, in cache. The variance of inner
      products of vectors spread over many blocks, (1 + ρ²)/d for unit vectors, stays what it is.
    * ``form="global"``: the inner transform acts on the whole vector; one vector of working memory.
    * ``form="paper"``: [P] as printed, with a permutation inside each Kronecker factor of both transforms, and with
      ``transform="fft"`` or ``"haar"`` in place of Hadamard (and without B for "haar"). Slower, no better.
    * ``diagonal="signs"`` (default): random signs in G. The same mean, a slightly lower variance and 32 times fewer
      random numbers than ``"gaussian"``, which is [P]'s and the default of the paper's form.

    The two fast forms never make the outer transform of length n. Sizes nest as prefixes.

    Source: [P] A. Schioppa, NeurIPS 2024 (arXiv 2402.03994), §3 and Theorem 3.2.

    Example:
        >>> phi = gs.AFFD(1_000_000, 4096, seed=0)
        >>> phi(torch.zeros(2, 1_000_000)).shape
        torch.Size([2, 4096])

    Raises:
        InputError: n, d or an option is not one of those allowed.
    """

    nesting = "prefix"

    def __init__(
        self,
        n: int,
        d: int,
        *,
        seed: int = 0,
        form: Literal["local", "global", "paper"] | None = None,
        transform: Preconditioner = "hadamard",
        diagonal: Literal["signs", "gaussian"] | None = None,
    ) -> None:
        super().__init__(n, d, seed=seed)
        self.transform = self._choice("transform", transform, ("hadamard", "fft", "haar"))
        form = form or ("local" if transform == "hadamard" else "paper")
        self.form = self._choice("form", form, ("local", "global", "paper"))
        diagonal = diagonal or ("gaussian" if form == "paper" else "signs")
        self.diagonal = self._choice("diagonal", diagonal, ("signs", "gaussian"))
        if transform != "hadamard" and form != "paper":
            raise InputError(f"form={form!r} with transform={transform!r}", "form='paper'", "Leave form out")
        self._form = self._build()

    def options(self) -> dict[str, str | int | float | bool]:
        return {"form": self.form, "transform": self.transform, "diagonal": self.diagonal}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self._form.sketch(x, self.d)

    def _apply_overwriting(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self._form.sketch(x, self.d, overwrite=True)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self._form.lift(w, self.n)

    @property
    def takes_stretches(self) -> bool:
        return isinstance(self._form, FoldedBlocks)

    def _apply_stretch(self, x: Float[Tensor, "b m"], start: int) -> Float[Tensor, "b d"]:
        assert isinstance(self._form, FoldedBlocks)
        return self._form.sketch_stretch(x, self.d, start)

    def _apply_adjoint_stretch(self, w: Float[Tensor, "b d"], start: int, count: int) -> Float[Tensor, "b m"]:
        assert isinstance(self._form, FoldedBlocks)
        return self._form.lift_stretch(w, start, count)

    def _build(self) -> Form:
        whole = power_of_two_at_least(self.n)
        first = Signs(self.stream.child("B"), self.n)
        stream = self.stream.child("G")
        second = Normals(stream) if self.diagonal == "gaussian" else Signs(stream, whole)
        if self.form == "paper":
            inner, outer = (preconditioner(self.transform, self.n, self.stream.child(name)) for name in ("H'", "H''"))
            return AsPrinted(None if self.transform == "haar" else first, inner, second, outer)
        length = min(_BLOCK, whole) if self.form == "local" else whole
        if length <= piece_length(torch.device("cpu")):
            return FoldedBlocks(first, length, second)
        return FoldedWhole(first, Hadamard(length), second)
