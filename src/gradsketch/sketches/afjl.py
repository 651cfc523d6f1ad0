"""AFJL: add up the signed blocks of a vector, transform, multiply by a random diagonal of length d."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.sketches.base import Sketch
from gradsketch.sketches.mixing import (
    BlockMixing,
    leading_transform,
    leading_transform_adjoint,
    power_of_two_at_least,
)
from gradsketch.transforms.diagonal import Diagonal, Normals, Signs

__all__ = ["AFJL"]


class AFJL(Sketch):
    """R_d · √(n/d) · G · H · B of [P], computed as G_d · H_d · fold_d · B: one read of the vector.

    B holds random signs. ``diagonal="signs"`` (default) puts random signs in G too, which makes the map a signed
    CountSketch with the hash j mod d, seen in a Hadamard basis: typical variance of a squared norm 2/d.
    ``"gaussian"`` is [P]'s and has 8/d. Either maps (e_j ± e_k)/√2 with j ≡ k mod d to zero half of the time, for
    every d: prefer AFFD where inputs may be that structured.

    Source: [P] A. Schioppa, NeurIPS 2024 (arXiv 2402.03994), §3.

    Raises:
        InputError: n, d or an option is not one of those allowed.
    """

    nesting = "prefix"

    def __init__(self, n: int, d: int, *, seed: int = 0, diagonal: Literal["signs", "gaussian"] = "signs") -> None:
        super().__init__(n, d, seed=seed)
        self.diagonal = self._choice("diagonal", diagonal, ("signs", "gaussian"))
        self._mixing = BlockMixing(Signs(self.stream.child("B"), n), 1, None)
        self._second = self._draw_diagonal()

    def options(self) -> dict[str, str | int | float | bool]:
        return {"diagonal": self.diagonal}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        sketch = leading_transform(self._mixing.fold(x, power_of_two_at_least(self.d)), self.d)
        self._second.multiply(sketch, 0, sketch)
        return sketch

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        scaled = torch.empty_like(w, dtype=torch.float64 if w.dtype == torch.float64 else torch.float32)
        self._second.multiply(w, 0, scaled)
        return self._mixing.unfold(leading_transform_adjoint(scaled, power_of_two_at_least(self.d)), self.n)

    def _draw_diagonal(self) -> Diagonal:
        stream = self.stream.child("G")
        return Normals(stream) if self.diagonal == "gaussian" else Signs(stream, self.n)
