"""What a Lanczos run keeps of its Krylov vectors: the vectors themselves, or only their sketches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.linear_map import LinearMap
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.space import Space
from gradsketch.transforms.precision import equal_threads, full_precision

__all__ = ["Forgetful", "FullBasis", "KrylovBasis", "SketchedBasis", "sketched"]

_ROWS_PER_BLOCK = 32
_COLUMNS = 1 << 16


class GrowingMatrix:
    """A matrix that grows by rows without moving those it has."""

    def __init__(self) -> None:
        self._blocks: list[Float[Tensor, "rows columns"]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Float[Tensor, " columns"]:
        return self._blocks[place // _ROWS_PER_BLOCK][place % _ROWS_PER_BLOCK]

    def append(self, row: Float[Tensor, " columns"]) -> None:
        place = self._count % _ROWS_PER_BLOCK
        if place == 0:
            self._blocks.append(row.new_empty(_ROWS_PER_BLOCK, len(row)))
        self._blocks[-1][place] = row
        self._count += 1

    def blocks(self) -> list[Float[Tensor, "rows columns"]]:
        """Return the rows in order, a few to a block, without copying."""
        full, rest = divmod(self._count, _ROWS_PER_BLOCK)
        return self._blocks[:full] + ([self._blocks[full][:rest]] if rest else [])

    def recombine(self, weights: Float[Tensor, "rows kept"]) -> None:
        """Put fewer combinations of the rows in their place, a few columns at a time."""
        rows, self._count = self.blocks(), weights.shape[1]
        pieces = [block.split(_COLUMNS, dim=1) for block in rows]
        for piece in zip(*pieces, strict=True):
            mixed = weights.to(piece[0]).T @ torch.cat(piece)
            for target, part in zip(piece, mixed.split(_ROWS_PER_BLOCK), strict=False):
                target[: len(part)] = part
        self._blocks = self._blocks[: -(-self._count // _ROWS_PER_BLOCK)]


def sketched(sketch: LinearMap, space: Space, q: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    """Return the sketch of a vector, whole or shared out among ranks.

    A BlockSum takes one tensor of it after another, and each rank sketches some of them; other sketches take the whole.
    """
    if not space.is_shared:
        return sketch(q)
    shapes = [tuple(share.shape) for share in space.shares]
    if not isinstance(sketch, BlockSum) or list(sketch.shapes.values()) != shapes:
        return sketch(space.whole(q))
    out = q.new_zeros(1, sketch.d)
    for place, (name, (_, tensor)) in enumerate(zip(sketch.shapes, space.wholes(q), strict=True)):
        if place % space.ranks.ranks == space.ranks.rank and tensor.numel():
            with full_precision(q.device), equal_threads(q.device):
                sketch.add_gradient(out, name, tensor[None])
    return space.ranks.sums(out[0])


class KrylovBasis(ABC):
    """Memory of the Krylov vectors q_1 … q_m."""

    # Whether the Krylov vectors stay orthogonal to working precision, so that no eigenvalue is found twice.
    is_orthogonal: bool

    def __init__(self) -> None:
        self.rows = GrowingMatrix()

    @property
    def noise(self) -> float:
        """Length of what this memory adds to a product."""
        return 0.0

    @property
    def disk_bytes(self) -> int:
        """Bytes kept on disk."""
        return 0

    def state(self) -> dict[str, Any]:
        """Return what ``restore`` needs besides the rows."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what an earlier run kept besides the rows."""

    @abstractmethod
    def append(self, q: Float[Tensor, " n"]) -> None:
        """Remember the next Krylov vector."""

    @abstractmethod
    def orthogonalize(self, w: Float[Tensor, " n"]) -> None:
        """Remove from w, in place, its components along the remembered vectors."""

    @abstractmethod
    def combine(self, coefficients: Float[Tensor, "m r"]) -> Float[Tensor, "r columns"]:
        """Return r linear combinations of what is remembered of q_1 … q_m."""


class FullBasis(KrylovBasis):
    """Every Krylov vector, with full re-orthogonalisation: m vectors of memory, no copies of eigenvalues."""

    is_orthogonal = True

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def append(self, q: Float[Tensor, " n"]) -> None:
        self.rows.append(q)

    def orthogonalize(self, w: Float[Tensor, " n"]) -> None:
        # Classical Gram–Schmidt twice is enough (Giraud, Langou & Rozloznik 2005).
        with full_precision(w.device):
            for _ in range(2):
                blocks = self.rows.blocks()
                overlaps = self._products(w).split([len(block) for block in blocks])
                for block, overlap in zip(blocks, overlaps, strict=True):
                    w.addmv_(block.T, overlap, alpha=-1.0)

    def overlaps(self, w: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """Return the inner products with all vectors held."""
        with full_precision(w.device):
            return self._products(w).cpu().double()

    def _products(self, w: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        products = [block.mv(w) for block in self.rows.blocks()]
        return self.space.ranks.sums(torch.cat(products)) if products else w.new_zeros(0)

    def recombine(self, coefficients: Float[Tensor, "m r"]) -> None:
        """Hold r combinations of the vectors instead of the vectors."""
        with full_precision(self.rows[0].device):
            self.rows.recombine(coefficients)

    def combine(self, coefficients: Float[Tensor, "m r"]) -> Float[Tensor, "r columns"]:
        blocks = self.rows.blocks()
        parts = coefficients.to(blocks[0]).split([len(block) for block in blocks])
        with full_precision(blocks[0].device):
            out = torch.mm(parts[0].T, blocks[0])
            for part, block in zip(parts[1:], blocks[1:], strict=True):
                out.addmm_(part.T, block)
        return out


class SketchedBasis(KrylovBasis):
    """Only the sketches of the Krylov vectors: d numbers each, in main memory.

    The vectors lose their mutual orthogonality as eigenvalues converge (Paige 1971); the sketches are what shows it.
    """

    is_orthogonal = False

    def __init__(self, sketch: LinearMap, space: Space) -> None:
        super().__init__()
        self.sketch, self.space = sketch, space

    def append(self, q: Float[Tensor, " n"]) -> None:
        self.rows.append(sketched(self.sketch, self.space, q).to("cpu", torch.float32))

    def orthogonalize(self, w: Float[Tensor, " n"]) -> None:
        pass

    def combine(self, coefficients: Float[Tensor, "m r"]) -> Float[Tensor, "r columns"]:
        return torch.mm(coefficients.T, torch.cat(self.rows.blocks()).to(coefficients.dtype))


class Forgetful(KrylovBasis):
    """Nothing is kept: enough for quadrature, where copies of an eigenvalue share its weight (Knizhnerman 1996)."""

    is_orthogonal = False

    def append(self, q: Float[Tensor, " n"]) -> None:
        pass

    def orthogonalize(self, w: Float[Tensor, " n"]) -> None:
        pass

    def combine(self, coefficients: Float[Tensor, "m r"]) -> Float[Tensor, "r columns"]:
        return coefficients.new_zeros(coefficients.shape[1], 0)
