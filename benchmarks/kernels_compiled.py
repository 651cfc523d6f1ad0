"""What Triton makes of the kernels for GPUs that are not there: registers, shared memory, instructions a number.

``python -m benchmarks.kernels_compiled`` needs Triton and no GPU. Nothing here is a time: those come from
``benchmarks/on_gpu`` on the day there is a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write

__all__ = ["PROGRAMS", "TARGETS", "Resources", "arguments", "compiled", "resources"]

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# What a program takes a round: blocks or terms.
PROGRAMS = {"fold_blocks": 4, "repeat_blocks": 4, "fold_signs": 8, "repeat_signs": 8, "add_rows": 64}
THREADS, BLOCK = 256, 4096


class PretendDriver:
    """Says which device there is, and no more."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])
        self.device = list(TARGETS).index(target)  # compiled kernels are kept by device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(program: str, values: tuple[Tensor | int, ...], together: int, target: str) -> Any:
    """Return what a launch with these arguments would compile: types, alignment and options as there."""
    from triton.runtime.driver import driver

    from gradsketch.kernels import programs
    from gradsketch.kernels.start import options

    backend, _, warp_size = TARGETS[target]
    driver.set_active(PretendDriver(target))
    try:
        chosen = options(program, backend, warp_size)
        # Tensors themselves are passed, because their alignment counts.
        return getattr(programs, program).run(*values, grid=(1, 1), warmup=True, T=together, **chosen)
    finally:
        driver._active = None


def arguments(program: str, dtype: torch.dtype = torch.float32, *, aligned: bool = True) -> tuple[Tensor | int, ...]:
    """Return what a launch of a program is given."""
    n, identity = 40_000 if aligned else 40_003, torch.zeros(8, dtype=torch.int32)
    if program == "add_rows":
        return torch.zeros(8192), torch.zeros(64), 128, 64
    x = torch.zeros(n + 1, dtype=dtype)[0 if aligned else 1 :][:n]
    if program.startswith("fold"):
        return x, torch.zeros(2 * 8192), identity, n, 2, 2
    return torch.zeros(8192), torch.zeros(n), identity, n, 2


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes that do not fit in them, shared bytes a block, instructions a number in the loop."""

    registers: int
    spilled: int
    shared: int
    instructions: float | None


def resources(program: str, kernel: Any, together: int) -> Resources:
    """Return what a compiled kernel takes."""
    if "cubin" not in kernel.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"]))
        return Resources(int(found["vgpr_count"]), 4 * int(found["vgpr_spill_count"]), kernel.metadata.shared, None)
    used, code = (_read_binary(kernel, flag) for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = (int(_found(rf"{name}:(\d+)", used)) for name in ("REG", "STACK"))
    instructions = _longest_loop(code) * THREADS / (together * BLOCK)
    looped = None if program.startswith(("repeat", "add")) else round(instructions, 1)  # these read no vector in a loop
    return Resources(registers, stack, kernel.metadata.shared, looped)


def _read_binary(kernel: Any, flag: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, pattern
    return match.group(1)


def _longest_loop(code: str) -> int:
    """Return how many instructions lie between a branch and the earlier one it returns to."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    places = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    longest = 0
    for index, (_, text) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and places.get(int(branch.group(1), 16), index) < index:
            longest = max(longest, index - places[int(branch.group(1), 16)] + 1)
    return longest


def measure() -> list[dict[str, Any]]:
    """Compile everything."""
    rows = []
    for target, (program, together), aligned in product(TARGETS, PROGRAMS.items(), (True, False)):
        dtypes = (torch.float32, torch.bfloat16, torch.float16) if program.startswith("fold") else (torch.float32,)
        for dtype in dtypes:
            kernel = compiled(program, arguments(program, dtype, aligned=aligned), together, target)
            about = {"target": target, "program": program, "dtype": str(dtype)[6:], "aligned": aligned}
            rows.append(about | asdict(resources(program, kernel, together)))
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    import triton

    write("kernels_compiled", measure(), triton=triton.__version__, measured="compiled only, run nowhere")
