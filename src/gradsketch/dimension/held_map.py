"""Phi between w, which every process holds, and those entries of theta that this one holds."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gradsketch.sketches.base import Sketch
from gradsketch.space import Space

__all__ = ["HeldMap"]


class HeldMap:
    """The lift, and the sketch of gradients, of entries that ranks may share out.

    Of several ranks the loss is the mean of theirs, as in ``DistributedDataParallel``, and so is its gradient.
    """

    def __init__(self, sketch: Sketch, space: Space) -> None:
        self.sketch, self.space = sketch, space

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold the other entries."""
        return self.space.is_shared

    @property
    def size(self) -> int:
        """How many entries this process holds."""
        return self.space.size

    def lift(self, w: Float[Tensor, " d"]) -> Float[Tensor, " m"]:
        """Return the entries of Phiᵀ w that this process holds."""
        if not self.is_shared:
            return self.sketch._apply_adjoint(w[None])[0]
        out = w.new_empty(self.size)
        for (start, count), part in self._parts(out):
            part.copy_(self.sketch._apply_adjoint_stretch(w[None], start, count)[0])
        return out

    def sketch_sum(self, gradient: Float[Tensor, " m"]) -> Float[Tensor, " d"]:
        """Return the sketch of the gradient of the loss, given this process's entries of the sum over ranks."""
        if not self.is_shared:
            return self.sketch._apply(gradient[None])[0]
        out = gradient.new_zeros(self.sketch.d)
        for (start, _), part in self._parts(gradient):
            out += self.sketch._apply_stretch(part[None], start)[0]
        return self.space.ranks.sums(out) / self.space.ranks.ranks

    def _parts(self, vector: Float[Tensor, " m"]) -> list[tuple[tuple[int, int], Tensor]]:
        stretches = self.space.stretches
        parts = vector.split([count for _, count in stretches])
        return [(stretch, part) for stretch, part in zip(stretches, parts, strict=True) if stretch[1]]
