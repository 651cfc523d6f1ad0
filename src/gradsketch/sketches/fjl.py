"""FJL: a sparse Gaussian matrix after a random rotation."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.forms import power_of_two_at_least
from gradsketch.sketches.recipe import register
from gradsketch.transforms.diagonal import Signs
from gradsketch.transforms.hadamard import Hadamard
from gradsketch.transforms.pieces import piece_length, pieces

__all__ = ["FJL"]


@register
class FJL(Sketch):
    """√(n/d) · G_s · H · B with G_s a sparse Gaussian matrix: the fast Johnson–Lindenstrauss transform.

    Each row of G_s holds ``nonzeros`` independent normals, over √nonzeros, at random places drawn with replacement.
    The theory asks for log² M of them to embed M vectors; 128 is log² of 80 000. A baseline: every output gathers
    from all over memory, and the cost grows with d. Sizes nest as prefixes.

    Source: Ailon and Chazelle, "The fast Johnson–Lindenstrauss transform", SIAM J. Comput. 2009; [P] §3.

    Example:
        >>> phi = gs.FJL(100_000, 256)
        >>> phi(torch.zeros(3, 100_000)).shape
        torch.Size([3, 256])

    Raises:
        InputError: ``nonzeros`` is not a positive integer; or n or d is not allowed.
    """

    nesting = "prefix"

    def __init__(self, n: int, d: int, *, seed: int = 0, nonzeros: int = 128) -> None:
        super().__init__(n, d, seed=seed)
        if isinstance(nonzeros, bool) or not isinstance(nonzeros, int) or nonzeros < 1:
            raise InputError(f"nonzeros={nonzeros!r}", "a positive integer", "Leave it out, or type nonzeros=128")
        self.nonzeros = nonzeros
        self._signs = Signs(self.stream.child("B"), n)
        self._places, self._values = self.stream.child("places"), self.stream.child("values")
        self._length = power_of_two_at_least(n)
        self._scale = (self._length / d / nonzeros) ** 0.5

    def options(self) -> dict[str, str | int | float | bool]:
        return {"nonzeros": self.nonzeros}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        out = x.new_empty(len(x), self.d, dtype=widened(x.dtype))
        work = out.new_empty(1, self._length)
        for vector, sketch in zip(x.split(1), out, strict=True):
            for piece in pieces(vector.shape, 1, x.device):
                self._signs.multiply(piece.of(vector), piece.start, piece.of(work))
            work[:, self.n :] = 0
            Hadamard(self._length).apply_(work)
            for rows, places, values in self._chunks(out):
                sketch[rows] = (work[0, places] * values).sum(-1)
        return out.mul_(self._scale)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        out = w.new_empty(len(w), self.n, dtype=widened(w.dtype))
        work = out.new_empty(1, self._length)
        for sketch, vector in zip(w, out.split(1), strict=True):
            scaled = sketch.to(out.dtype) * self._scale
            work.zero_()
            for rows, places, values in self._chunks(out):
                work[0].index_add_(0, places.view(-1), (scaled[rows, None] * values).view(-1))
            Hadamard(self._length).apply_(work)
            for piece in pieces(vector.shape, 1, w.device):
                self._signs.multiply(piece.of(work), piece.start, piece.of(vector))
        return out

    def _chunks(self, like: Tensor) -> Iterator[tuple[slice, Int64[Tensor, "r k"], Float[Tensor, "r k"]]]:
        """Yield some rows of G_s at a time: which, the places of their entries, and the entries."""
        step = max(1, piece_length(like.device) // self.nonzeros)
        for top in range(0, self.d, step):
            rows = slice(top, min(top + step, self.d))
            start, count = top * self.nonzeros, (rows.stop - top) * self.nonzeros
            places = self._places.integers(start, count, self._length, device=like.device)
            values = self._values.normals(start, count, dtype=like.dtype, device=like.device)
            yield rows, places.view(-1, self.nonzeros), values.view(-1, self.nonzeros)
