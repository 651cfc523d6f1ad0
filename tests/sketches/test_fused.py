"""The kernel for CPUs gives what torch gives, whatever the shapes, and steps back where it must."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.kernels import trust
from gradsketch.kernels.native import compiled
from gradsketch.sketches import fused
from gradsketch.sketches.tiling import Tiling

SHAPES = ((1, 24), (24, 1), (2, 2), (4, 3), (8, 8), (9, 100), (64, 48), (300, 17), (17, 5000), (5000, 8))
SIZES = (1, 4, 64, 700, 4096, 40000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(compiled("tiles") is None, reason="there is no C compiler here")


def by_torch(work):
    with trust.switched_off():
        return work()


def numbers(shape, b, t, dtype=torch.float32):
    torch.manual_seed(0)
    left, right = (torch.randn(b, t, size).to(dtype) for size in shape)
    return left, right, torch.randint(shape[0], (b, t))


def sketches(tiling, left, right, index):
    out = torch.zeros(3, len(left), tiling.d)
    tiling.add_outer(out[0], left, right)
    tiling.add_rows(out[1], index, right)
    tiling.add_matrix(out[2], left.float().mT @ right.float())
    return out


def build(shape, d):
    return Tiling(*shape, min(d, shape[0] * shape[1]), gs.Stream(0, "test"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_gives_what_torch_gives(shape, dtype):
    for d in SIZES:
        tiling, factors = build(shape, d), numbers(shape, 3, 19, dtype)
        wanted = by_torch(lambda: sketches(tiling, *factors))  # noqa: B023
        torch.testing.assert_close(sketches(tiling, *factors), wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("t", [1, 7, 8, 64, 65, 512, 513, 1100])
def test_any_number_of_tokens(t):
    tiling, factors = build((40, 70), 256), numbers((40, 70), 2, t)
    wanted = by_torch(lambda: sketches(tiling, *factors))
    torch.testing.assert_close(sketches(tiling, *factors), wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))


def test_factors_may_lie_in_memory_in_any_way():
    tiling, (left, right, index) = build((40, 70), 256), numbers((40, 70), 4, 6)
    base = torch.randn(6, 4, 140)
    ways = (left.mT.contiguous().mT, base[..., 70:].transpose(0, 1), index.T.contiguous().T)
    expanded = (left[:, :1].expand(-1, 6, -1), right[:1].expand(4, -1, -1), index[:1].expand(4, -1))
    for factors in (ways, expanded):
        wanted = by_torch(lambda: sketches(tiling, *factors))  # noqa: B023
        torch.testing.assert_close(sketches(tiling, *factors), wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))


def test_bits_depend_neither_on_threads_nor_on_the_company():
    tiling, (left, right, index) = build((40, 70), 256), numbers((40, 70), 5, 700)
    all_at_once = sketches(tiling, left, right, index)
    alone = [sketches(tiling, left[i : i + 1], right[i : i + 1], index[i : i + 1]) for i in range(5)]
    assert torch.equal(torch.cat(alone, dim=1)[:2], all_at_once[:2])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sketches(tiling, left, right, index)[:2], all_at_once[:2])
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_with_its_example():
    tiling, (left, right, _) = build((40, 70), 256), numbers((40, 70), 3, 20)
    left[1, 5, 3] = torch.inf
    out = torch.zeros(3, 256)
    tiling.add_outer(out, left, right)
    assert torch.isfinite(out).all(dim=1).tolist() == [True, False, True]


def test_double_precision_and_derivatives_are_torchs():
    tiling, (left, right, _) = build((12, 9), 32), numbers((12, 9), 2, 3)
    out = torch.zeros(2, 32, dtype=torch.float64)
    tiling.add_outer(out, left.double(), right.double())
    single = torch.zeros(2, 32)
    tiling.add_outer(single, left, right)
    torch.testing.assert_close(single.double(), out, rtol=1e-5, atol=1e-5)
    phi = gs.TiledSRHT(12, 9, 32)
    phi.outer(left.requires_grad_(), right).square().sum().backward()
    assert float(left.grad.abs().min()) > 0


def test_a_row_that_the_matrix_lacks_is_an_error():
    tiling, (_, right, index) = build((12, 9), 32), numbers((12, 9), 2, 3)
    with pytest.raises((IndexError, InputError)):
        tiling.add_rows(torch.zeros(2, 32), index + 12, right)


def test_a_kernel_that_is_wrong_is_noticed_and_not_used(monkeypatch):
    right = fused.FusedTiles.add
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(
        fused.FusedTiles, "add", lambda self, out, *factors: right(self, out, factors[0], 1.01 * factors[1])
    )
    tiling, factors = build((40, 70), 64), numbers((40, 70), 2, 5)
    with pytest.warns(
        GradsketchWarning, match=r"The kernel tiles for torch\.float32 on cpu differs from torch by 1\.0e-02"
    ):
        out = sketches(tiling, *factors)
    assert torch.equal(out, by_torch(lambda: sketches(tiling, *factors)))


def test_the_trial_also_sums_up_several_pieces(monkeypatch):
    right = fused.FusedTiles.add

    def wrong_in_pieces(self, out, left, other, piece=512):
        right(self, out, left, other if left.shape[1] <= piece else 1.01 * other, piece)

    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(fused.FusedTiles, "add", wrong_in_pieces)
    tiling, factors = build((40, 70), 64), numbers((40, 70), 2, 5)
    with pytest.warns(GradsketchWarning, match="The kernel tiles"):
        tiling.add_outer(torch.zeros(2, 64), *factors[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    wanted = sketches(build((40, 70), 256), *numbers((40, 70), 2, 9))
    factors = numbers((40, 70), 2, 9)
    torch.set_default_dtype(dtype)
    try:
        out = torch.zeros(2, 256, dtype=torch.float32)
        build((40, 70), 256).add_outer(out, *factors[:2])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, wanted[0])


def test_transforms_of_functions_and_forward_derivatives_are_torchs():
    phi, (left, right, _) = gs.TiledSRHT(40, 70, 256), numbers((40, 70), 3, 9)
    wanted, moved = phi.outer(left, right), phi.outer(right.new_ones(3, 9, 40), right)
    one_by_one = torch.vmap(lambda g, a: phi.outer(g[None], a[None])[0])(left, right)
    torch.testing.assert_close(one_by_one, wanted, rtol=1e-5, atol=1e-4)
    value, tangent = torch.func.jvp(lambda g: phi.outer(g, right), (left,), (torch.ones_like(left),))
    torch.testing.assert_close((value, tangent), (wanted, moved), rtol=1e-5, atol=1e-4)
    with forward_ad.dual_level():
        dual = phi.outer(forward_ad.make_dual(left, torch.ones_like(left)), right)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, moved, rtol=1e-5, atol=1e-4)


def test_a_first_use_under_autocast_is_no_fault_of_the_kernel(monkeypatch):
    monkeypatch.setattr(trust, "_verdicts", {})
    tiling, (left, right, _) = build((40, 70), 256), numbers((40, 70), 2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiling.is_fused(torch.zeros(2, 256), left, right)


VECTORS = {"one": (1,), "bias": (7,), "norm": (300,), "long": (5000,), "matrix": (4, 6)}


def vectors(b):
    torch.manual_seed(1)
    return {name: torch.randn(b, *shape) for name, shape in VECTORS.items() if len(shape) == 1}


def sketched(phi, gradients):
    out = torch.zeros(len(next(iter(gradients.values()))), phi.d)
    phi.add_vectors(out, gradients)
    return out


@pytest.mark.parametrize("layout_d", [None, 4096])
@pytest.mark.parametrize("d", [1, 64, 700, 4096])
def test_vectors_of_many_parameters_in_one_call(d, layout_d):
    phi, gradients = gs.BlockSum(VECTORS, d, layout_d=layout_d), vectors(5)
    wanted = torch.zeros(5, d)
    for name, gradient in gradients.items():
        by_torch(lambda: phi.add_gradient(wanted, name, gradient))  # noqa: B023
    found = sketched(phi, gradients)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))
    alone = torch.cat([sketched(phi, {name: g[i : i + 1] for name, g in gradients.items()}) for i in range(5)])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda phi: pickle.loads(pickle.dumps(phi))])
def test_a_used_sketch_can_be_copied(copied):
    phi, gradients = gs.BlockSum(VECTORS, 64), vectors(2)
    left, right, _ = numbers((4, 6), 2, 3)
    wanted = sketched(phi, gradients)
    phi.add_outer(wanted, "matrix", left, right)
    other = copied(phi)
    found = sketched(other, gradients)
    other.add_outer(found, "matrix", left, right)
    assert torch.equal(found, wanted)
