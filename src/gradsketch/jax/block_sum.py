"""BlockSum over a pytree: the sum of one sketch per leaf, with the numbers of ``gs.BlockSum`` over the same tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

import gradsketch.sketches.block_sum as torch_block_sum
from gradsketch.errors import InputError
from gradsketch.jax.names import Layout, Names, layout_of, path_text
from gradsketch.jax.tiling import Tables, TilingShape, matrix_numbers, stacked, tables_of
from gradsketch.sketches.tiling import Tiling

__all__ = ["BlockSum", "LeafSketch", "block_sum"]


@dataclass(frozen=True, eq=False)
class LeafSketch:
    """The sketch of one leaf: static facts, and tables, which are stacked where the leaf's layers are."""

    layout: Layout
    shape: TilingShape
    tables: Tables

    def tables_or(self, tables: Tables | None) -> Tables:
        """Return the tables of a layer where they are given, else the leaf's own."""
        return self.tables if tables is None else tables

    def gradient(self, gradient: Array, tables: Tables | None = None) -> Float[Array, " d"]:
        """Return the sketch of a gradient of the leaf; with ``tables``, of the layer whose they are."""
        wide = gradient if gradient.dtype == jnp.float64 else gradient.astype(jnp.float32)
        if tables is not None or not self.layout.is_stacked:
            return matrix_numbers(self.shape, self.tables_or(tables), self.layout.matrix(wide))

        def add(total: Array, layer: tuple[Array, Tables]) -> tuple[Array, None]:
            return total + self.gradient(*layer), None

        total: Array = lax.scan(add, jnp.zeros(self.shape.d, wide.dtype), (wide, self.tables))[0]
        return total


@dataclass(frozen=True, eq=False)
class BlockSum:
    """A sketch of gradients that are pytrees: ``apply`` takes a tree to ``[d]``, ``lift`` is its adjoint.

    ``torch`` is the sketch of the same tensors in torch: of the same numbers, and with the fingerprint of an index.
    """

    leaves: tuple[LeafSketch | None, ...]
    like: Any
    torch: torch_block_sum.BlockSum

    @property
    def d(self) -> int:
        """Length of a sketch."""
        return self.torch.d

    def apply(self, tree: Any) -> Float[Array, " d"]:
        """Return the sketch of a gradient, a tree like the parameters; use ``jax.vmap`` for several.

        Raises:
            InputError: another tree, or leaves of other shapes.
        """
        return self._apply(self.checked(tree))

    def lift(self, w: Float[Array, " d"]) -> Any:
        """Apply the adjoint: a direction in sketch space becomes a tree, zero in leaves that are left out."""
        return jax.tree.unflatten(jax.tree.structure(self.like), self._lift(jnp.asarray(w)))

    @partial(jax.jit, static_argnums=0)
    def _apply(self, leaves: list[Array]) -> Float[Array, " d"]:
        numbers = [sketch.gradient(leaf) for sketch, leaf in zip(self.leaves, leaves, strict=True) if sketch]
        return sum(numbers[1:], numbers[0])

    @partial(jax.jit, static_argnums=0)
    def _lift(self, w: Float[Array, " d"]) -> list[Array]:
        wide = w if w.dtype == jnp.float64 else w.astype(jnp.float32)
        leaves = [jax.ShapeDtypeStruct(leaf.shape, wide.dtype) for leaf in jax.tree.leaves(self.like)]
        (lifted,) = jax.linear_transpose(self._apply, leaves)(wide)
        return list(lifted)

    def checked(self, tree: Any) -> list[Any]:
        """Return the leaves of a tree like the parameters.

        Raises:
            InputError: it is another.
        """
        leaves: list[Any] = jax.tree.leaves(tree)
        treedef = jax.tree.structure(tree)
        if treedef != jax.tree.structure(self.like) or any(
            jnp.shape(leaf) != own.shape for leaf, own in zip(leaves, jax.tree.leaves(self.like), strict=True)
        ):
            raise InputError(
                f"a tree of {len(leaves)} leaves that is not like the parameters of the sketch",
                f"a tree with their structure and shapes: {jax.tree.structure(self.like)}",
                "Build the sketch with block_sum(params, d) for these parameters",
            )
        return leaves


def block_sum(params: Any, d: int, *, seed: int = 0, names: Names | None = None) -> BlockSum:
    """Return the sketch ``gs.BlockSum(shapes, d, seed=seed)`` of a pytree's leaves.

    Args:
        params: any pytree of arrays, or of ``jax.ShapeDtypeStruct``; integers in it are left out.
        d: numbers kept.
        seed: of the sketch.
        names: what torch calls each leaf (:class:`TorchName`); by default its path with dots, and its own axes.
            ``gj.flax_names`` knows flax.

    Example:
        >>> phi = gj.block_sum({"w": jnp.ones((30, 20)), "b": jnp.ones(30)}, 64)
        >>> phi.apply({"w": jnp.ones((30, 20)), "b": jnp.ones(30)}).shape
        (64,)

    Raises:
        InputError: no leaf, two leaves of one name, or d is not a positive integer ≤ n.
    """
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    found = jax.tree_util.tree_flatten_with_path(like)[0]
    layouts = [
        layout_of(path_text(path), leaf.shape, names) if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        for path, leaf in found
    ]
    shapes = {name: layout.shape for layout in layouts if layout for name in layout.names}
    if len(shapes) < sum(len(layout.names) for layout in layouts if layout):
        raise InputError("two leaves with one name", "a name of its own for each", "Repair what names= returns")
    sketch = torch_block_sum.BlockSum(shapes, d, seed=seed)
    return BlockSum(tuple(_leaf_sketch(sketch, layout) for layout in layouts), like, sketch)


def _leaf_sketch(sketch: torch_block_sum.BlockSum, layout: Layout | None) -> LeafSketch | None:
    if layout is None or not all(name in sketch.blocks for name in layout.names):  # without entries
        return None
    tilings = [tiling for name in layout.names if isinstance(tiling := sketch.blocks[name], Tiling)]
    shapes, tables = zip(*map(tables_of, tilings), strict=True)
    return LeafSketch(layout, shapes[0], stacked(tables) if layout.is_stacked else tables[0])
