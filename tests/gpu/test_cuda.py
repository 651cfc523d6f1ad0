"""The same random numbers, and the same sketches up to rounding, on a CUDA device as on the CPU."""

import pytest
import torch

import gradsketch as gs
from contracts.sketch_cases import CASES
from gradsketch.transforms import Fourier, Haar, Hadamard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_random_numbers_are_the_same_bits():
    s = gs.Stream(7, "cuda")
    for draw in (s.words, s.signs, s.normals, s.uniforms):
        assert torch.equal(draw(5, 300_000, device="cuda").cpu(), draw(5, 300_000))
    assert torch.equal(s.permutation(100_000, device="cuda").cpu(), s.permutation(100_000))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(300, 96), (300_001, 4096)])
def test_sketches_differ_by_rounding_only(case, n, d):
    phi = case.build(*case.fit(n, d))
    generator = torch.Generator().manual_seed(0)
    for map_ in (phi, phi.T):
        x = torch.randn(2, map_.n, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(map_(x.cuda()).cpu(), map_(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [Hadamard, Fourier, lambda n: Haar(n, gs.Stream(0, "haar"))])
def test_transforms_longer_than_a_piece(make):
    transform = make(1 << 25)
    x = torch.randn(1 << 25, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    y = transform(x)
    assert float(y.norm() / x.norm()) == pytest.approx(1, abs=1e-5)
    assert float((transform.T(y) - x).norm() / x.norm()) < 1e-5
