"""AFJL: one orthonormal transform between two random diagonals."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.forms import (
    AsPrinted,
    FoldedBlocks,
    Form,
    Preconditioner,
    preconditioner,
)
from gradsketch.sketches.recipe import register
from gradsketch.transforms.diagonal import Normals, Signs

__all__ = ["AFJL"]


@register
class AFJL(Sketch):
    """R_d · √(n/d) · G · H · B: the cheapest sketch, one read of the vector.

    B holds random signs, G a second random diagonal, H is a Walsh–Hadamard transform. Choices:

    * ``form="global"`` (default): computed as G · H_d · fold_d · B, which is the same map.
    * ``form="paper"``: [P] as printed, with a permutation inside each Kronecker factor, and with ``transform="fft"``
      or ``"haar"`` in place of Hadamard (and without B for "haar").
    * ``diagonal="signs"`` (default): random signs in G, an isometry. The sketch is then a CountSketch with the hash
      j mod d, in another basis; typical variance of a squared norm 2/d. ``"gaussian"``, [P]'s and the default of the
      paper's form, has 8/d.

    Every form sends (e_j ± e_k)/√2 with j ≡ k mod d to zero half of the time, for every d. Gradients of layers whose
    widths are powers of two are structured like that: benchmarks/sketch_quality.py finds a higher error than AFFD's on
    real ones. Prefer AFFD, or SJLT, unless time is all. Sizes nest as prefixes.

    Source: [P] A. Schioppa, NeurIPS 2024 (arXiv 2402.03994), §3.

    Example:
        >>> phi = gs.AFJL(1_000_000, 4096, seed=0)
        >>> phi.lift(torch.zeros(4096)).shape
        torch.Size([1000000])

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
        form: Literal["global", "paper"] | None = None,
        transform: Preconditioner = "hadamard",
        diagonal: Literal["signs", "gaussian"] | None = None,
    ) -> None:
        super().__init__(n, d, seed=seed)
        self.transform = self._choice("transform", transform, ("hadamard", "fft", "haar"))
        form = form or ("global" if transform == "hadamard" else "paper")
        self.form = self._choice("form", form, ("global", "paper"))
        diagonal = diagonal or ("gaussian" if form == "paper" else "signs")
        self.diagonal = self._choice("diagonal", diagonal, ("signs", "gaussian"))
        if transform != "hadamard" and form != "paper":
            raise InputError(f"form={form!r} with transform={transform!r}", "form='paper'", "Leave form out")
        stream = self.stream.child("G")
        self._second = Normals(stream) if self.diagonal == "gaussian" else Signs(stream, n)
        self._form = self._build()

    def options(self) -> dict[str, str | int | float | bool]:
        return {"form": self.form, "transform": self.transform, "diagonal": self.diagonal}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self._scaled(self._form.sketch(x, self.d))

    def _apply_overwriting(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self._scaled(self._form.sketch(x, self.d, overwrite=True))

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self._form.lift(self._scaled(w.to(widened(w.dtype), copy=True)), self.n)

    @property
    def takes_stretches(self) -> bool:
        return isinstance(self._form, FoldedBlocks)

    def _apply_stretch(self, x: Float[Tensor, "b m"], start: int) -> Float[Tensor, "b d"]:
        assert isinstance(self._form, FoldedBlocks)
        return self._scaled(self._form.sketch_stretch(x, self.d, start))

    def _apply_adjoint_stretch(self, w: Float[Tensor, "b d"], start: int, count: int) -> Float[Tensor, "b m"]:
        assert isinstance(self._form, FoldedBlocks)
        return self._form.lift_stretch(self._scaled(w.to(widened(w.dtype), copy=True)), start, count)

    def _scaled(self, sketch: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        self._second.multiply(sketch, 0, sketch)
        return sketch

    def _build(self) -> Form:
        first = Signs(self.stream.child("B"), self.n)
        if self.form == "global":
            return FoldedBlocks(first, 1, None)
        inner = preconditioner(self.transform, self.n, self.stream.child("H'"))
        return AsPrinted(None if self.transform == "haar" else first, inner)
