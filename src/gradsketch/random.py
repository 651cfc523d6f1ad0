"""Random numbers that are a function of (seed, names, index) and of nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), evaluated with integer tensor
operations, so every device, thread count and chunking gives the same bits. Any slice can be made without the rest.

A stream hashes (seed, names) to 128 bits: 64 of them key Philox, and 64 fill the upper half of its counter. So streams
cannot overlap, and the lower half of the counter addresses any slice. Normals come from a table of the inverse CDF,
linear between 512 knots an octave. That needs only IEEE multiplications, additions and look-ups, so CPU and GPU agree
to the last bit, which logarithms, square roots and cosines do not promise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float, Int32, Int64
from scipy.special import ndtri
from torch import Tensor

from gradsketch.errors import InputError

__all__ = ["Stream", "philox4x32"]

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# Counters per pass: the nine int64 scratch rows of a pass stay in the L2 cache of a CPU core.
_COUNTERS_PER_PASS = 1 << 14
_COUNTERS_PER_PASS_GPU = 1 << 22


def philox4x32(
    counter: tuple[Int64[Tensor, " m"], int, int, int], key: tuple[int, int], out: Int32[Tensor, "m 4"]
) -> None:
    """Write the four 32-bit words of each counter into ``out``.

    ``counter`` is (c0, c1, c2, c3) with c0 a tensor of values below 2^32 and the others constants; words and keys are
    32 bits wide. Checked against the known-answer vectors published with Random123.
    """
    c0 = counter[0].clone()
    c1, c2, c3 = (torch.full_like(c0, c) for c in counter[1:])
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap as signed integers; their bits are right, which is all that is used. c1 and c3 take
        # over whole products: their upper halves are noise that the mask on c0 and c2 removes a round later.
        torch.mul(c0, _MULTIPLIER_0, out=product0)
        torch.mul(c2, _MULTIPLIER_1, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    for lane, word in enumerate((c0, c1, c2, c3)):
        out[:, lane] = word  # int64 -> int32 keeps the low 32 bits


@dataclass(frozen=True)
class Stream:
    """One named, addressable sequence of random numbers.

    ``Stream(seed, "affd", "signs")``: any integer seed, any names. Seed and names are hashed to 128 bits, 64 of which
    key Philox and 64 fill the upper half of its counter, so two streams never share numbers; the lower half counts.

    Example:
        >>> s = gs.Stream(0, "demo")
        >>> bool((s.signs(5, 3) == s.signs(0, 8)[5:]).all())
        True
    """

    seed: int
    names: tuple[str, ...]
    _identity: tuple[int, int, int, int] = field(repr=False, compare=False)

    def __init__(self, seed: int, *names: str) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed={seed!r}", "an integer", "Type seed=0, or any other integer")
        digest = hashlib.blake2b(repr((seed, names)).encode(), digest_size=16).digest()
        words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "_identity", tuple(words))

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """The hash of seed and names: the counter's two upper words, then the two words of the key."""
        return self._identity

    def child(self, *names: str) -> Stream:
        """Return the stream whose names are these after the parent's."""
        return Stream(self.seed, *self.names, *names)

    def words(self, start: int, count: int, device: torch.device | str = "cpu") -> Int32[Tensor, " count"]:
        """Return 32-bit words ``start … start+count-1``; word i is lane i mod 4 of counter i div 4."""
        first, last = start // 4, -(-(start + count) // 4)
        out = torch.empty(last - first, 4, dtype=torch.int32, device=device)
        step = _COUNTERS_PER_PASS if out.device.type == "cpu" else _COUNTERS_PER_PASS_GPU
        high2, high3, key0, key1 = self._identity
        low = first
        while low < last:
            # A pass never crosses a multiple of 2^32, so that the second counter word is constant in it.
            stop = min(low + step, last, (low >> 32) + 1 << 32)
            c0 = torch.arange(low & _MASK, (low & _MASK) + stop - low, dtype=torch.int64, device=device)
            philox4x32((c0, low >> 32, high2, high3), (key0, key1), out[low - first : stop - first])
            low = stop
        return out.view(-1)[start - 4 * first : start - 4 * first + count]

    def signs(
        self,
        start: int,
        count: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, " count"]:
        """Return ±1 signs ``start … start+count-1``: sign i is bit i mod 32 of word i div 32 (set means −1)."""
        first = start // 32
        words = self.words(first, -(-(start + count) // 32) - first, device)
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1
        return bits.view(-1)[start - 32 * first : start - 32 * first + count].to(dtype).mul_(-2).add_(1)

    def normals(
        self,
        start: int,
        count: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, " count"]:
        """Return standard normals ``start … start+count-1``, one 32-bit word each.

        Inverse transform sampling: the word's top bit is the sign, the other 31 the distance from the nearer end of
        (0, 1), mapped by a quantile table that is linear between 512 knots an octave (error below 1e-6, tails to 6.2
        standard deviations). Only IEEE multiplications, additions and look-ups, so every device gives the same bits.
        """
        intercept, slope = _quantile_table(torch.device(device))
        out = torch.empty(count, dtype=dtype, device=device)
        step = 4 * (_COUNTERS_PER_PASS if out.device.type == "cpu" else _COUNTERS_PER_PASS_GPU)
        for low in range(0, count, step):
            high = min(low + step, count)
            words = self.words(start + low, high - low, device)
            tail = (words & 0x7FFFFFFF).to(torch.float64).add_(0.5)
            knot = tail.view(torch.int64).bitwise_right_shift(52 - _KNOT_BITS).to(torch.int32).sub_(_FIRST_KNOT)
            value = slope.index_select(0, knot).mul_(tail).add_(intercept.index_select(0, knot))
            out[low:high] = value.copysign_(words.to(torch.float64))
        return out

    def uniforms(self, start: int, count: int, *, device: torch.device | str = "cpu") -> Float[Tensor, " count"]:
        """Return float64 numbers in (0, 1), one 32-bit word each: (word + 1/2) / 2^32."""
        return (self.words(start, count, device).to(torch.int64) & _MASK).to(torch.float64).add_(0.5).mul_(2.0**-32)

    def integers(
        self, start: int, count: int, high: int, *, device: torch.device | str = "cpu"
    ) -> Int64[Tensor, " count"]:
        """Return integers in [0, high), ``high`` at most 2^31; bias below high/2^32."""
        return ((self.words(start, count, device).to(torch.int64) & _MASK) * high) >> 32

    def permutation(self, n: int, *, device: torch.device | str = "cpu") -> Int64[Tensor, " n"]:
        """Return a uniform permutation of 0 … n-1: the order of n 64-bit random keys (ties by position)."""
        keys = self.words(0, 2 * n, device).view(torch.int64)
        return torch.argsort(keys, stable=True)


_KNOT_BITS = 9
_SMALLEST, _LARGEST = 0.5, 2.0**31  # range of the tail value (integer below 2^31) + 1/2


def _float64_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64, device="cpu").view(torch.int64))


_FIRST_KNOT = _float64_bits(_SMALLEST) >> (52 - _KNOT_BITS)


@cache
def _quantile_table(device: torch.device) -> tuple[Float[Tensor, " knots"], Float[Tensor, " knots"]]:
    """Intercept and slope, per knot interval, of t ↦ −Φ⁻¹(t / 2^32) for t in [1/2, 2^31)."""
    last = _float64_bits(_LARGEST) >> (52 - _KNOT_BITS)
    bits = torch.arange(_FIRST_KNOT, last + 1, dtype=torch.int64, device="cpu") << (52 - _KNOT_BITS)
    knots = bits.view(torch.float64)
    quantile = -torch.from_numpy(ndtri((knots / 2.0**32).numpy()))
    slope = (quantile[1:] - quantile[:-1]) / (knots[1:] - knots[:-1])
    intercept = quantile[:-1] - slope * knots[:-1]
    return intercept.to(device), slope.to(device)
