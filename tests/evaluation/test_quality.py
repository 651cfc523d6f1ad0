"""Noise, Pearson r and their intervals, against closed forms and simulation."""

import math

import pytest
import torch

from gradsketch import InputError
from gradsketch.evaluation.quality import needed_size, sketch_quality


def _world(examples, n, d, seed, rank=8):
    """Gradients with a common part, and their dense Gaussian sketches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, n, generator=generator, dtype=torch.float64)
    x += (
        3
        * torch.randn(examples, rank, generator=generator).double()
        @ torch.randn(rank, n, generator=generator).double()
    )
    phi = torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5
    return x @ x.T, x @ phi


def test_perfect_sketches():
    x = torch.randn(6, 9, dtype=torch.float64)
    quality = sketch_quality(x @ x.T, x)
    assert quality.noise < 1e-6
    assert quality.pearson == pytest.approx(1)
    assert quality.pearson_interval == pytest.approx((1, 1))


def test_against_a_loop_over_pairs():
    exact, sketches = _world(7, 50, 16, 0)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    x = torch.stack([exact[p] for p in pairs])
    y = torch.stack([sketches[i] @ sketches[j] for i, j in pairs])
    scale = torch.stack([(exact[i, i] * exact[j, j]).sqrt() for i, j in pairs])
    quality = sketch_quality(exact, sketches)
    assert quality.pearson == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), rel=1e-10)
    assert quality.noise == pytest.approx(((x - y) / scale).square().mean().sqrt().item() * 4, rel=1e-10)


@pytest.mark.statistical
def test_a_dense_gaussian_has_noise_one():
    """Orthogonal vectors, 64 examples, d = 64: noise 1; relative standard deviation below 5 %, allowed 25 %."""
    x = torch.eye(64, 200, dtype=torch.float64)
    phi = torch.randn(200, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
    quality = sketch_quality(x @ x.T, x @ phi)
    assert quality.noise == pytest.approx(1, abs=0.25)
    low, high = quality.noise_interval
    assert low < quality.noise < high


@pytest.mark.statistical
def test_the_interval_covers_the_r_of_many_examples():
    """95 % intervals for r from 40 examples, 30 trials; fewer than 22 hits have probability below 1e-4 at 95 %."""
    large = [sketch_quality(*_world(400, 60, 32, 0)).pearson]
    hits = 0
    for seed in range(30):
        low, high = sketch_quality(*_world(40, 60, 32, seed)).pearson_interval
        hits += low - 0.02 <= large[0] <= high + 0.02
    assert hits >= 22


@pytest.mark.statistical
def test_the_needed_size_reaches_the_wanted_r():
    """r at the recommended d is the wanted one within 0.05."""
    exact, sketches = _world(80, 400, 64, 0)
    d = math.ceil(needed_size(exact, sketch_quality(exact, sketches).noise, 0.9))
    rs = [sketch_quality(*_world(80, 400, d, seed)).pearson for seed in range(5)]
    assert sum(rs) / 5 == pytest.approx(0.9, abs=0.05)


def test_zero_gradients_are_left_out():
    exact, sketches = _world(5, 50, 16, 0)
    padded = torch.zeros(6, 6, dtype=torch.float64)
    padded[:5, :5] = exact
    with_zero = sketch_quality(padded, torch.cat([sketches, torch.zeros(1, 16, dtype=torch.float64)]))
    assert with_zero.pearson == pytest.approx(sketch_quality(exact, sketches).pearson)


def test_bad_input():
    with pytest.raises(InputError, match="2 with a gradient"):
        sketch_quality(torch.diag(torch.tensor([1.0, 1.0, 0.0])), torch.eye(3))
    with pytest.raises(InputError, match=r"Pearson r of 1\.0"):
        needed_size(torch.eye(3), 1.0, 1.0)
    assert needed_size(torch.ones(3, 3), 1.0, 0.5) == math.inf


def test_inner_products_that_differ_by_rounding_alone_have_no_correlation():
    # One gradient eight times, its inner products rounded to float32: r was a number of rounding errors.
    exact = torch.full((8, 8), 3.0, dtype=torch.float64)
    exact += 3e-7 * torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sketches = torch.ones(8, 64) + 1e-7 * torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    quality = sketch_quality(exact, sketches)
    assert math.isnan(quality.pearson)
    assert all(map(math.isnan, quality.pearson_interval))
    assert needed_size(exact, 1.0, 0.95) == math.inf
