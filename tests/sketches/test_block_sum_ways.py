"""A matrix's sketch is the same from its entries, from its factors and from its rows, sides folded or whole."""

import pytest
import torch

import gradsketch as gs


@pytest.mark.parametrize(
    ("rows", "columns", "d"),
    [
        (300, 40, 4096),  # both sides whole
        (1000, 24, 16),  # rows folded in whole stretches and a part
        (24, 1000, 16),  # columns folded
        (700, 900, 7),  # both folded, d no power of two
        (20000, 8, 32768),  # rows folded to more coordinates than one product makes
        (5000, 3, 2),  # hardly any coordinates
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_way_in_gives_one_sketch(rows, columns, d, dtype):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(rows, (2, 5), generator=generator)
    index[:, :2] = torch.tensor([0, rows - 1])
    right = torch.randn(2, 5, columns, generator=generator).to(dtype)
    left = torch.nn.functional.one_hot(index, rows).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = left.to(wide).mT @ right.to(wide)
    phi = gs.BlockSum({"weight": (rows, columns)}, d)
    from_entries, from_factors, from_rows = (torch.zeros(2, d, dtype=wide) for _ in range(3))
    phi.add_gradient(from_entries, "weight", matrix)
    phi.add_outer(from_factors, "weight", left, right)
    phi.add_rows(from_rows, "weight", index, right)
    close = {"rtol": 1e-9, "atol": 1e-9} if wide == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(from_factors, from_entries, **close)
    torch.testing.assert_close(from_rows, from_entries, **close)
