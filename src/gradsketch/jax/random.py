"""The random numbers of :mod:`gradsketch.random` in JAX: the same bits, from 32-bit integers alone.

TPUs, and JAX without x64, have no 64-bit integers. So the upper half of a product is put together from 16-bit halves,
and a counter is two words. XLA's own Philox cannot serve: it takes half of the state only, and scrambles its key.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt32
from scipy.special import ndtri

from gradsketch.random import Stream

__all__ = [
    "SIGNS_A_COUNTER",
    "Key",
    "as_key",
    "flip",
    "flip_packed",
    "is_negative_at",
    "normals",
    "packed_signs",
    "words",
]

# (key 0, key 1, counter 2, counter 3) of a stream: an array, so that the streams of stacked layers can be scanned.
Key = UInt32[Array, " 4"] | UInt32[np.ndarray, " 4"]

SIGNS_A_COUNTER = 128
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFF


def as_key(stream: Stream) -> UInt32[np.ndarray, " 4"]:
    """Return what identifies a stream."""
    high2, high3, key0, key1 = stream.identity
    return np.array([key0, key1, high2, high3], np.uint32)


def words(key: Key, counters: UInt32[Array, "*m"], high: int = 0) -> UInt32[Array, "*m 4"]:
    """Return the four words of each counter below 2^32; ``high`` is the counter's second word.

    A loop, which XLA does not take apart: without one it makes a word anew for each of its 32 signs, a hundred times
    slower. Of two turns, because on a GPU each is a launch.
    """
    second, third, fourth = (jnp.full_like(counters, word) for word in (high, key[2], key[3]))
    start = jnp.stack([counters, second, third, fourth], axis=-1), jnp.asarray(key[:2])
    drawn, _ = lax.fori_loop(0, 2, lambda _, state: _five_rounds(*state), start)
    return drawn


def _five_rounds(c: UInt32[Array, "*m 4"], k: UInt32[Array, " 2"]) -> tuple[UInt32[Array, "*m 4"], UInt32[Array, " 2"]]:
    # Not c[..., lane], which becomes a look-up in a batch.
    c0, c1, c2, c3 = (lax.index_in_dim(c, lane, axis=-1, keepdims=False) for lane in range(4))
    for _ in range(5):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k[0], low1, high0 ^ c3 ^ k[1], low0
        k = k + np.array(_WEYL, np.uint32)
    return jnp.stack([c0, c1, c2, c3], axis=-1), k


def flip(x: Float[Array, "*batch m"], key: Key, first: UInt32[Array, ""] | int = 0) -> Float[Array, "*batch m"]:
    """Multiply vectors by the signs of a stream, from counter ``first`` on."""
    counters = -(-x.shape[-1] // SIGNS_A_COUNTER)
    drawn = words(key, jnp.asarray(first, jnp.uint32) + lax.iota(jnp.uint32, counters))
    return flip_packed(x, drawn.reshape(-1))


def flip_packed(x: Float[Array, "*batch m"], drawn: UInt32[Any, " w"]) -> Float[Array, "*batch m"]:
    """Multiply vectors by the signs whose bits some words hold: sign i is bit i mod 32 of word i div 32."""
    bits = (jnp.asarray(drawn)[:, None] >> lax.iota(jnp.uint32, 32)) & 1
    return jnp.where(bits.reshape(-1)[: x.shape[-1]] != 0, -x, x)


def packed_signs(stream: Stream, count: int) -> UInt32[np.ndarray, " w"]:
    """Return the words that hold the first signs of a stream."""
    return stream.words(0, -(-count // 32)).numpy().view(np.uint32)


def is_negative_at(key: Key, index: Int[Array, "*m"]) -> Bool[Array, "*m"]:
    """Return whether the signs at some places are −1, without a look-up."""
    place = index.astype(jnp.uint32)
    lane = (place // 32)[..., None] & 3
    drawn = words(key, place // SIGNS_A_COUNTER)
    word = jnp.where(lane == lax.iota(jnp.uint32, 4), drawn, 0).sum(-1, dtype=jnp.uint32)
    return ((word >> (place & 31)) & 1) != 0


def normals(stream: Stream, count: int, dtype: jnp.dtype | type = jnp.float32) -> Float[Array, " count"]:
    """Return the first standard normals of a stream: float32 values, equal to torch's but for rounding.

    A quantile table is linear between 512 knots an octave. A knot's value is kept in two parts, and the distance from
    it is exact, so float32 is enough. The table is looked up: for start vectors, because a TPU is slow at that.
    """
    drawn = words(as_key(stream), lax.iota(jnp.uint32, -(-count // 4))).reshape(-1)[:count]
    # Twice the distance from the nearer end of (0, 1), in units of 2^-32: an odd integer.
    twice = ((drawn & np.uint32(0x7FFFFFFF)) << 1) | 1
    octave = 31 - lax.clz(twice)
    inside = twice - (np.uint32(1) << octave)
    down, up = jnp.maximum(octave, _KNOT_BITS) - _KNOT_BITS, _KNOT_BITS - jnp.minimum(octave, _KNOT_BITS)
    knot = (inside >> down) << up
    beyond = (inside - ((knot >> up) << down)).astype(jnp.float32)
    high, low, slope = (table[((octave << _KNOT_BITS) | knot).astype(jnp.int32)] for table in _quantiles())
    value = high + (low + slope * beyond)
    return jnp.where(drawn >> 31, -value, value).astype(dtype)


def _product(a: UInt32[Array, "*m"], constant: int) -> tuple[UInt32[Array, "*m"], UInt32[Array, "*m"]]:
    """Return the high and the low word of a 64-bit product."""
    low, high = a & _LOW, a >> 16
    low_c, high_c = np.uint32(constant & _LOW), np.uint32(constant >> 16)
    middle = high * low_c + ((low * low_c) >> 16)  # below 2^32
    carried = low * high_c + (middle & _LOW)
    return high * high_c + (middle >> 16) + (carried >> 16), a * np.uint32(constant)


_KNOT_BITS = 9


@cache
def _quantiles() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each knot, the quantile in two float32 parts, and its slope in units of half a tail value."""
    octaves = np.arange(32)[:, None]
    knots = (2.0**octaves * (1 + np.arange((1 << _KNOT_BITS) + 1) / (1 << _KNOT_BITS))) / 2  # of the tail value
    quantile = -ndtri(knots / 2.0**32)
    slope = np.diff(quantile, axis=1) / np.diff(knots, axis=1) / 2
    start = quantile[:, :-1].reshape(-1)
    high = start.astype(np.float32)
    return high, (start - high).astype(np.float32), slope.reshape(-1).astype(np.float32)
