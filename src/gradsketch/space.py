"""R^n, of whose vectors each rank may hold a share: the few operations in which entries on several ranks meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gradsketch.lockstep import Lockstep

__all__ = ["Share", "Space", "dot", "gathered", "scattered"]

# Single-precision sums stay this short; longer ones are added up in double precision.
_PIECE, _PIECE_GPU = 1 << 16, 1 << 22


def dot(a: Float[Tensor, " m"], b: Float[Tensor, " m"]) -> float:
    """Return ⟨a, b⟩, accumulated in double precision over pieces, without a copy of either."""
    piece = _PIECE if a.device.type == "cpu" else _PIECE_GPU
    products = [torch.dot(x, y) for x, y in zip(a.split(piece), b.split(piece), strict=True)]
    return float(torch.stack(products).sum(dtype=torch.float64))


def _length(a: Float[Tensor, "*m"]) -> Float64[Tensor, ""]:
    # In pieces, for torch computes in another dtype by a copy.
    pieces = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in a.reshape(-1).split(_PIECE_GPU)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(pieces))
    return total


@dataclass(frozen=True)
class Share:
    """How ranks share out one tensor: each holds the next ``most`` rows, and the last ranks what is left."""

    shape: torch.Size
    rows: int
    ranks: Lockstep
    place: int

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.shape.numel() // max(self.rows, 1)

    @property
    def most(self) -> int:
        """Rows of the first rank."""
        return -(-self.rows // self.ranks.ranks)

    @property
    def first(self) -> int:
        """The first of this rank's rows."""
        return min(self.ranks.rank * self.most, self.rows)

    @property
    def count(self) -> int:
        """How many rows this rank holds."""
        return min(self.first + self.most, self.rows) - self.first

    @property
    def size(self) -> int:
        """How many entries this rank holds."""
        return self.count * self.width

    def cut(self, whole: Float[Tensor, "... k"]) -> Float[Tensor, "... m"]:
        """Return a view of this rank's entries of flat tensors."""
        return whole[..., self.first * self.width : (self.first + self.count) * self.width]

    @property
    def room(self) -> int:
        """How many entries the first rank holds, to which the others' pieces are filled up where they travel."""
        return self.most * self.width


def gathered(shares: Sequence[Share], pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors whole, of which each rank gives its shares, in one exchange."""
    ranks = shares[0].ranks
    filled = [_filled(piece.reshape(-1), share.room) for share, piece in zip(shares, pieces, strict=True)]
    flat = filled[0] if len(filled) == 1 else torch.cat(filled)
    parts = ranks.gather(flat, shares[0].place).view(ranks.ranks, -1).split([share.room for share in shares], dim=1)
    return [p.reshape(-1)[: s.shape.numel()].view(s.shape) for s, p in zip(shares, parts, strict=True)]


def scattered(shares: Sequence[Share], wholes: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's shares of the sums of all ranks' tensors, flat, in one exchange."""
    ranks = shares[0].ranks
    filled = [_filled(w.reshape(-1), s.room * ranks.ranks) for s, w in zip(shares, wholes, strict=True)]
    rows = [each.view(ranks.ranks, -1) for each in filled]
    flat = filled[0] if len(filled) == 1 else torch.cat(rows, dim=1).view(-1)
    parts = ranks.scatter(flat, shares[0].place).split([share.room for share in shares])
    return [part[: share.size] for share, part in zip(shares, parts, strict=True)]


def _filled(flat: Tensor, size: int) -> Tensor:
    if len(flat) == size:
        return flat.contiguous()
    out = flat.new_zeros(size)
    out[: len(flat)] = flat
    return out


class Space:
    """R^n with each vector's entries shared out among ranks: tensor after tensor, of each this rank's share.

    Without ranks a vector is whole. All that is computed entry by entry needs no space.
    """

    def __init__(self, n: int, shares: Sequence[Share] = (), ranks: Lockstep | None = None) -> None:
        self.n, self.shares, self.ranks = n, tuple(shares), ranks or Lockstep()

    @property
    def is_shared(self) -> bool:
        """Whether this process holds a part of each vector only."""
        return self.ranks.several

    @property
    def size(self) -> int:
        """How many entries of a vector this process holds."""
        return sum(share.size for share in self.shares) if self.is_shared else self.n

    @property
    def most(self) -> int:
        """How many entries of a vector any process holds at most."""
        return sum(share.most * share.width for share in self.shares) if self.is_shared else self.n

    def dot(self, a: Float[Tensor, " m"], b: Float[Tensor, " m"]) -> float:
        """Return ⟨a, b⟩, accumulated in double precision."""
        return self.ranks.sum(dot(a, b))

    def norm(self, a: Float[Tensor, " m"]) -> float:
        """Return ‖a‖, accumulated in double precision."""
        return math.sqrt(self.dot(a, a))

    def length(self, a: Float[Tensor, "*m"]) -> float:
        """Return ‖a‖, computed in double precision: of vectors so short that their squares are no floats."""
        own = float(_length(a))
        return math.sqrt(self.ranks.sum(own * own)) if self.is_shared else own

    def lengths(self, parts: Iterable[Tensor]) -> list[float]:
        """Return ‖a‖ for each of several vectors."""
        own = [_length(part) for part in parts]
        return self.ranks.sums(torch.stack(own).square()).sqrt().tolist() if self.is_shared else list(map(float, own))

    def row(self, place: int, shape: torch.Size, row: int) -> slice:
        """Return which of the entries that this process holds of a tensor belong to one of its rows."""
        width = shape.numel() // shape[0]
        start = row * width
        if not self.is_shared:
            return slice(start, start + width)
        share = self.shares[place]
        start -= share.first * share.width
        low, high = max(start, 0), min(start + width, share.size)
        return slice(low, max(low, high))

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Where in a whole vector the entries begin that this process holds of each tensor, and how many they are."""
        if not self.is_shared:
            return [(0, self.n)]
        begins = accumulate((share.shape.numel() for share in self.shares), initial=0)
        return [(begin + s.first * s.width, s.size) for begin, s in zip(begins, self.shares, strict=False)]

    def drawn(self, numbers: Callable[[int, int], Tensor]) -> Float[Tensor, " m"]:
        """Return a vector whose entries are a function of their place: ``numbers(start, count)``."""
        if not self.is_shared:
            return numbers(0, self.n)
        out = numbers(0, 0).new_empty(self.size)
        for (start, count), part in zip(self.stretches, out.split([s.size for s in self.shares]), strict=True):
            part.copy_(numbers(start, count))
        return out

    def cut(self, vectors: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        """Return this process's share of whole vectors."""
        if not self.is_shared:
            return vectors
        parts = vectors.split([share.shape.numel() for share in self.shares], dim=-1)
        return torch.cat([share.cut(part) for share, part in zip(self.shares, parts, strict=True)], dim=-1)

    def whole(self, vector: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """Return a vector of which each rank gives its share."""
        if not self.is_shared:
            return vector
        return torch.cat([whole.view(-1) for _, whole in self.wholes(vector)])

    def wholes(self, vector: Float[Tensor, " m"]) -> Iterator[tuple[Share, Tensor]]:
        """Yield one tensor of a shared vector after another, whole."""
        parts = vector.split([share.size for share in self.shares])
        yield from ((share, gathered([share], [part])[0]) for share, part in zip(self.shares, parts, strict=True))
