"""Phi P is the sketch of P x, whichever way a gradient comes and however P is kept."""

import pytest
import torch

import gradsketch as gs
from gradsketch.errors import InputError
from gradsketch.sketches.preconditioned import Preconditioned
from gradsketch.sketches.roots import Pair, Root, Stack, roots_of, state_of


def symmetric(n, seed, dim=2):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn([n] * dim, generator=generator, dtype=torch.float64)
    return Root(values + values.T if dim == 2 else values)


def whole(root, n):
    return root.values * torch.eye(n).double() if root.values.ndim < 2 else root.values


@pytest.mark.parametrize(
    ("rows", "columns", "d"),
    [
        (64, 40, 4096),  # both sides whole; the first is as cheap in one product as in two steps
        (500, 24, 16),  # rows folded
        (24, 500, 16),  # columns folded
        (300, 700, 7),  # both folded, d no power of two
    ],
)
@pytest.mark.parametrize("dims", [(2, 2), (1, 2), (2, 1), (0, 2), (1, 0)])
def test_every_way_in_gives_the_sketch_of_the_product(rows, columns, d, dims):
    d = min(d, rows * columns)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(rows, (2, 5), generator=generator)
    right = torch.randn(2, 5, columns, generator=generator).double()
    left = torch.nn.functional.one_hot(index, rows).double()
    pair = Pair(symmetric(rows, 1, dims[0]), symmetric(columns, 2, dims[1]))
    plain = gs.BlockSum({"before": (3,), "weight": (rows, columns)}, d)
    phi = Preconditioned(plain, {"weight": pair})
    expected = torch.zeros(2, d).double()
    plain.add_gradient(expected, "weight", whole(pair.rows, rows) @ left.mT @ right @ whole(pair.columns, columns))
    for way, given in (("gradient", (left.mT @ right,)), ("outer", (left, right)), ("rows", (index, right))):
        found = torch.zeros(2, d).double()
        getattr(phi, f"add_{way}")(found, "weight", *given)
        assert float((found - expected).norm() / expected.norm()) < 1e-12, way
    x, w = torch.randn(3, phi.shape[1]).double(), torch.randn(3, d).double()
    torch.testing.assert_close((phi(x) * w).sum(1), (x * phi.lift(w)).sum(1), rtol=1e-9, atol=1e-6)
    # What has no root is left alone.
    x[:, 3:] = 0
    torch.testing.assert_close(phi(x), plain(x))


@pytest.mark.parametrize("coordinates", [64, None], ids=["table", "product first"])
@pytest.mark.parametrize(("rows", "columns"), [(600, 40), (40, 600), (24, 16)])
def test_outer_products_in_float32_whichever_way_is_cheaper(rows, columns, coordinates):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(2, 5, size, generator=generator) for size in (rows, columns))
    pair = Pair(symmetric(rows, 1), symmetric(columns, 2))
    plain = gs.BlockSum({"weight": (rows, columns)}, 256, coordinates=coordinates)
    phi = Preconditioned(plain, {"weight": pair})
    expected = plain((pair.rows.values @ (left.mT @ right).double() @ pair.columns.values).flatten(1))
    found = torch.zeros(2, 256)
    phi.add_outer(found, "weight", left, right)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_matrices_of_a_stack_have_roots_of_their_own():
    pairs = tuple(Pair(symmetric(4, 2 * i), symmetric(6, 2 * i + 1)) for i in range(3))
    plain = gs.BlockSum({"experts": (3, 4, 6)}, 30)
    phi = Preconditioned(plain, {"experts": Stack(pairs, 4)})
    x = torch.randn(2, 3, 4, 6).double()
    each = [p.rows.values @ x[:, i] @ p.columns.values for i, p in enumerate(pairs)]
    expected = plain(torch.stack(each, 1).flatten(1))
    torch.testing.assert_close(phi(x.flatten(1)), expected)
    rows, factors = torch.zeros(2, 30).double(), torch.zeros(2, 30).double()
    phi.add_rows(rows, "experts", torch.arange(3).expand(2, 3), x.flatten(2))
    phi.add_outer(factors, "experts", torch.eye(3).double().expand(2, 3, 3), x.flatten(2))
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(factors, expected)


@pytest.mark.parametrize("kind", ["auto", "affd"])
def test_other_kinds_and_half_precision(kind):
    plain = gs.BlockSum({"weight": (40, 30)}, 50, kind=kind)
    pair = Pair(symmetric(40, 0), symmetric(30, 1))
    phi = Preconditioned(plain, {"weight": pair})
    left, right = torch.randn(2, 5, 40).bfloat16(), torch.randn(2, 5, 30).bfloat16()
    expected = plain((pair.rows.values @ left.double().mT @ right.double() @ pair.columns.values).flatten(1))
    found = torch.zeros(2, 50)
    phi.add_outer(found, "weight", left, right)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_fingerprint_holds_the_sketch_and_every_number():
    plain, roots = gs.BlockSum({"weight": (5, 4)}, 8), {"weight": Pair(symmetric(5, 0), symmetric(4, 1, 1))}
    phi = Preconditioned(plain, roots)
    assert Preconditioned(plain, roots_of(state_of(roots))).fingerprint == phi.fingerprint
    other = {"weight": Pair(symmetric(5, 0), symmetric(4, 2, 1))}
    seeded = gs.BlockSum({"weight": (5, 4)}, 8, seed=1)
    prints = {p.fingerprint for p in (plain, phi, Preconditioned(plain, other), Preconditioned(seeded, roots))}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "roots",
    [
        {"bias": Pair(symmetric(5, 0), symmetric(4, 1))},
        {"weight": Pair(symmetric(4, 0), symmetric(4, 1))},
        {"weight": Stack((Pair(symmetric(2, 0), symmetric(2, 1)),) * 4, 2)},
        {"weight": Stack((Pair(symmetric(3, 0), symmetric(2, 1)),) * 5, 2)},
    ],
)
def test_roots_that_do_not_fit_are_refused(roots):
    with pytest.raises(InputError, match="factors for"):
        Preconditioned(gs.BlockSum({"weight": (5, 4)}, 8), roots)
