"""Arithmetic that does not depend on what the process allows or how many threads it has.

Sketches promise the same bits for every batch, thread count and process-wide precision. So elementwise steps have a
fixed order, additions over blocks are a tree fixed by n and d, and products are at most 64 wide or of one fixed shape,
because other shapes round differently when rows are split otherwise. Intel's library rounds single rows and remainders
otherwise, so rows are filled up to a number it likes (``kronecker.py``), and where its threads still differ, as on
CPUs with AVX2 alone, one works. The contract battery compares bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

__all__ = ["equal_threads", "full_precision", "one_thread", "outside_autocast"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch TF32, bf16 and autocast off for the matmuls inside, then put the caller's settings back.

    A transform that is orthonormal to 1e-7 would otherwise be so to 1e-3 for everyone who trains with
    ``torch.set_float32_matmul_precision("high")``.
    """
    with outside_autocast(device), ExitStack() as stack:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch ≥ 2.9
            mkldnn: Any = torch.backends.mkldnn
            for backend in (torch.backends.cuda.matmul, mkldnn.matmul):
                if backend.fp32_precision not in ("ieee", "none"):
                    stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                    backend.fp32_precision = "ieee"
        elif torch.get_float32_matmul_precision() != "highest":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    """Switch autocast off meanwhile: a backward pass takes each product in the dtype that the forward pass chose."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let a CPU library whose rounding depends on the number of threads work with one, then restore their number."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def equal_threads(device: torch.device) -> Iterator[None]:
    """Let products of small matrices have all threads where their bits are then those of one thread, else one."""
    if device.type != "cpu" or _threads_round_alike(torch.get_num_threads()):
        yield
    else:
        with one_thread(device):
            yield


@cache
def _threads_round_alike(threads: int) -> bool:
    """Try it: libraries that share rows out at other places than they should do so at some of these sizes."""
    cpu = torch.device("cpu")
    entries = torch.arange(4096 * 64, dtype=torch.float32, device=cpu).sin_()

    def products() -> list[torch.Tensor]:
        return [
            entries[: rows * width].view(rows, width) @ entries[: width * width].view(width, width)
            for width in (16, 32, 64)
            for rows in (64, 128, 256, 512, 704, 2176, 4096)
        ]

    shared = products()
    with one_thread(cpu):
        return all(torch.equal(a, b) for a, b in zip(shared, products(), strict=True))
