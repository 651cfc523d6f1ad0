"""Every kernel compiles for four kinds of GPU, within the registers and shared memory of docs/hardware.md."""

import pytest
import torch
from benchmarks.kernels_compiled import PROGRAMS, TARGETS, arguments, compiled, resources

pytest.importorskip("triton")

# Two programs of 256 threads that transform blocks fit on an NVIDIA multiprocessor of 64K registers.
REGISTERS = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 512}
SPILLED = {"sm_80": 96, "sm_90": 48, "sm_100": 48, "gfx942": 0}
SHARED = 20 * 1024


def check(program, dtype, aligned, target):
    kernel = compiled(program, arguments(program, dtype, aligned=aligned), PROGRAMS[program], target)
    used = resources(program, kernel, PROGRAMS[program])
    assert used.registers <= (REGISTERS[target] if program.endswith("blocks") else 512)
    assert used.spilled <= SPILLED[target]
    assert used.shared <= SHARED
    return used


def test_the_fold_reads_a_number_in_thirty_instructions():
    assert check("fold_blocks", torch.float32, False, "sm_90").instructions < 30


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("program", list(PROGRAMS))
def test_kernels_compile_for_every_kind_of_gpu(program, aligned, target):
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if program.startswith("fold") else (torch.float32,):
        check(program, dtype, aligned, target)
