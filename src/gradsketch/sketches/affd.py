"""AFFD: two Walsh–Hadamard transforms around a random diagonal, the second one of length d only."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gradsketch.sketches.base import Sketch
from gradsketch.sketches.mixing import (
    BlockMixing,
    Mixing,
    WholeMixing,
    leading_transform,
    leading_transform_adjoint,
    power_of_two_at_least,
)
from gradsketch.transforms.diagonal import Diagonal, Normals, Signs
from gradsketch.transforms.pieces import piece_length

__all__ = ["AFFD"]

# Blocks of the local form. Inner products of vectors spread over many blocks do not notice it; the worst case keeps a
# variance of 6/4096. Longer blocks cost more: 1024 → 4096 adds a fifth, 4096 → 65536 another quarter.
_BLOCK = 4096


class AFFD(Sketch):
    """R_d · √(n/d) · H · G · H · B of [P], Theorem 3.2, at the cost of little more than one read of the vector.

    B holds random signs. ``diagonal="signs"`` (default) puts random signs in G too: the same mean, a slightly lower
    variance, 32 times fewer random numbers; ``"gaussian"`` is [P]'s. ``form="local"`` (default) makes the inner
    transform over blocks of 4096 entries, which leaves the variance of typical inner products, (1 + ρ²)/d for unit
    vectors, as it is; ``"global"`` makes it over the whole vector. The outer transform has length d in both.

    Source: [P] A. Schioppa, NeurIPS 2024 (arXiv 2402.03994), §3.

    Example:
        >>> phi = AFFD(1_000_000, 4096, seed=0)
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
        form: Literal["local", "global"] = "local",
        diagonal: Literal["signs", "gaussian"] = "signs",
    ) -> None:
        super().__init__(n, d, seed=seed)
        self.form = self._choice("form", form, ("local", "global"))
        self.diagonal = self._choice("diagonal", diagonal, ("signs", "gaussian"))
        self._whole = power_of_two_at_least(n)
        self._first = Signs(self.stream.child("B"), n)
        self._second = self._draw_diagonal()

    def options(self) -> dict[str, str | int | float | bool]:
        return {"form": self.form, "diagonal": self.diagonal}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        folded = self._mixing(x).fold(x, power_of_two_at_least(self.d))
        return leading_transform(folded, self.d)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        u = leading_transform_adjoint(w, power_of_two_at_least(self.d))
        return self._mixing(w).unfold(u, self.n)

    def _draw_diagonal(self) -> Diagonal:
        stream = self.stream.child("G")
        return Normals(stream) if self.diagonal == "gaussian" else Signs(stream, self._whole)

    def _mixing(self, x: Tensor) -> Mixing:
        length = min(_BLOCK, self._whole) if self.form == "local" else self._whole
        if length <= piece_length(x.device):
            return BlockMixing(self._first, length, self._second)
        return WholeMixing(self._first, length, self._second)
