"""What one kind promises and the others do not; and that bad input never gives a number."""

import math

import pytest
import torch

import gradsketch as gs
from contracts.sketch_cases import CASES
from unchecked import errors_of


def test_qk_is_a_kronecker_product_of_partial_isometries():
    phi = gs.QK(1 << 12, 64, factors=3)
    assert phi.sizes == ((4, 16), (4, 16), (4, 16))
    assert "4×16 ⊗ 4×16 ⊗ 4×16" in repr(phi)
    gram = phi.dense() @ phi.dense().T
    torch.testing.assert_close(gram, torch.eye(64, dtype=torch.float64) * 64, rtol=0, atol=1e-10)
    x = [torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    rank_one = torch.kron(torch.kron(x[0], x[1]), x[2])
    sketch = phi(rank_one).view(4, 4, 4)
    for axis in range(3):
        unfolded = sketch.movedim(axis, 0).reshape(4, 16)
        assert float(torch.linalg.svdvals(unfolded)[1]) < 1e-10 * float(unfolded.norm())  # still rank one


@pytest.mark.parametrize(("n", "factors"), [(1_063_680, 4), (6_900_000, 3)])
def test_qk_where_pieces_of_the_vector_are_all_padding(n, factors):
    """The first factor's columns are a multiple of 16, so that the last of them may begin beyond the vector's end."""
    phi, x = gs.QK(n, 64, factors=factors), torch.randn(n, generator=torch.Generator().manual_seed(0))
    columns = [b for _, b in phi.sizes]
    product = torch.nn.functional.pad(x.double(), (0, math.prod(columns) - n)).view(columns)
    for axis, matrix in enumerate(phi.matrices):
        product = torch.tensordot(matrix, product, dims=([1], [axis])).movedim(0, axis)
    want = product.flatten() * (math.prod(columns) / 64) ** 0.5
    torch.testing.assert_close(phi(x).double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    w = torch.randn(64, generator=torch.Generator().manual_seed(1))
    assert float(phi.lift(w) @ x) == pytest.approx(float(w.double() @ want), rel=1e-3, abs=1e-3 * float(want.norm()))


@pytest.mark.parametrize(("n", "d"), [(1 << 20, 1 << 12), (1 << 24, 1 << 20), (1 << 27, 1 << 22), (10**6 + 1, 1 << 10)])
def test_qk_balances_its_factors(n, d):
    sizes = gs.QK(n, d).sizes
    rows, columns = zip(*sizes, strict=True)
    assert math.prod(rows) == d
    assert n <= math.prod(columns) < 1.02 * n
    assert max(rows) <= 2 * min(rows)
    assert max(columns) <= 1024


def test_dense_entries_do_not_depend_on_d():
    wide, narrow = gs.Dense(300, 100), gs.Dense(300, 7)
    assert torch.equal(wide.dense(torch.float32)[:7] * 10, narrow.dense(torch.float32) * 7**0.5) or torch.allclose(
        wide.dense()[:7] * 10, narrow.dense() * 7**0.5, rtol=1e-14
    )


def test_sjlt_columns_hold_the_promised_entries():
    matrix = gs.SJLT(500, 60, nonzeros=4).dense()
    assert torch.equal((matrix != 0).sum(0), torch.full((500,), 4))
    torch.testing.assert_close(matrix.abs().sum(0), torch.full((500,), 2.0, dtype=torch.float64))
    places = matrix.nonzero()[:, 0]
    assert torch.equal((places % 4).bincount(), torch.full((4,), 500))  # one in every class


def test_fjl_rows_hold_the_promised_entries():
    phi = gs.FJL(512, 40, nonzeros=8)
    mixing = gs.FJL(512, 40, nonzeros=8).dense() @ (_signed_hadamard(phi, 512)).T
    assert int((mixing.abs() > 1e-9).sum(1).max()) <= 8


def _signed_hadamard(phi, n):
    from scipy.linalg import hadamard

    signs = phi.stream.child("B").signs(0, n, dtype=torch.float64)
    return torch.from_numpy(hadamard(n)).double() / n**0.5 * signs


@pytest.mark.parametrize("n", [64, 60])
def test_ffd_lifts_by_stacked_fastfood_blocks(n):
    """H G Π H B for every block, each factor a matrix; B, G and Π of a block are its own."""
    from scipy.linalg import hadamard

    phi, h = gs.FFD(n, 16, seed=3), torch.from_numpy(hadamard(16)).double() / 4
    b = phi.stream.child("B").signs(0, 64, dtype=torch.float64)
    g = phi.stream.child("G").normals(0, 64, dtype=torch.float64)
    keys = phi.stream.child("Pi").words(0, 128).view(torch.int64).view(4, 16)
    blocks = [
        h @ torch.diag(g[k : k + 16]) @ torch.eye(16, dtype=torch.float64)[keys[k // 16].argsort()] @ h * b[k : k + 16]
        for k in range(0, 64, 16)
    ]
    torch.testing.assert_close(phi.dense().T, torch.cat(blocks)[:n], rtol=0, atol=1e-12)
    assert len({tuple(row.argsort().tolist()) for row in keys}) == 4


BAD = {
    "gs.AFFD(10, 11)": "Type d=10 or less",
    "gs.AFFD(0, 1)": "n=0. Wanted: a positive integer",
    "gs.AFFD(10, True)": "d=True. Wanted: a positive integer",
    "gs.AFFD(10, 2.0)": "d=2.0. Wanted: a positive integer",
    "gs.AFFD('10', 2)": "n='10'",
    "gs.AFFD(10, 2, seed='a')": "seed='a'",
    "gs.AFFD(10, 2, form='lokal')": "Wanted: 'local' or 'global' or 'paper'",
    "gs.AFFD(10, 2, transform='dct')": "Wanted: 'hadamard' or 'fft' or 'haar'",
    "gs.AFFD(10, 2, diagonal=3)": "Wanted: 'signs' or 'gaussian'",
    "gs.AFFD(10, 2, form='local', transform='fft')": "Wanted: form='paper'",
    "gs.AFJL(10, 2, form='local')": "Wanted: 'global' or 'paper'",
    "gs.Dense(10, 2, distribution='uniform')": "Wanted: 'gaussian' or 'rademacher'",
    "gs.FFD(100, 48)": "Type d=32 or d=64",
    "gs.FFD(50, 48)": "Type d=32.",
    "gs.QK(100, 48)": "Type d=32 or d=64",
    "gs.QK(100, 8, factors=0)": "a number from 1 to 7",
    "gs.QK(100, 8, factors=9)": "a number from 1 to 7",
    "gs.SJLT(100, 10, nonzeros=4)": "Type d=8 or nonzeros=1",
    "gs.SJLT(100, 10, nonzeros=0)": "a divisor of d",
    "gs.FJL(100, 10, nonzeros=0)": "a positive integer",
    "gs.AFFD(10, 2)([1.0] * 10)": "was given a list",
    "gs.AFFD(10, 2)(torch.zeros(10, dtype=torch.int64))": "Call .float() on it first",
    **{
        f"gs.{kind}(16, 4){call}(torch.zeros({length}, dtype=torch.{dtype}))": f"a tensor of dtype torch.{dtype}"
        for kind in ("Dense", "FJL", "FFD", "AFFD", "AFJL", "QK", "SJLT")
        for call, length, dtype in (("", 16, "int64"), (".lift", 4, "bool"), ("", 16, "complex64"))
    },
    "gs.AFFD(10, 2)(torch.tensor(1.0))": "vectors of length 10",
    "gs.AFFD(10, 2).truncate(1.5)": "a size from 1 to 2",
}


def test_bad_arguments_are_explained():
    for snippet, error in zip(BAD, errors_of(list(BAD)), strict=True):
        assert error.startswith("InputError: "), (snippet, error)
        assert BAD[snippet] in error, (snippet, error)
        assert error.count(". ") >= 2, (snippet, error)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_vectors_are_explained(case):
    n, d = case.fit(64, 16)
    phi = case.build(n, d)
    for map_, length in ((phi, n), (phi.T, d)):
        with pytest.raises(gs.InputError, match=f"vectors of length {length}"):
            map_(torch.zeros(2, length + 1))
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.zeros(3, length)
            x[1, length - 1] = bad
            with pytest.raises(gs.NonFiniteError, match=f"vector 1 of the batch holds .* at position {length - 1}"):
                map_(x)
    with pytest.raises(gs.NonFiniteError, match="Scale the input down"):
        phi(torch.full((n,), 3e38))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vectors_of_one_number(case):
    if case.kind in ("TiledSRHT", "BlockSum"):  # a selection of parameters may be a single one
        assert case.build(1, 1)(torch.full((1,), -3.0)).abs() == 3
    else:
        with pytest.raises(gs.InputError, match=r"n=1\. Wanted: vectors of two numbers or more"):
            case.build(1, 1)
