"""SJLT: every coordinate is added, with random signs, to a few random places of the sketch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.recipe import register
from gradsketch.transforms.diagonal import SIGNS_AT_ONCE, Signs
from gradsketch.transforms.pieces import Piece, pieces

__all__ = ["SJLT"]


@register
class SJLT(Sketch):
    """Sparse Johnson–Lindenstrauss transform with ``nonzeros`` entries ±1/√nonzeros a column; 1 makes a CountSketch.

    Row r of the construction hashes into the places r, r + nonzeros, r + 2·nonzeros, … of the sketch, so ``nonzeros``
    divides d. Hashes are drawn again at every use. Sizes nest by folding. On CUDA the additions come in no fixed
    order, so the last bits may differ from call to call.

    Source: Kane and Nelson, "Sparser Johnson-Lindenstrauss Transforms", J. ACM 2014, block construction.

    Example:
        >>> phi = gs.SJLT(10_000, 512)
        >>> phi(torch.ones(10_000)).shape
        torch.Size([512])

    Raises:
        InputError: d is not a multiple of ``nonzeros``; or n or d is not allowed.
    """

    nesting = "fold"

    def __init__(self, n: int, d: int, *, seed: int = 0, nonzeros: int = 1) -> None:
        super().__init__(n, d, seed=seed)
        if isinstance(nonzeros, bool) or not isinstance(nonzeros, int) or nonzeros < 1 or d % nonzeros:
            below = d - d % nonzeros if isinstance(nonzeros, int) and 0 < nonzeros < d else d
            raise InputError(f"nonzeros={nonzeros!r} with d={d}", "a divisor of d", f"Type d={below} or nonzeros=1")
        self.nonzeros = nonzeros
        self._signs = [Signs(self.stream.child("signs", str(row)), n) for row in range(nonzeros)]
        self._hashes = [self.stream.child("hash", str(row)) for row in range(nonzeros)]

    def options(self) -> dict[str, str | int | float | bool]:
        return {"nonzeros": self.nonzeros}

    def truncate(self, d: int) -> Sketch:
        if d % self.nonzeros:
            raise InputError(
                f"truncate({d}) of {self!r}", f"a multiple of nonzeros={self.nonzeros}", f"Type {self.nonzeros}"
            )
        return super().truncate(d)

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self._apply_stretch(x, 0)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self._apply_adjoint_stretch(w, 0, self.n)

    @property
    def takes_stretches(self) -> bool:
        return True

    def _apply_stretch(self, x: Float[Tensor, "b m"], start: int) -> Float[Tensor, "b d"]:
        out = x.new_zeros(len(x), self.d, dtype=widened(x.dtype))
        lead = start % SIGNS_AT_ONCE
        x = functional.pad(x, (lead, 0)) if lead else x
        for piece in pieces(x.shape, 1, x.device):
            signed = out.new_empty(piece.count, piece.padded)
            for signs, places in self._rows(piece, start - lead, x.device):
                signs.multiply(piece.of(x), start - lead + piece.start, signed)
                for vector, sketch in zip(signed, out[piece.rows], strict=True):
                    sketch.index_add_(0, places, vector)
        return out.mul_(self.nonzeros**-0.5)

    def _apply_adjoint_stretch(self, w: Float[Tensor, "b d"], start: int, count: int) -> Float[Tensor, "b m"]:
        lead = start % SIGNS_AT_ONCE
        out = w.new_zeros(len(w), lead + count, dtype=widened(w.dtype))
        scaled = w.to(out.dtype) * self.nonzeros**-0.5
        for piece in pieces(out.shape, 1, w.device):
            for signs, places in self._rows(piece, start - lead, w.device):
                signed = scaled[piece.rows].index_select(1, places)
                signs.multiply(signed, start - lead + piece.start, signed)
                piece.of(out).add_(signed)
        return out[:, lead:]

    def _rows(self, piece: Piece, start: int, device: torch.device) -> Iterator[tuple[Signs, Int32[Tensor, " m"]]]:
        """Yield, row by row of the construction, its signs and the places the entries of a piece are hashed to.

        ``start`` is where the vector stands that was cut into pieces.
        """
        for row, (signs, stream) in enumerate(zip(self._signs, self._hashes, strict=True)):
            words = stream.words(start + piece.start, piece.stop - piece.start, device)
            # A remainder, not a multiple of the word, so that folding the sketch folds the hash.
            hashes = words.bitwise_and_(0x7FFFFFFF).remainder_(self.d // self.nonzeros)
            yield signs, hashes.mul_(self.nonzeros).add_(row)
