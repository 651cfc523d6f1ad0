"""What torch calls the leaves of a pytree, and how it lays them out: one model has one sketch in both libraries.

The stream of a tensor is named after it, and its entries are sketched as a matrix [first dim, the rest]. So sketches of
both libraries can be compared once each leaf has the name and the layout that its tensor has in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from gradsketch.errors import InputError

__all__ = ["Names", "TorchName", "flax_names", "path_text"]


class TorchName(NamedTuple):
    """A tensor of a torch model: its name, and which axes of the leaf, in which order, reshape to it.

    ``{}`` in the name stands for the layer, and says that layers are stacked along the leaf's first axis, as for a
    scan; ``axes`` and ``shape`` are then those of one layer. None: as the leaf has them.
    """

    name: str
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


# From a leaf's path, such as "layers.0.up.kernel", and shape to its tensor; None leaves the leaf out of the sketch.
Names = Callable[[str, tuple[int, ...]], TorchName | str | None]

_WEIGHTS = ("kernel", "embedding", "scale")


def path_text(path: Sequence[Any]) -> str:
    """Return a pytree's path with dots: ``layers.0.up.kernel``."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)  # of a variable of flax.nnx


def flax_names(path: str, shape: tuple[int, ...]) -> TorchName:
    """Return what torch calls a leaf of flax.nnx or linen: kernels are [in, out], and ``weight`` there is [out, in].

    Kernels of convolutions, embeddings, norms and attention are known. Names of modules stay as they are.

    Example:
        >>> gj.flax_names("up.kernel", (24, 96))
        TorchName(name='up.weight', axes=(1, 0), shape=(96, 24))
    """
    *modules, last = path.removeprefix("params.").split(".")
    name = ".".join([*modules, "weight" if last in _WEIGHTS else last])
    attends = bool(modules) and modules[-1] in ("query", "key", "value", "out")
    axes = tuple(range(len(shape)))
    if last == "kernel" and attends and len(shape) == 3:
        axes = (2, 0, 1) if modules[-1] == "out" else (1, 2, 0)
        rows = math.prod(shape[axis] for axis in axes[: 1 if modules[-1] == "out" else 2])
        return TorchName(name, axes, (rows, math.prod(shape) // rows))
    if last == "bias" and attends:
        return TorchName(name, axes, (math.prod(shape),))
    if last == "kernel" and len(shape) > 1:
        axes = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
    return TorchName(name, axes, tuple(shape[axis] for axis in axes))


class Layout(NamedTuple):
    """A leaf's tensors in torch (one, or one a layer), their shape, and its axes in that order.

    The first ``leading`` of the axes are the rows of the matrix as which a tensor is sketched, the others its columns.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    leading: int
    is_stacked: bool

    def matrix(self, tensor: jax.Array) -> jax.Array:
        """Return a leaf, or one layer of it, as the matrix that is sketched."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return tensor.transpose(self.axes).reshape(rows, -1)


def layout_of(path: str, shape: tuple[int, ...], names: Names | None) -> Layout | None:
    """Return where torch has a leaf, or None where it is left out.

    Raises:
        InputError: axes or a shape that the leaf cannot take.
    """
    named = path if names is None else names(path, shape)
    if named is None:
        return None
    name, axes, wanted = TorchName(named) if isinstance(named, str) else named
    is_stacked = "{}" in name
    own = shape[1:] if is_stacked else shape
    axes = tuple(range(len(own))) if axes is None else axes
    if sorted(axes) != list(range(len(own))) or (is_stacked and not shape):
        raise InputError(f"axes {axes} for {path} of shape {shape}", "each of its axes once", "Leave the axes out")
    ordered = tuple(own[axis] for axis in axes)
    wanted = ordered if wanted is None else wanted
    leading = int(len(wanted) > 1)
    while leading and math.prod(ordered[:leading]) < wanted[0] and leading < len(ordered):
        leading += 1
    if math.prod(wanted) != math.prod(ordered) or (len(wanted) > 1 and math.prod(ordered[:leading]) != wanted[0]):
        raise InputError(
            f"the shape {wanted} for {path} of shape {shape}",
            "one whose first dim is made of whole axes of the leaf",
            "Leave the shape out",
        )
    layers = tuple(name.format(layer) for layer in range(shape[0])) if is_stacked else (name,)
    return Layout(path, layers, wanted, axes, leading, is_stacked)
