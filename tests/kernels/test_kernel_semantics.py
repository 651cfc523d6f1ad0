"""What Triton compiles for an NVIDIA GPU is run on NumPy: the same sketches as torch's, no race, no access outside."""

import functools
import re

import pytest
import torch

import gradsketch as gs
from gradsketch.kernels import SignedBlocks, definition, switched_off
from kernels.ptx import PtxError
from kernels.without_gpu import run_ptx

pytest.importorskip("triton")

FIRST, SECOND = gs.Stream(3, "B"), gs.Stream(3, "G")
BLOCKS, SIGNS = SignedBlocks(FIRST, SECOND), SignedBlocks(FIRST, None)
STREAMS = {"blocks": BLOCKS, "signs": SIGNS}


def at_offset(rows, n, dtype, offset):
    """Return vectors that begin ``offset`` numbers after an aligned address."""
    memory = torch.randn(rows * n + 16, generator=torch.Generator().manual_seed(n)).to(dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[offset : offset + rows * n].view(rows, n)


def relative(came, exact, size=None):
    """Return the error relative to the norm of ``size``: one number may be small where terms cancel."""
    return float((came.double() - exact).norm() / (exact if size is None else size.double()).norm())


def folds_right(kind, rows, n, width, dtype=torch.float32, offset=0):
    x, blocks = at_offset(rows, n, dtype, offset), STREAMS[kind]
    exact = definition.folded(x, width, blocks.first, blocks.second)
    assert relative(blocks.fold(x, width), exact, x) < 1e-6  # float32's rounding; one wrong sign is above 1e-3


def repeats_right(kind, rows, n, width):
    u, blocks = at_offset(rows, width, torch.float32, 0), STREAMS[kind]
    exact = definition.repeated(u, n, blocks.first, blocks.second)
    assert relative(blocks.repeat(u, n), exact) < 5e-7


@pytest.mark.parametrize("kind", ["blocks", "signs"])
def test_the_definition_is_what_torch_computes(kind):
    n, width = 12_345, 2048
    phi = gs.AFFD(n, width, seed=5) if kind == "blocks" else gs.AFJL(n, width, seed=5)
    kernel = phi._form._kernel
    x, u = torch.randn(2, n, dtype=torch.float64), torch.randn(2, width, dtype=torch.float64)
    assert relative(phi._form._folded(x, width), definition.folded(x, width, kernel.first, kernel.second)) < 1e-14
    assert relative(phi._form._repeated(u, n), definition.repeated(u, n, kernel.first, kernel.second)) < 1e-14


@pytest.mark.parametrize("kind", ["blocks", "signs"])
def test_folds_vectors_of_odd_length_at_odd_addresses(kernels_on_cpu, kind):
    kernels_on_cpu(run_ptx)
    folds_right(kind, 2, 20_003, 4096, offset=1)


def test_repeats_to_an_odd_length(kernels_on_cpu):
    kernels_on_cpu(run_ptx)
    repeats_right("signs", 2, 20_003, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [gs.AFFD, gs.AFJL])
def test_a_sketch_and_its_lift_pass_the_trial_and_agree_with_torch(kernels_on_cpu, kind):
    kernels_on_cpu(run_ptx)
    phi = kind(20_003, 100, seed=1)
    x, w = torch.randn(3, 20_003), torch.randn(3, 100)
    came, lifted = phi(x), phi.lift(w)
    with switched_off():
        torch.testing.assert_close(came, phi(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lifted, phi.lift(w), rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_the_batch(kernels_on_cpu, believed):
    kernels_on_cpu(run_ptx)
    x = torch.randn(3, 20_003)
    assert torch.equal(SIGNS.fold(x, 64), torch.cat([SIGNS.fold(row[None], 64) for row in x]))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "offset"), [(4096, 0), (40_000, 0), (40_000, 1), (40_003, 0), (40_003, 7)])
@pytest.mark.parametrize("kind", ["blocks", "signs"])
def test_folds_everything_it_is_offered(kernels_on_cpu, kind, n, offset, dtype, target):
    kernels_on_cpu(functools.partial(run_ptx, target=target))
    for rows, width in ((2, 8192), (1, 4096), (3, 1)):
        folds_right(kind, rows, n, width, dtype, offset)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n", [4096, 40_000, 40_003])
@pytest.mark.parametrize("kind", ["blocks", "signs"])
def test_repeats_everything_it_is_offered(kernels_on_cpu, kind, n, target):
    kernels_on_cpu(functools.partial(run_ptx, target=target))
    for rows, width in ((2, 8192), (1, 4096), (3, 1)):
        repeats_right(kind, rows, n, width)


# Barriers


def barriers(text):
    return [match.span() for match in re.finditer(r"bar\.sync\s+0;", text)]


def without_barrier(number, text):
    begin, end = barriers(text)[number]
    return text[:begin] + text[end:]


def is_noticed(work, number):
    """Whether work goes wrong, or is found to race, without one of the barriers of its program."""
    try:
        work(number)
    except (PtxError, AssertionError):
        return True
    return False


def fold_without(number, kind="blocks", target="sm_90", seen=None):
    """Fold with one barrier left out of the first program (None: count them)."""

    def start(program, grid, *arguments, together):
        if program.startswith("add"):
            return run_ptx(program, grid, *arguments, together=together, target=target)

        def change(text):
            if number is None:
                seen.append(len(barriers(text)))
                return text
            return without_barrier(number, text)

        return run_ptx(program, grid, *arguments, together=together, target=target, change=change)

    x, blocks = at_offset(1, 9 * 4096, torch.float32, 0), STREAMS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradsketch.kernels.blocks.start", start)
        patch.setattr("gradsketch.kernels.plan._PROGRAMS", 1)  # one program, three rounds
        came = blocks.fold(x, 4096)
    assert relative(came, definition.folded(x, 4096, blocks.first, blocks.second)) < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", ["blocks", "signs"])
def test_every_barrier_is_needed_and_a_missing_one_is_noticed(kind, target):
    work = functools.partial(fold_without, kind=kind, target=target)
    count: list[int] = []
    work(None, seen=count)
    unnoticed = [number for number in range(count[0]) if not is_noticed(work, number)]
    assert count[0] >= 2
    assert unnoticed == []


def test_a_missing_barrier_is_noticed():
    assert is_noticed(functools.partial(fold_without, kind="signs"), 1)
