"""BlockSum: the sum of one sketch per parameter tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import widened
from gradsketch.random import Stream
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.fused import FusedVectors
from gradsketch.sketches.recipe import register, vector_kind, vector_kinds
from gradsketch.sketches.tiling import Block, Tiling
from gradsketch.transforms.precision import equal_threads, full_precision

__all__ = ["BlockSum", "as_matrix"]


@runtime_checkable
class Shaped(Protocol):
    """Names and shapes of tensors, such as ``Parameters``."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shape of each tensor, by name."""


@register
class BlockSum(Sketch):
    """Phi(g) = Σ_p Phi_p(g_p) over parameter tensors p, each with a random stream of its own name.

    Unbiased, because the streams are independent; a sketch of fewer parameters is a part of the sum, and gradients may
    come tensor by tensor. ``kind="auto"`` tiles matrices (and convolutions, as output channels × the rest), whose
    gradients then never need to be formed, and places small tensors by an isometry; any other kind names the vector
    sketch used for each tensor with more than d entries. Keeps names and shapes only, never the tensors.

    ``coordinates`` bounds how many coordinates of a side a tiling computes. Fewer cost less where a metric goes before
    (``precondition``), and add noise along the directions of gradients that have few of them.

    Example:
        >>> phi = gs.BlockSum(gs.Parameters(torch.nn.Linear(30, 20)), 64)
        >>> phi(torch.randn(5, 620)).shape
        torch.Size([5, 64])

    Raises:
        InputError: no tensors, an unknown kind, or d is not a positive integer ≤ n.
    """

    version = 3
    least_n = 1  # a selection may be one number
    from_sizes = False

    def __init__(
        self,
        parameters: Shaped | Mapping[str, Sequence[int]],
        d: int,
        *,
        seed: int = 0,
        kind: str = "auto",
        layout_d: int | None = None,
        coordinates: int | None = None,
    ) -> None:
        shapes = parameters if isinstance(parameters, Mapping) else parameters.shapes
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        if not self.shapes:
            raise InputError("no parameter tensors", "names and shapes", "Type BlockSum(Parameters(model), d)")
        super().__init__(sum(math.prod(shape) for shape in self.shapes.values()), d, seed=seed)
        self.kind = self._choice("kind", kind, ("auto", *vector_kinds()))
        self.layout_d, self.coordinates = layout_d or d, coordinates
        # Small tensors are placed for a prefix, so kinds that fold do not nest here.
        self.nesting = "prefix" if kind == "auto" else vector_kind(kind).nesting
        self.nesting = self.nesting if self.nesting == "prefix" else None
        # Tensors without entries are part of the vector all the same.
        self.blocks = {name: self._block(name, shape) for name, shape in self.shapes.items() if math.prod(shape)}
        self._calls: dict[tuple[str, ...], tuple[FusedVectors, tuple[str, ...]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the flat vector holds them."""
        return tuple(self.shapes)

    def options(self) -> dict[str, str | int | float | bool]:
        shapes = json.dumps(sorted((name, shape) for name, shape in self.shapes.items()))
        # The version of "auto" is this class's own. That of another kind is raised where that kind changes.
        version = {} if self.kind == "auto" else {"kind_version": vector_kind(self.kind).version}
        bound = {} if self.coordinates is None else {"coordinates": self.coordinates}
        return {
            **version,
            **bound,
            "kind": self.kind,
            "layout_d": self.layout_d,
            "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        }

    def arguments(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {
            "parameters": shapes,
            "d": self.d,
            "seed": self.seed,
            "kind": self.kind,
            "layout_d": self.layout_d,
            "coordinates": self.coordinates,
        }

    def add_gradient(self, out: Float[Tensor, "b d"], name: str, gradient: Float[Tensor, "b ..."]) -> None:
        """Add the sketches of one tensor's per-example gradients ``[b, *shape]``."""
        self.blocks[name].add_matrix(out, gradient.reshape(len(gradient), *as_matrix(self.shapes[name])))

    def add_vectors(self, out: Float[Tensor, "b d"], gradients: Mapping[str, Float[Tensor, "b _"]]) -> None:
        """Add the sketches of the per-example gradients of several vectors, as many as can be in one call."""
        together, names = self._together(tuple(gradients))
        vectors = [gradients[name] for name in names]
        served = bool(names) and together.serves(out, vectors)
        if served:
            together.add(out, vectors)
        for name in gradients:
            if not served or name not in names:
                self.add_gradient(out, name, gradients[name])

    def add_outer(
        self, out: Float[Tensor, "b d"], name: str, left: Float[Tensor, "b t r"], right: Float[Tensor, "b t c"]
    ) -> None:
        """Add the sketches of one tensor's per-example gradients Σ_t left_t right_tᵀ, without forming them."""
        self.blocks[name].add_outer(out, left, right)

    def add_rows(
        self, out: Float[Tensor, "b d"], name: str, index: Int64[Tensor, "b t"], right: Float[Tensor, "b t c"]
    ) -> None:
        """Add the sketches of per-example gradients whose row ``index_t`` gets ``right_t``: those of an embedding."""
        self.blocks[name].add_rows(out, index, right)

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        out = x.new_zeros(len(x), self.d, dtype=widened(x.dtype))
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        with full_precision(x.device), equal_threads(x.device):
            # One vector at a time, so that the bits do not depend on how many there are.
            for vector, sketch in zip(x.split(1), out.split(1), strict=True):
                for name, part in zip(self.shapes, vector.split(sizes, dim=1), strict=True):
                    if name in self.blocks:
                        self.add_gradient(sketch, name, part)
        return out

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        w = w.to(widened(w.dtype))
        with full_precision(w.device), equal_threads(w.device):
            return torch.cat(
                [
                    torch.cat([block.adjoint(vector).flatten(1) for block in self.blocks.values()], dim=1)
                    for vector in w.split(1)
                ]
            )

    @property
    def takes_stretches(self) -> bool:
        return True

    def _apply_stretch(self, x: Float[Tensor, "b m"], start: int) -> Float[Tensor, "b d"]:
        out = x.new_zeros(len(x), self.d, dtype=widened(x.dtype))
        with full_precision(x.device), equal_threads(x.device):
            for name, part, place in self._parts(start, x.shape[1]):
                tensor = x.new_zeros(len(x), math.prod(self.shapes[name]))
                tensor[:, place] = x[:, part]
                self.add_gradient(out, name, tensor)
        return out

    def _apply_adjoint_stretch(self, w: Float[Tensor, "b d"], start: int, count: int) -> Float[Tensor, "b m"]:
        out = w.new_empty(len(w), count, dtype=widened(w.dtype))
        with full_precision(w.device), equal_threads(w.device):
            for name, part, place in self._parts(start, count):
                out[:, part] = self.blocks[name].adjoint(w.to(out.dtype)).flatten(1)[:, place]
        return out

    def _parts(self, start: int, count: int) -> Iterator[tuple[str, slice, slice]]:
        """Yield which tensors a stretch of the vector meets: the part of the stretch, and its place in the tensor."""
        begin = 0
        for name, shape in self.shapes.items():
            low, high = max(begin, start), min(begin + math.prod(shape), start + count)
            if low < high:
                yield name, slice(low - start, high - start), slice(low - begin, high - begin)
            begin += math.prod(shape)

    def _together(self, names: tuple[str, ...]) -> tuple[FusedVectors, tuple[str, ...]]:
        """Return what sketches vectors of these names in one call, and the names of those for which it does."""
        if names not in self._calls:
            blocks = {name: self.blocks[name] for name in names}
            maps = {n: m for n, block in blocks.items() if isinstance(block, Tiling) and (m := block.of_vectors)}
            self._calls[names] = FusedVectors(list(maps.values())), tuple(maps)
        return self._calls[names]

    def _block(self, name: str, shape: tuple[int, ...]) -> Block:
        rows, columns = as_matrix(shape)
        stream = self.stream.child(name)
        if self.kind == "auto" or rows * columns <= self.layout_d:
            return Tiling(rows, columns, self.d, stream, self.layout_d, self.coordinates)
        return _Vector(vector_kind(self.kind), rows, columns, self.d, stream)


class _Vector(Block):
    """A vector sketch of the flattened matrix."""

    def __init__(self, kind: type[Sketch], rows: int, columns: int, d: int, stream: Stream) -> None:
        seed = int.from_bytes(stream.words(0, 2).numpy().tobytes(), "little")
        self.rows, self.columns, self.phi = rows, columns, kind(rows * columns, d, seed=seed)

    def add_matrix(self, out: Float[Tensor, "b d"], x: Float[Tensor, "b rows columns"]) -> None:
        out += self.phi._apply(x.flatten(1).contiguous()).to(out.dtype)

    def add_rows(
        self, out: Float[Tensor, "b d"], index: Int64[Tensor, "b t"], right: Float[Tensor, "b t columns"]
    ) -> None:
        wide = right.to(widened(right.dtype))
        x = wide.new_zeros(len(right), self.rows, self.columns)
        self.add_matrix(out, x.scatter_add_(1, index[..., None].expand_as(wide), wide))

    def adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b rows columns"]:
        return self.phi._apply_adjoint(w.contiguous()).view(len(w), self.rows, self.columns)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns a tensor is sketched as: the first dim against the rest; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
