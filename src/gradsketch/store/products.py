"""Products of vectors with stored rows, as they are stored: a sketch becomes float32 in registers, or in cache.

On a CPU with a C compiler, up to 64 vectors meet the rows in one pass (``kernels/stored.c``); every product is summed
in the same order then, whatever else is asked for. Otherwise blocks of rows become float32, and torch multiplies.
Half-precision products would round their results, and reorder near ties.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gradsketch.kernels.native import compiled
from gradsketch.kernels.trust import is_plain, relative_error, trusted
from gradsketch.random import Stream
from gradsketch.store.encoding import encode, stored_count, turned, unpacked
from gradsketch.transforms.precision import full_precision

__all__ = ["products"]

# Entries converted to float32 at a time: four megabytes stay in the cache between conversion and product.
_BLOCK_ENTRIES = 1 << 20
_BLOCK_ENTRIES_GPU = 1 << 26
# Vectors up to which a pass of the kernel is faster than a conversion and a matrix product: with 8 three times.
_FEW = 64
_TRIAL = Stream(0, "stored", "trial")


def products(
    stored: Shaped[Tensor, "rows width"], dtype: str, directions: Float[Tensor, "m d"], width: int | None = None
) -> Float[Tensor, "m rows"]:
    """Return the products of vectors with rows without their scale, on the CPU.

    With ``width`` only the first so many numbers of each sketch count, scaled so that products stay unbiased.
    """
    d = directions.shape[1]
    count = stored_count(width or d, d, dtype)
    used = turned(directions, dtype)[:, :count] * (d / count if width else 1)
    if _serves(stored, dtype, used):
        return _by_kernel(stored, dtype, used)
    return _by_torch(stored, dtype, used)


def _serves(stored: Shaped[Tensor, "rows width"], dtype: str, used: Float[Tensor, "m count"]) -> bool:
    """Whether there is a kernel for these tensors, after a trial at the first use of a type."""
    if len(used) > _FEW or used.device.type != "cpu" or stored.device.type != "cpu" or not stored.numel():
        return False
    plain = is_plain(stored) and is_plain(used) and stored.stride(1) == 1 and used.dtype == torch.float32
    if not plain or compiled("stored") is None:
        return False
    return trusted("stored", used.new_empty(0), dtype, lambda: _error(dtype))


def _by_kernel(
    stored: Shaped[Tensor, "rows width"], dtype: str, used: Float[Tensor, "m count"]
) -> Float[Tensor, "m rows"]:
    library, used = compiled("stored"), used.contiguous()
    out = torch.empty(len(used), len(stored), dtype=torch.float32, device="cpu")
    getattr(library, f"products_{dtype}")(
        ctypes.c_void_p(stored.data_ptr()),
        *map(ctypes.c_int64, (len(stored), stored.stride(0) * stored.itemsize)),
        ctypes.c_void_p(used.data_ptr()),
        *map(ctypes.c_int64, used.shape),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def _by_torch(
    stored: Shaped[Tensor, "rows width"], dtype: str, used: Float[Tensor, "m count"]
) -> Float[Tensor, "m rows"]:
    rows, count, device = len(stored), used.shape[1], used.device
    step = max(1, (_BLOCK_ENTRIES if device.type == "cpu" else _BLOCK_ENTRIES_GPU) // count)
    buffer = torch.empty(min(step, rows), count, device=device, dtype=torch.float32)
    out = torch.empty(len(used), rows, dtype=torch.float32, device="cpu")
    for start in range(0, rows, step):
        block = stored[start : start + step].to(device)
        floats = unpacked(block, count, dtype, buffer[: len(block)])
        with full_precision(device):
            product = used @ floats.T  # the few queries on the left: a third faster than on the right
        out[:, start : start + len(block)] = product
    return out


def _error(dtype: str) -> float:
    """Return the kernel's relative error on rows and vectors that no block and no group of four divides."""
    rows, m, d = 67, 7, 75
    stored, _ = encode(_TRIAL.normals(0, rows * d).view(rows, d), dtype)
    used = turned(_TRIAL.child("vectors").normals(0, m * d).view(m, d), dtype)
    wanted = used.double() @ unpacked(stored, used.shape[1], dtype).double().T
    return relative_error(_by_kernel(stored, dtype, used), wanted)
