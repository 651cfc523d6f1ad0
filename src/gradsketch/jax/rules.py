"""How a parameter's gradient is sketched without being formed, by the primitive that uses the parameter.

A rule gets an equation, which of its inputs is the parameter, and what is known of it. It returns a function from the
results' cotangents and the inputs to a sketch, or None where it does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from gradsketch.jax.block_sum import LeafSketch
from gradsketch.jax.tiling import Tables, outer_numbers, row_numbers

__all__ = ["RULES", "Contribution", "View", "followed"]


@dataclass(frozen=True, eq=False)
class View:
    """A value made of one parameter by changing its type, its shape or the order of its axes.

    ``axes`` says which axis of the parameter each of its axes is, or is None where that is not so simple. ``back``
    takes a gradient by the value to one by the parameter. ``tables`` are those of the layer that is seen, if it is one.
    """

    leaf: LeafSketch
    axes: tuple[int, ...] | None
    back: Callable[[Array], Array]
    tables: Tables | None = None
    is_ordered: bool = True  # nothing but its type was changed

    @classmethod
    def whole(cls, leaf: LeafSketch, ndim: int) -> View:
        """Return the view of a parameter as it is; of stacked layers nothing but the layers is known."""
        return cls(leaf, None if leaf.layout.is_stacked else tuple(range(ndim)), lambda gradient: gradient)

    def layer(self) -> View | None:
        """Return the view of one layer, as a scan sees it, of stacked layers as they are; else None."""
        if not self.leaf.layout.is_stacked or self.tables is not None or not self.is_ordered:
            return None
        return replace(self, axes=tuple(range(len(self.leaf.layout.axes))), tables=self.leaf.tables)

    def with_tables(self, tables: Tables | None) -> View:
        """Return the same view with other tables."""
        return replace(self, tables=tables)


def followed(eqn: Any, views: Sequence[View | None]) -> View | None:
    """Return the view that an equation makes of a view, if that is all it does."""
    view = views[0]
    if len(views) > 1 or view is None:
        return None
    name, source, target = eqn.primitive.name, eqn.invars[0].aval, eqn.outvars[0].aval
    if name in ("copy", "copy_p", "sharding_constraint"):
        return view
    if name == "convert_element_type" and jnp.issubdtype(target.dtype, jnp.floating):
        return replace(view, back=lambda gradient: view.back(gradient.astype(source.dtype)))
    if name == "transpose":
        order = eqn.params["permutation"]
        axes = None if view.axes is None else tuple(view.axes[axis] for axis in order)
        inverse = tuple(int(axis) for axis in np.argsort(order))
        back = _then(view.back, lambda gradient: gradient.transpose(inverse))
        return replace(view, axes=axes, back=back, is_ordered=False)
    if name in ("reshape", "squeeze", "broadcast_in_dim") and math.prod(source.shape) == math.prod(target.shape):
        back = _then(view.back, lambda gradient: gradient.reshape(source.shape))
        return replace(view, axes=None, back=back, is_ordered=False)
    return None


def _then(last: Callable[[Array], Array], first: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda gradient: last(first(gradient))


# From cotangents of the results, and (inputs, tables), to a sketch.
Contribution = Callable[[list[Any], tuple[list[Any], Tables | None]], Array]


def _dot(eqn: Any, place: int, view: View) -> Contribution | None:
    """A product: Σ over what is not summed of cotangent ⊗ input, one of them the rows, the other the columns."""
    sides, batches = eqn.params["dimension_numbers"]
    if view.axes is None or batches[0]:
        return None
    own, others = sides[place], sides[1 - place]
    summed = {view.axes[axis]: other for axis, other in zip(own, others, strict=True)}
    free = [axis for position, axis in enumerate(view.axes) if position not in own]
    rows, columns = _matrix_axes(view)
    inputs_are_columns = (set(summed), set(free)) == (set(columns), set(rows))
    if not inputs_are_columns and (set(summed), set(free)) != (set(rows), set(columns)):
        return None
    of_input, of_result = (columns, rows) if inputs_are_columns else (rows, columns)

    def contribution(cotangents: list[Any], arrays: tuple[list[Any], Tables | None]) -> Array:
        x, g = arrays[0][1 - place], cotangents[0]
        rest = [axis for axis in range(x.ndim) if axis not in others]
        first = 0 if place == 0 else len(rest)  # of the parameter's axes in the result
        tokens = [axis for axis in range(g.ndim) if not first <= axis < first + len(free)]
        inputs = _factor(x, rest, [summed[axis] for axis in of_input])
        results = _factor(g, tokens, [first + free.index(axis) for axis in of_result])
        left, right = (results, inputs) if inputs_are_columns else (inputs, results)
        return outer_numbers(view.leaf.shape, view.leaf.tables_or(arrays[1]), left, right)

    return contribution


def _gather(eqn: Any, place: int, view: View) -> Contribution | None:
    """A look-up of whole rows, as an embedding makes it."""
    numbers, index, table = eqn.params["dimension_numbers"], eqn.invars[1].aval, eqn.invars[0].aval
    rows, columns = _matrix_axes(view)
    whole_rows = (
        place == 0
        and view.axes is not None
        and view.axes == (*rows, *columns)
        and len(rows) == 1
        and numbers.collapsed_slice_dims in ((), (0,))
        and numbers.start_index_map[:1] == (0,)
        and not numbers.operand_batching_dims
        and numbers.offset_dims[:1] == (index.ndim - 1,)
        and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
    )
    drops = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    # A second index is zero once it is clipped, because a slice is as long as the row.
    if not whole_rows or (drops and len(numbers.start_index_map) > 1):
        return None

    def contribution(cotangents: list[Any], arrays: tuple[list[Any], Tables | None]) -> Array:
        index = arrays[0][1][..., :1].reshape(-1)
        inside = (index >= 0) & (index < table.shape[0])
        right = _wide(cotangents[0].reshape(len(index), -1))
        right = jnp.where(inside[:, None] | (not drops), right, 0)
        found = jnp.clip(index, 0, table.shape[0] - 1)
        return row_numbers(view.leaf.shape, view.leaf.tables_or(arrays[1]), found, right)

    return contribution


def _convolution(eqn: Any, place: int, view: View) -> Contribution | None:
    """A convolution: a product with patches of the input."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    rows, columns = _matrix_axes(view)
    if place == 0 or view.axes is None or params["feature_group_count"] * params["batch_group_count"] > 1:
        return None
    out, *within = (view.axes[axis] for axis in numbers.rhs_spec)
    if (rows, columns) != ((out,), tuple(within)):
        return None
    kernel = tuple(eqn.invars[1].aval.shape[axis] for axis in numbers.rhs_spec[2:])

    def contribution(cotangents: list[Any], arrays: tuple[list[Any], Tables | None]) -> Array:
        patches = lax.conv_general_dilated_patches(
            _wide(arrays[0][0]),
            kernel,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
            lax.Precision.HIGHEST,
        )
        feature = numbers.out_spec[1]
        tokens = [axis for axis in range(patches.ndim) if axis != feature]
        left, right = (_factor(x, tokens, [feature]) for x in (cotangents[0], patches))
        return outer_numbers(view.leaf.shape, view.leaf.tables_or(arrays[1]), left, right)

    return contribution


Rule = Callable[[Any, int, View], Contribution | None]
RULES: dict[str, Rule] = {"dot_general": _dot, "gather": _gather, "conv_general_dilated": _convolution}


def _matrix_axes(view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which axes of the parameter are the rows and the columns of its matrix."""
    layout = view.leaf.layout
    return layout.axes[: layout.leading], layout.axes[layout.leading :]


def _factor(x: Array, tokens: Sequence[int], features: Sequence[int]) -> Float[Array, "t features"]:
    moved = x.transpose([*tokens, *features])
    return _wide(moved.reshape(math.prod(moved.shape[: len(tokens)]), -1))


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
