"""Kernels on a real device: torch's sketches up to rounding, the same bits every time, and no warning at first use."""

import pytest
import torch

import gradsketch as gs
from gradsketch.kernels import SignedBlocks, switched_off, trust

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
pytest.importorskip("triton")


def at_offset(rows, n, dtype, offset):
    memory = torch.randn(rows * n + 16, device="cuda").to(dtype)
    return memory[offset : offset + rows * n].view(rows, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(4096, 100), (40_003, 8192), (1_000_000, 1000), ((1 << 24) + 1, 1 << 16)])
@pytest.mark.parametrize("kind", [gs.AFFD, gs.AFJL])
def test_kernels_agree_with_torch(kind, n, d, dtype):
    phi = kind(n, min(n, d))
    for offset in (0, 1):
        x, w = at_offset(2, n, dtype, offset), torch.randn(2, phi.d, device="cuda")
        came, lifted = phi(x), phi.lift(w)
        assert phi._form._kernel.can_fold(x)
        with switched_off():
            for one, other in ((came, phi(x)), (lifted, phi.lift(w))):
                assert float((one - other).norm() / other.norm()) < 1e-6


def test_every_variant_was_right_at_its_first_use():
    """Warnings are errors here, so this only says that trials were made."""
    assert trust._verdicts
    assert all(trust._verdicts.values())


@pytest.mark.parametrize("second", [gs.Stream(0, "G"), None], ids=["blocks", "signs"])
def test_bits_are_the_same_every_time_and_in_every_batch(second):
    blocks = SignedBlocks(gs.Stream(0, "B"), second)
    x = torch.randn(5, 1_000_003, device="cuda")
    first = blocks.fold(x, 4096)
    for _ in range(20):
        assert torch.equal(blocks.fold(x, 4096), first)
    assert torch.equal(torch.cat([blocks.fold(row[None], 4096) for row in x]), first)


def test_more_rows_than_a_grid_has():
    blocks = SignedBlocks(gs.Stream(0, "B"), gs.Stream(0, "G"))
    x = torch.randn(70_000, 4096, device="cuda")
    came = blocks.fold(x, 64)
    assert torch.equal(came[-3:], blocks.fold(x[-3:].clone(), 64))


def test_vectors_of_more_than_2_to_the_31_numbers():
    n = (1 << 31) + 4099
    if torch.cuda.mem_get_info()[0] < 6 * n:
        pytest.skip("needs 13 GB")
    blocks = SignedBlocks(gs.Stream(0, "B"), None)
    x = torch.zeros(1, n, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 1
    sign = float(gs.Stream(0, "B").signs(n - 1, 1)[0])
    came = blocks.fold(x, 4096)
    assert float(came[0, (n - 1) % 4096]) == sign
    assert int((came != 0).sum()) == 1
