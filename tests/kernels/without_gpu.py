"""Triton compiles for a device that is not there, and what it compiles runs on NumPy."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.kernels_compiled import compiled
from torch import Tensor

from kernels.ptx import Memory, Program

__all__ = ["Recorder", "run_ptx"]

_read: dict[str, Program] = {}


def run_ptx(
    program: str,
    grid: tuple[int, int],
    *arguments: Tensor | int,
    together: int,
    target: str = "sm_90",
    change: Any = None,
) -> None:
    """Do what ``start`` does, on CPU tensors; ``change`` may alter the PTX before."""
    kernel = compiled(program, arguments, together, target)
    text = kernel.asm["ptx"] if change is None else change(kernel.asm["ptx"])
    memory, parameters = Memory(), []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            octets = argument.view(-1).view(torch.uint8).numpy()
            parameters.append(memory.place(octets, argument.data_ptr() % 16))
        else:
            parameters.append(argument)
    _read.setdefault(text, Program(text)).run(grid, [*parameters, 0, 0], memory)


class Recorder:
    """Notes launches and runs nothing, or what ``then`` does."""

    def __init__(self, then: Any = None) -> None:
        self.launches: list[tuple[str, tuple[int, int], tuple[Tensor | int, ...], int]] = []
        self._then = then

    def __call__(self, program: str, grid: tuple[int, int], *arguments: Tensor | int, together: int) -> None:
        self.launches.append((program, grid, arguments, together))
        if self._then is not None:
            self._then(program, grid, *arguments, together=together)
