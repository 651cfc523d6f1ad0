"""AFFD, AFJL, QK and SRHT as pairs of pure functions, with the numbers of the torch sketches of the same name.

``lift`` is the transpose that JAX makes of ``apply``, so the two agree by construction. Long vectors go through a scan
whose body is a checkpoint: derivatives make the signs again and keep nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from gradsketch.errors import InputError
from gradsketch.jax.random import SIGNS_A_COUNTER, as_key, flip
from gradsketch.jax.tiling import matrix_numbers, outer_numbers, tables_of
from gradsketch.jax.transforms import einsum, hadamard, kronecker
from gradsketch.sketches.affd import AFFD
from gradsketch.sketches.afjl import AFJL
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.qk import QK
from gradsketch.sketches.tiled_srht import TiledSRHT

__all__ = ["Linear", "MatrixSketch", "affd", "afjl", "linear", "qk", "srht"]

# Numbers of a vector that are worked on at once. Temporaries are a few times as long, whatever n is.
_PIECE = 1 << 20
# The counter of a sign is one word.
_LONGEST = SIGNS_A_COUNTER << 32

Apply = Callable[[Float[Array, "*batch n"]], Float[Array, "*batch d"]]
Lift = Callable[[Float[Array, "*batch d"]], Float[Array, "*batch n"]]


class Linear(NamedTuple):
    """A sketch as two pure functions: ``apply`` takes ``[..., n]`` to ``[..., d]``, ``lift`` is its adjoint.

    Both can be compiled, batched, differentiated (forwards and backwards) and sharded. Results are float32, or float64
    for float64. Values are not checked, because they are not known while JAX traces: a NaN makes NaN.
    """

    apply: Apply
    lift: Lift


class MatrixSketch(NamedTuple):
    """``apply`` and ``lift`` of a matrix's entries; ``outer`` sketches Σ_t left_t right_tᵀ from its factors."""

    apply: Apply
    lift: Lift
    outer: Callable[[Float[Array, "*batch t rows"], Float[Array, "*batch t columns"]], Float[Array, "*batch d"]]


def affd(n: int, d: int, *, seed: int = 0) -> Linear:
    """Return the sketch ``gs.AFFD(n, d, seed=seed)``: dense quality for little more than one read of the vector.

    Example:
        >>> phi = gj.affd(1000, 64, seed=3)
        >>> phi.apply(jnp.ones(1000)).shape
        (64,)

    Raises:
        InputError: n or d is not allowed.
    """
    return _folded(AFFD(n, d, seed=seed), block=4096)


def afjl(n: int, d: int, *, seed: int = 0) -> Linear:
    """Return the sketch ``gs.AFJL(n, d, seed=seed)``: the cheapest, and worse where widths are powers of two.

    Example:
        >>> phi = gj.afjl(1000, 64)
        >>> phi.lift(jnp.ones(64)).shape
        (1000,)

    Raises:
        InputError: n or d is not allowed.
    """
    sketch = AFJL(n, d, seed=seed)
    folded = _folded(sketch, block=1)
    second = as_key(sketch.stream.child("G"))
    return linear(lambda x: flip(folded.apply(x), second), n, d)


