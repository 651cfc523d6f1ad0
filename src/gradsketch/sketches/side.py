"""A randomised Hadamard transform of one side of a matrix, laid out for products with the other side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor
from torch.nn import functional

from gradsketch.linear_map import widened
from gradsketch.random import Stream
from gradsketch.transforms.hadamard import hadamard_matrix

__all__ = ["Side"]

# Numbers folded at once, so that they stay in cache, or within bounds on a GPU.
_AT_ONCE, _AT_ONCE_GPU = 1 << 18, 1 << 27
# The second stage is one product up to so many blocks, and a fast transform in steps of _STEP beyond.
_ONE_PRODUCT, _STEP = 128, 16
_SHORTEST, _LONGEST = 16, 64  # lengths of a block


class Side:
    """``count`` coordinates √count·(H_blocks ⊗ I)(I ⊗ H_length) P B F of a vector; ``count`` is a power of two.

    F folds a vector that is longer: stretches of ``count`` numbers get random signs, are rotated at random, and add up.
    That is one read of the vector, and a count sketch: two entries meet with probability 1/count or never. A shorter
    vector is continued by zeros, and F is an isometry. Then come random signs B, a shuffle P within blocks, and a
    Hadamard transform in two stages, within blocks and across them, at length + blocks multiplications a coordinate.
    Coordinate c is row ``order[c // length]`` of the second stage at place c mod length of the first.
    """

    def __init__(self, size: int, count: int, stream: Stream, group: int = 1) -> None:
        self.size, self.count, self.stream = size, count, stream
        balanced = max(_SHORTEST, 1 << (count.bit_length() - 1) // 2)
        # A block as long as the groups that are asked for saves a copy.
        self.length = min(max(balanced, group), _LONGEST, count)
        self.blocks = count // self.length
        self._one_product = self.blocks <= _ONE_PRODUCT
        self._tables: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @cached_property
    def order(self) -> Int64[Tensor, " blocks"]:
        """Rows of the second stage, in the order of the coordinates."""
        return self.stream.child("order").permutation(self.blocks)

    @property
    def within(self) -> Int64[Tensor, " length"]:
        """Columns of the first stage, in the order of the coordinates."""
        return self.stream.child("within").permutation(self.length)

    @property
    def places(self) -> Int64[Tensor, "blocks length"]:
        """Rows of the first stage, in the order of a vector's entries: the shuffle within blocks."""
        keys: Tensor = self.stream.child("places").words(0, 2 * self.count).view(torch.int64)
        return torch.argsort(keys.view(self.blocks, self.length), dim=1, stable=True)

    @property
    def rotations(self) -> Int64[Tensor, " stretches"]:
        """How far each stretch of the fold is rotated."""
        stretches = -(-self.size // self.count)
        return self.stream.child("rotations").integers(0, stretches, self.count)

    @property
    def second_stage(self) -> Num[Tensor, "blocks blocks"]:
        """The second stage's signs, of rows in the order of the coordinates."""
        return self._second_stage(torch.empty(0, dtype=torch.int8, device="cpu"))

    def plan(self) -> tuple[Int64[Tensor, " size"], Float[Tensor, " size"], Int64[Tensor, " count"]]:
        """Return it as moves around one Hadamard transform of length ``count``, for kernels.

        Entry e of a vector is added, times ``sign[e]``, to number ``place[e]``; coordinate c is number ``pick[c]`` of
        the transform.
        """
        entries, like = torch.arange(self.size, device="cpu"), torch.empty(0, dtype=torch.float32, device="cpu")
        folded = self._places_in_fold(entries) if self.size > self.count else entries
        signs = self.stream.child("signs").signs(0, self.count, dtype=like.dtype)[folded]
        signs = signs * self._fold_signs(like) if self.size > self.count else signs
        places = folded // self.length * self.length + self.places.flatten()[folded]
        return places, signs, (self.order[:, None] * self.length + self.within).flatten()

    def groups(self, x: Float[Tensor, "m size"], group: int, number: int) -> Float[Tensor, "number m group"]:
        """Return the first ``number`` groups of ``group`` coordinates of each vector, in float32 or wider."""
        return self._grouped(self._stages(self._folded(x)), group, number)

    def group_rows(
        self, index: Int64[Tensor, " m"], like: Tensor, group: int, number: int
    ) -> Float[Tensor, "number m group"]:
        """Return ``groups`` of one-hot vectors."""
        place = self._places_in_fold(index) if self.size > self.count else index
        # Looked up in few bytes.
        across = self._table(self._second_stage, like.new_empty(0, dtype=torch.int8))
        across = across[:, place // self.length].to(like.dtype)
        if self.size > self.count:
            across *= self._table(self._fold_signs, like)[index]
        rows = across[..., None] * self._table(self._first_stage, like).flatten(0, 1)[place]
        return self._grouped(rows, group, number)

    def transform(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch count"]:
        """Return all coordinates, in order."""
        return self.groups(x.reshape(-1, self.size), self.count, 1)[0].view(*x.shape[:-1], self.count)

    def adjoint(self, y: Float[Tensor, "*batch count"]) -> Float[Tensor, "*batch size"]:
        """Apply the adjoint of ``transform``."""
        z = y.reshape(-1, self.count)
        rows = z.view(len(z), -1, self.length).movedim(1, 0)
        if self._one_product:
            blocks = self._table(self._second_stage, y).T @ rows.reshape(len(rows), -1)
        else:
            every = torch.empty_like(rows, memory_format=torch.contiguous_format)
            every[self.order.to(y.device)] = rows
            blocks = _hadamard(every.view(self.blocks, -1))
        x = (blocks.view(self.blocks, len(z), self.length) @ self._table(self._first_stage, y).mT).movedim(0, 1)
        return self._unfolded(x.flatten(1)).reshape(*y.shape[:-1], self.size)

    def _folded(self, x: Float[Tensor, "m size"]) -> Float[Tensor, "m at_most_count"]:
        wide = widened(x.dtype)
        if self.size <= self.count:
            return x.to(wide)
        out = x.new_zeros(len(x), self.count, dtype=wide)
        signs = self._table(self._fold_signs, out)
        step = max(1, (_AT_ONCE if x.device.type == "cpu" else _AT_ONCE_GPU) // self.size)
        for part, sums in zip(x.split(step), out.split(step), strict=True):
            for source, target in self._runs:
                sums[:, target].addcmul_(part[:, source].to(wide), signs[source])
        return out

    def _unfolded(self, y: Float[Tensor, "m count"]) -> Float[Tensor, "m size"]:
        if self.size <= self.count:
            return y[:, : self.size]
        x = y.new_empty(len(y), self.size)
        for source, target in self._runs:
            x[:, source] = y[:, target]
        return x.mul_(self._table(self._fold_signs, y))

    @cached_property
    def _runs(self) -> list[tuple[slice, slice]]:
        """Runs of entries of a vector, and the places that the fold adds them to."""
        runs = []
        for stretch, rotation in enumerate(self.rotations.tolist()):
            begin, end = stretch * self.count, min((stretch + 1) * self.count, self.size)
            turn = min(begin + self.count - rotation, end)
            runs.append((slice(begin, turn), slice(rotation, rotation + turn - begin)))
            runs.append((slice(turn, end), slice(0, end - turn)))
        return [(source, target) for source, target in runs if source.stop > source.start]

    def _places_in_fold(self, index: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
        return (index + self._table(self._rotations, index)[index // self.count]) % self.count

    def _stages(self, x: Float[Tensor, "m at_most_count"]) -> Float[Tensor, "blocks m length"]:
        used = -(-x.shape[1] // self.length)
        x = functional.pad(x, (0, used * self.length - x.shape[1]))
        first = self._table(self._first_stage, x)[:used]
        blocks = torch.bmm(x.view(len(x), used, self.length).transpose(0, 1), first).view(used, -1)
        if self._one_product:
            rows = self._table(self._second_stage, x)[:, :used] @ blocks
        else:
            rows = _hadamard(functional.pad(blocks, (0, 0, 0, self.blocks - used)))[self.order.to(x.device)]
        return rows.view(self.blocks, len(x), self.length)

    def _grouped(self, rows: Float[Tensor, "rows m length"], group: int, number: int) -> Tensor:
        """Regroup coordinates, [row, m, place] to [group, m, place in group]; all sizes are powers of two."""
        length = self.length
        if group % length == 0:
            several = rows[: number * group // length].view(number, group // length, -1, length)
            return several.transpose(1, 2).reshape(number, -1, group)
        needed = rows[: -(-number * group // length)]
        parts = needed.view(len(needed), -1, length // group, group).transpose(1, 2)
        return parts.reshape(-1, rows.shape[1], group)[:number]

    def _table(self, make: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """Return what ``make`` returns for this dtype and device, made once."""
        key = make.__name__, like.dtype, like.device
        if key not in self._tables:
            self._tables[key] = make(like)
        return self._tables[key]

    def _rotations(self, like: Tensor) -> Int64[Tensor, " stretches"]:
        return self.rotations.to(like.device)

    def _fold_signs(self, like: Tensor) -> Float[Tensor, " size"]:
        return self.stream.child("fold").signs(0, self.size, dtype=like.dtype, device=like.device)

    def _first_stage(self, like: Tensor) -> Float[Tensor, "blocks length length"]:
        """Return the matrix of every block, for vectors from the left."""
        order, places = self.within, self.places
        signs = self.stream.child("signs").signs(0, self.count, dtype=like.dtype, device=like.device)
        shuffled = hadamard(self.length, like)[:, order.to(like.device)][places.to(like.device)]
        return shuffled * signs.view(self.blocks, self.length, 1)

    def _second_stage(self, like: Tensor) -> Num[Tensor, "blocks blocks"]:
        """Return the matrix across blocks."""
        bits = self.order[:, None] & torch.arange(self.blocks, device="cpu")
        for shift in (16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return (1 - 2 * (bits & 1)).to(device=like.device, dtype=like.dtype)


def hadamard(n: int, like: Tensor) -> Float[Tensor, "n n"]:
    """Return the ±1 Hadamard matrix."""
    matrix: Tensor = hadamard_matrix(n, like.dtype, like.device)
    signs: Tensor = matrix.sign()
    return signs


def _hadamard(x: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Return √n·H_n x, n a power of two, in steps of sixteen."""
    n, inner = len(x), x.shape[1]
    done = 1
    while done < n:
        factor = min(_STEP, n // done)
        x = (hadamard(factor, x) @ x.view(-1, factor, done * inner)).view(n, inner)
        done *= factor
    return x
