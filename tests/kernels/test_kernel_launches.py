"""The arithmetic of launches: every number is read once, nothing outside, within what a GPU can launch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsketch as gs
from gradsketch.kernels import SignedBlocks
from gradsketch.kernels.plan import BLOCK, COLUMNS, FoldPlan, Rounds, row_slices
from kernels.without_gpu import Recorder

WIDTHS = st.integers(0, 24).map(lambda bits: 1 << bits)
LENGTHS = st.integers(1, 1 << 40)
TOGETHER = st.sampled_from([Rounds.blocks, Rounds.signs])


def blocks_of(program, plan, together):
    """The blocks that a program of a fold reads, as the loop of ``programs`` says, with those past the end left out."""
    count, step = -(-plan.n // BLOCK), plan.classes * plan.splits
    rounds = range(program, count, step * together)
    return [block for begin in rounds for block in range(begin, begin + together * step, step) if block < count]


@given(n=st.integers(1, 1 << 21), width=WIDTHS, together=TOGETHER)
def test_every_block_is_read_by_one_program_of_its_class(n, width, together):
    plan = FoldPlan.of(n, width, together)
    read = [blocks_of(program, plan, together) for program in range(plan.programs)]
    assert sorted(itertools.chain(*read)) == list(range(-(-n // BLOCK)))
    for program, blocks in enumerate(read):
        # Block j is added to numbers j·4096 … of the folded vector, modulo its width; a program writes to its class.
        assert {block % plan.classes for block in blocks} <= {program % plan.classes}
    assert plan.classes * BLOCK == max(width, BLOCK)


@given(n=LENGTHS, width=WIDTHS, together=TOGETHER)
def test_programs_find_their_places_in_the_partial_sums(n, width, together):
    plan = FoldPlan.of(n, width, together)
    assert plan.partial == plan.splits * max(width, BLOCK) == plan.terms * width
    assert plan.programs < 2**31
    # ``add_rows`` computes places in 32 bits, and is not asked where there is one term.
    assert plan.terms == 1 or plan.partial < 2**31
    assert plan.programs <= max(1056, plan.classes)


@given(count=st.integers(1, 200_000), bytes_a_row=st.integers(1, 1 << 26))
def test_rows_are_taken_once_in_runs_that_a_grid_can_hold(count, bytes_a_row):
    runs = list(row_slices(count, bytes_a_row))
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(count))
    assert all(run.stop - run.start <= 65535 and run.start % 16 == 0 for run in runs)
    assert all((run.stop - run.start) * bytes_a_row <= max(1 << 28, 16 * bytes_a_row) for run in runs)


@given(
    rows=st.integers(1, 3),
    n=st.integers(1, 30_000),
    width=st.integers(0, 14).map(lambda bits: 1 << bits),
    offset=st.integers(0, 15),
    kind=st.sampled_from(["blocks", "signs"]),
)
def test_launches_say_what_the_programs_expect(rows, n, width, offset, kind):
    recorder = Recorder()
    blocks = SignedBlocks(gs.Stream(0, "B"), gs.Stream(0, "G") if kind == "blocks" else None)
    x = torch.zeros(rows * n + 16)[offset : offset + rows * n].view(rows, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradsketch.kernels.blocks.start", recorder)
        out = blocks.fold(x, width)
        lifted = blocks.repeat(torch.zeros(rows, width), n)
    assert out.shape == (rows, width)
    assert lifted.shape == (rows, n)
    fold, *sums, repeat = recorder.launches
    check_fold(fold, x, rows, n, width)
    for program, grid, (partial, target, terms, columns), _ in sums:
        assert (program, target.shape, columns) == ("add_rows", (rows, width), width)
        assert partial.numel() == rows * terms * width
        assert (grid[0] - 1) * COLUMNS < width <= grid[0] * COLUMNS
    program, (count, many), (u, target, identity, length, classes), together = repeat
    assert (program, many, length, target.shape) == (f"repeat_{kind}", rows, n, (rows, n))
    assert u.shape == (rows, classes * BLOCK)
    assert (count - 1) * together * BLOCK < n <= count * together * BLOCK
    assert identity.dtype == torch.int32


def check_fold(launch, x, rows, n, width):
    _, (programs, many), (source, partial, _, length, classes, splits), together = launch
    assert source.data_ptr() == x.data_ptr()
    assert source.stride() == (n, 1) or rows == 1
    assert (programs, many, length) == (classes * splits, rows, n)
    assert partial.numel() == rows * classes * splits * BLOCK
    # One thread a counter: 256 threads, 32 counters a block and stream.
    assert together * 32 * (2 if launch[0] == "fold_blocks" else 1) == 256
