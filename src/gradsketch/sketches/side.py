"""Some rows of a randomised Hadamard transform, laid out for products with the other side of a matrix."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int8, Int64, Num
from torch import Tensor
from torch.nn import functional

from gradsketch.linear_map import widened
from gradsketch.random import Stream
from gradsketch.sketches.forms import power_of_two_at_least
from gradsketch.transforms.hadamard import hadamard_matrix

__all__ = ["Side"]

_LENGTH = 16  # of a block: the first stage is a product with 16 × 16 matrices
# Numbers transformed at once, so that what lies between the two stages stays in cache, or within bounds on a GPU.
_AT_ONCE, _AT_ONCE_GPU = 1 << 20, 1 << 27
# Up to so many entries the second stage is one product with the wanted rows of its Hadamard matrix: as fast at 64 of
# 512 rows as all of them by a fast transform, and 2 to 5 times as fast below (one CPU thread).
_SECOND_STAGE = 1 << 15


class Side:
    """``count`` rows of √n'·(H_blocks ⊗ I)(I ⊗ H_16) P B: n' is the padded size, B random signs, P a shuffle.

    Two stages: within blocks of 16 neighbours, shuffled in each block, then across blocks, of which only a random
    selection of rows is made. Coordinate c is row ``chosen[c // 16]`` of the second stage at place c mod 16 of the
    first. That costs 16 + count/16 multiplications an entry where a product with the rows would cost ``count``.
    """

    def __init__(self, size: int, count: int, stream: Stream) -> None:
        self.size, self.count, self.stream = size, count, stream
        self.padded = power_of_two_at_least(size)
        self.length = min(_LENGTH, self.padded)
        self.blocks = self.padded // self.length
        self.made_rows = -(-count // self.length)
        self._one_product = self.made_rows * self.blocks <= _SECOND_STAGE
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    @cached_property
    def chosen(self) -> Int64[Tensor, " rows"]:
        """Rows of the second stage that are made, in order."""
        return self.stream.child("order").permutation(self.blocks)[: self.made_rows]

    def groups(self, x: Float[Tensor, "m size"], group: int, number: int) -> Float[Tensor, "number m group"]:
        """Return the first ``number`` groups of ``group`` coordinates of each vector, in float32 or wider."""
        limit = _AT_ONCE if x.device.type == "cpu" else _AT_ONCE_GPU
        parts = [self._stages(part) for part in x.split(max(1, limit // self.size))]
        return self._grouped(parts[0] if len(parts) == 1 else torch.cat(parts, 1), group, number)

    def group_rows(
        self, index: Int64[Tensor, " m"], like: Tensor, group: int, number: int
    ) -> Float[Tensor, "number m group"]:
        """Return ``groups`` of one-hot vectors."""
        first, _ = self._matrices(like)
        across = self._across(like.device)[:, index // self.length].to(like.dtype)
        rows = across[..., None] * first.flatten(0, 1)[index]
        return self._grouped(rows, group, number)

    def transform(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch count"]:
        """Return all coordinates, in order."""
        return self.groups(x.reshape(-1, self.size), self.count, 1)[0].view(*x.shape[:-1], self.count)

    def adjoint(self, y: Float[Tensor, "*batch count"]) -> Float[Tensor, "*batch size"]:
        """Apply the adjoint of ``transform``."""
        z = functional.pad(y.reshape(-1, self.count), (0, self.made_rows * self.length - self.count))
        rows = z.view(len(z), -1, self.length).movedim(1, 0)
        first, across = self._matrices(y)
        if self._one_product:
            blocks = across.T @ rows.reshape(len(rows), -1)
        else:
            every = y.new_zeros(self.blocks, *rows.shape[1:])
            every[self.chosen.to(y.device)] = rows
            blocks = _hadamard(every.view(self.blocks, -1))
        x = (blocks.view(self.blocks, len(z), self.length) @ first.mT).movedim(0, 1)
        return x.flatten(1)[:, : self.size].reshape(*y.shape[:-1], self.size)

    def _stages(self, x: Float[Tensor, "m size"]) -> Float[Tensor, "rows m length"]:
        x = x.to(widened(x.dtype))
        used = -(-self.size // self.length)
        if used * self.length != self.size:
            x = functional.pad(x, (0, used * self.length - self.size))
        first, across = self._matrices(x)
        blocks = torch.bmm(x.view(len(x), used, self.length).transpose(0, 1), first[:used]).view(used, -1)
        if self._one_product:
            rows = across[:, :used] @ blocks
        else:
            rows = _hadamard(functional.pad(blocks, (0, 0, 0, self.blocks - used)))[self.chosen.to(x.device)]
        return rows.view(self.made_rows, len(x), self.length)

    def _grouped(self, rows: Float[Tensor, "rows m length"], group: int, number: int) -> Tensor:
        """Regroup coordinates, [row, m, place] to [group, m, place in group]."""
        length = self.length
        if group % length == 0:
            several = rows[: number * group // length].view(number, group // length, -1, length)
            return several.transpose(1, 2).reshape(number, -1, group)
        if length % group == 0:
            needed = rows[: -(-number * group // length)]
            halves = needed.view(len(needed), -1, length // group, group).transpose(1, 2)
            return halves.reshape(-1, rows.shape[1], group)[:number]
        flat = rows.transpose(0, 1).reshape(rows.shape[1], -1)[:, : number * group]
        return flat.view(-1, number, group).transpose(0, 1)

    def _matrices(self, like: Tensor) -> tuple[Float[Tensor, "blocks length length"], Float[Tensor, "rows blocks"]]:
        """Return the ±1 matrices of both stages; the second's is empty where it is not one product."""
        key = like.dtype, like.device
        if key not in self._tables:
            second = self._second_stage(like) if self._one_product else like.new_empty(0, self.blocks)
            self._tables[key] = self._first_stage(like), second
        return self._tables[key]

    def _across(self, device: torch.device) -> Int8[Tensor, "rows blocks"]:
        """Return the second stage's ±1 matrix in few bytes, for look-ups."""
        key = torch.int8, device
        if key not in self._tables:
            table = self._second_stage(torch.empty(0, dtype=torch.int8, device=device))
            self._tables[key] = table, table
        return self._tables[key][1]

    def _first_stage(self, like: Tensor) -> Float[Tensor, "blocks length length"]:
        """Return the matrix of every block, for vectors from the left."""
        order = self.stream.child("within").permutation(self.length)
        keys: Tensor = self.stream.child("places").words(0, 2 * self.padded).view(torch.int64)
        places = torch.argsort(keys.view(self.blocks, self.length), dim=1, stable=True)
        signs = self.stream.child("signs").signs(0, self.padded, dtype=like.dtype, device=like.device)
        shuffled = hadamard(self.length, like)[:, order.to(like.device)][places.to(like.device)]
        return shuffled * signs.view(self.blocks, self.length, 1)

    def _second_stage(self, like: Tensor) -> Num[Tensor, "rows blocks"]:
        """Return the wanted rows of the matrix across blocks."""
        bits = self.chosen[:, None] & torch.arange(self.blocks)
        for shift in (16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return (1 - 2 * (bits & 1)).to(device=like.device, dtype=like.dtype)


def hadamard(n: int, like: Tensor) -> Float[Tensor, "n n"]:
    """Return the ±1 Hadamard matrix."""
    matrix: Tensor = hadamard_matrix(n, like.dtype, like.device)
    signs: Tensor = matrix.sign()
    return signs


def _hadamard(x: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Return √n·H_n x, n a power of two, sixteen rows at a time."""
    n, inner = len(x), x.shape[1]
    done = 1
    while done < n:
        factor = min(_LENGTH, n // done)
        x = (hadamard(factor, x) @ x.view(-1, factor, done * inner)).view(n, inner)
        done *= factor
    return x
