"""Launching a program on the device where its tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["start"]

# Two programs of 256 threads fit on a multiprocessor of 64K registers.
_REGISTERS = 128


def start(program: str, grid: tuple[int, int], *arguments: Tensor | int, together: int) -> None:
    """Run one of ``programs`` on a grid. Returns before the device is done."""
    # Triton and its driver are there only where there is a GPU.
    from triton.runtime import driver

    from gradsketch.kernels import programs

    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device):
        target = driver.active.get_current_target()
        getattr(programs, program)[grid](*arguments, T=together, **options(program, target.backend, target.warp_size))


def options(program: str, backend: str, warp_size: int) -> dict[str, Any]:
    """Return what a program is compiled with for a kind of device: 256 threads, rounding that no version changes."""
    wave64 = warp_size == 64
    chosen = {"WAVE64": wave64, "num_warps": 4 if wave64 else 8, "enable_fp_fusion": False}
    return chosen | ({"maxnreg": _REGISTERS} if backend == "cuda" and program.endswith("_blocks") else {})