def qk(n: int, d: int, *, seed: int = 0) -> Linear:
    """Return the sketch ``gs.QK(n, d, seed=seed)``: a Kronecker product of random partial isometries.

    Example:
        >>> gj.qk(1 << 14, 64).apply(jnp.ones((2, 1 << 14))).shape
        (2, 64)

    Raises:
        InputError: d is not a power of two; or n or d is not allowed.
    """
    sketch = QK(n, d, seed=seed)
    first, *others = (matrix.numpy() for matrix in sketch.matrices)
    inner, scale = math.prod(b for _, b in sketch.sizes[1:]), (math.prod(b for _, b in sketch.sizes) / d) ** 0.5

    def one(x: Float[Array, " n"]) -> Float[Array, " d"]:
        rows = jnp.pad(x, (0, first.shape[1] * inner - n)).reshape(-1, inner)
        at_once = max(1, min(len(rows), _PIECE // inner))
        middle = _mapped(lambda part: kronecker(part.reshape(-1), others), rows, at_once)
        return einsum("ij,jk->ik", first.astype(x.dtype), middle.reshape(len(rows), -1)).reshape(-1) * scale

    return linear(one, n, d)


def srht(rows: int, columns: int, d: int, *, seed: int = 0, name: str = "") -> MatrixSketch:
    """Return the sketch ``gs.TiledSRHT(rows, columns, d, seed=seed, name=name)`` of a matrix.

    Example:
        >>> phi = gj.srht(8, 4, 16)
        >>> g, a = jnp.ones((5, 8)), jnp.ones((5, 4))
        >>> bool(jnp.allclose(phi.outer(g, a), phi.apply((g.T @ a).ravel()), atol=1e-5))
        True

    Raises:
        InputError: rows, columns or d is not a positive integer, or d > rows·columns.
    """
    tiling = TiledSRHT(rows, columns, d, seed=seed, name=name).tiling
    shape, tables = tables_of(tiling)
    made = linear(lambda x: matrix_numbers(shape, tables, x.reshape(rows, columns)), rows * columns, d)
    outer = jnp.vectorize(jax.jit(partial(outer_numbers, shape, tables)), signature="(t,r),(t,c)->(d)")
    return MatrixSketch(made.apply, made.lift, outer)


def linear(one: Callable[[Float[Array, " n"]], Float[Array, " d"]], n: int, d: int) -> Linear:
    """Return a linear function of one vector, and its transpose, as functions of vectors in the last dim."""

    @jax.jit
    def transpose(w: Float[Array, " d"]) -> Float[Array, " n"]:
        (x,) = jax.linear_transpose(one, jax.ShapeDtypeStruct((n,), w.dtype))(w)
        vector: Array = x
        return vector

    return Linear(_of_vectors(jax.jit(one), n), _of_vectors(transpose, d))


def _of_vectors(one: Callable[[Array], Array], length: int) -> Callable[[Array], Array]:
    def of_vectors(x: Any) -> Array:
        x = _wide(x, length)
        return one(x) if x.ndim == 1 else jnp.vectorize(one, signature="(n)->(m)")(x)

    return of_vectors


def _wide(x: Any, length: int) -> Array:
    """Return vectors in float32 or wider.

    Raises:
        InputError: they have another length, or are no floating-point numbers.
    """
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != length or not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"an array of {x.dtype} {list(x.shape)}",
            f"floating-point vectors of length {length} in the last dim",
            f"Reshape it to [..., {length}], or build the sketch for its length",
        )
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _folded(sketch: Sketch, block: int) -> Linear:
    """Return √(n/d) · R_d H_n · G · (I ⊗ H_block) · B by the fold identity; without G where a block is one number."""
    n, d = sketch.n, sketch.d
    if n > _LONGEST:
        raise InputError(f"n={n}", f"at most {_LONGEST}, as many signs as 32 bits count", "Sketch it in two parts")
    whole, folded = (1 << (size - 1).bit_length() for size in (n, d))
    block = min(block, whole)
    first, second = (as_key(sketch.stream.child(name)) for name in ("B", "G"))
    multiple = max(block, folded, SIGNS_A_COUNTER)
    piece = min(max(_PIECE, multiple), -(-n // multiple) * multiple)

    def one_piece(number: Array, x: Float[Array, " piece"]) -> Float[Array, " folded"]:
        counter = number * (piece // SIGNS_A_COUNTER)
        x = flip(x, first, counter)
        if block > 1:
            x = flip(hadamard(x, block), second, counter)
        return x.reshape(-1, folded).sum(0)

    def one(x: Float[Array, " n"]) -> Float[Array, " d"]:
        x = jnp.pad(x, (0, -n % piece)).reshape(-1, piece)
        return hadamard(_summed(one_piece, x), folded)[:d] * (folded / d) ** 0.5

    return linear(one, n, d)


def _summed(f: Callable[[Array, Array], Array], pieces: Float[Array, "k piece"]) -> Array:
    """Return Σ_i f(i, pieces_i), one after another."""
    numbers = lax.iota(jnp.uint32, len(pieces))
    if len(pieces) == 1:
        return f(numbers[0], pieces[0])

    @partial(jax.checkpoint, prevent_cse=False)
    def step(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + f(*part), None

    shape = jax.eval_shape(f, numbers[0], pieces[0])
    total: Array = lax.scan(step, jnp.zeros(shape.shape, shape.dtype), (numbers, pieces))[0]
    return total


def _mapped(f: Callable[[Array], Array], rows: Float[Array, "k inner"], at_once: int) -> Array:
    """Return f of some rows at once, one after another, joined."""
    if at_once >= len(rows):
        return f(rows)
    padded = jnp.pad(rows, ((0, -len(rows) % at_once), (0, 0))).reshape(-1, at_once, rows.shape[1])
    joined = lax.map(f, padded).reshape(len(padded) * at_once, -1)
    return joined[: len(rows)]
