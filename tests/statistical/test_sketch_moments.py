"""Means and variances of sketched inner products against closed forms, and the families on which kinds fail.

Every check is made at a false-alarm rate of 1e-6 over all pairs of inputs together (normal approximation; seeds are
fixed), and every check is itself tested: sketches broken on purpose must not pass it. By default a third of the kinds
is drawn, all with ``-m slow``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import gradsketch as gs
from gradsketch.sketches.layout import Layout
from gradsketch.transforms.diagonal import Signs
from sampled import a_third, latin, some
from statistical import sketch_variance as variance

pytestmark = pytest.mark.statistical

N, D, SEEDS = 1024, 64, 400
FALSE_ALARM = 1e-6


@cache
def inputs(n: int = N, d: int = D) -> dict[str, Tensor]:
    """Unit vectors of every family the theory tells apart."""
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    typical, factor = normal(n), int(n**0.5)
    one_hot, block, pair, sparse = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
    one_hot[n // 3] = 1
    block[d : 2 * d] = 1
    pair[5], pair[5 + 3 * d] = 1, -1
    sparse[:: n // 8] = normal(8)
    vectors = {
        "typical": typical,
        "correlated": 0.6 * typical + 0.8 * normal(n),
        "one-hot": one_hot,
        "rank-one": torch.kron(normal(factor), normal(n // factor)),
        "constant-block": block,
        "congruent-pair": pair,
        "sparse": sparse,
        "constant": torch.ones(n, dtype=torch.float64),
    }
    return {name: v / torch.linalg.vector_norm(v) for name, v in vectors.items()}


def grams(build: Callable[[int], gs.LinearMap], vectors: dict[str, Tensor], seeds: int = SEEDS) -> Tensor:
    """Return the inner products of the sketched inputs, [seeds, inputs, inputs]."""
    x = torch.stack(list(vectors.values()))
    sketches = torch.stack([build(seed)(x) for seed in range(seeds)])
    return sketches @ sketches.mT


def check(
    samples: Tensor, vectors: dict[str, Tensor], expected: Callable[[Tensor, Tensor], float], kurtosis: float = 3
) -> None:
    """Compare mean and variance over seeds with theory for every pair of inputs.

    The variance of the sample variance is taken from the sample or, where tails are too heavy for the sample to show
    them, from the stated kurtosis, whichever is larger.
    """
    names = list(vectors)
    bound = float(-stats.norm.ppf(FALSE_ALARM / 4 / len(names) ** 2))
    for i, first in enumerate(names):
        for j in range(i, len(names)):
            x, y = vectors[first], vectors[names[j]]
            sample, theory = samples[:, i, j], expected(x, y)
            error = (max(theory, 0) / len(sample)) ** 0.5 + 1e-9
            assert abs(float(sample.mean() - x @ y)) < bound * error, f"mean of {first} · {names[j]}"
            deviations = (sample - sample.mean()).square()
            error = max(float(deviations.std()), max(theory, 0) * (kurtosis - 1) ** 0.5) / len(sample) ** 0.5 + 1e-9
            assert abs(float(deviations.mean()) - theory) < bound * error, f"variance of {first} · {names[j]}"


KINDS: dict[str, tuple[Callable[..., gs.Sketch], Callable[[Tensor, Tensor, int], float]]] = {
    "Dense-gaussian": (partial(gs.Dense, distribution="gaussian"), variance.dense_gaussian),
    "Dense-rademacher": (partial(gs.Dense, distribution="rademacher"), variance.dense_rademacher),
    "FJL": (partial(gs.FJL, nonzeros=16), partial(variance.fjl, nonzeros=16)),
    "FFD": (gs.FFD, variance.ffd),
    "AFFD-global-gaussian": (partial(gs.AFFD, form="global", diagonal="gaussian"), variance.affd_gaussian),
    "AFFD-global-signs": (partial(gs.AFFD, form="global"), variance.affd_signs),
    "AFFD-local-gaussian": (partial(gs.AFFD, diagonal="gaussian"), variance.affd_gaussian),
    "AFFD-local-signs": (gs.AFFD, variance.affd_signs),
    "AFJL-gaussian": (partial(gs.AFJL, diagonal="gaussian"), variance.afjl_gaussian),
    "AFJL-signs": (gs.AFJL, variance.afjl_signs),
    "SJLT-1": (gs.SJLT, variance.sjlt),
    "SJLT-4": (partial(gs.SJLT, nonzeros=4), variance.sjlt),
}
# One of each way to be random; FJL, whose default of 128 nonzeros is dense, costs most.
kinds = pytest.mark.parametrize("kind", some(KINDS, ("Dense-rademacher", "AFFD-local-signs", "AFJL-signs", "SJLT-4")))


# Fourth moment over squared variance, where tails are heavier than the sample shows: FFD makes a χ²₁ of a constant
# block, whose fourth central moment is 60 and variance 2.
KURTOSIS = {"FFD": 60 / 2**2}


def build(kind: str, n: int = N, d: int = D) -> Callable[[int], gs.Sketch]:
    return lambda seed: KINDS[kind][0](n, d, seed=seed)


def theory(kind: str, d: int = D) -> Callable[[Tensor, Tensor], float]:
    return lambda x, y: KINDS[kind][1](x, y, d)


def check_kind(kind: str, samples: Tensor) -> None:
    check(samples, inputs(), theory(kind), KURTOSIS.get(kind, 3))


@kinds
def test_mean_and_variance_of_inner_products(kind):
    samples = grams(build(kind), inputs())
    check_kind(kind, samples)
    with pytest.raises(AssertionError, match="mean of"):  # a wrong scale, 1.1, does not pass
        check_kind(kind, 1.1**2 * samples)


@pytest.mark.parametrize(("kind", "d"), latin(["AFFD-local-signs", "AFFD-local-gaussian"], [256, 4096]))
def test_variance_with_several_inner_blocks(kind, d):
    vectors = inputs(16384, d)
    check(grams(build(kind, 16384, d), vectors, seeds=200), vectors, theory(kind, d))


def test_inner_blocks_shorter_than_d_in_their_worst_case():
    """Mass in two blocks of 4096 that are folded onto each other: variance 1/4096, however large d is."""
    x = torch.zeros(32768, dtype=torch.float64)
    x[:4096] = x[16384 : 16384 + 4096] = 8192**-0.5
    samples = grams(lambda seed: gs.AFFD(32768, 16384, seed=seed), {"x": x}, seeds=200)
    check(samples, {"x": x}, lambda *_: 1 / 4096)


@pytest.mark.parametrize(("kind", "transform"), latin([gs.AFFD, gs.AFJL], ["hadamard", "fft", "haar"]))
def test_forms_of_the_paper(kind, transform):
    """Unbiased; typical variance (1 + ρ²)/d for AFFD and 4 times that for AFJL, to 40 %, 4.5 standard errors.

    Kronecker products of small Haar matrices have heavier tails than Hadamard's: up to 80 %.
    """
    vectors = {name: inputs()[name] for name in ("typical", "correlated", "constant-block")}
    samples = grams(lambda seed: kind(N, D, seed=seed, form="paper", transform=transform), vectors, seeds=250)
    x, y, _ = vectors.values()
    stacked, most = torch.stack(list(vectors.values())), 1.8 if transform == "haar" else 1.4

    def holds(samples: Tensor, factor: float) -> bool:
        expected = ((samples[:, 0, 0], 2 / D), (samples[:, 0, 1], variance.dense_gaussian(x, y, D)))
        ratios = [float(sample.var()) / (factor * each) for sample, each in expected]
        errors = (samples.mean(0) - stacked @ stacked.T) / (samples.std(0) / len(samples) ** 0.5)
        unbiased = float(errors.abs().max()) < -stats.norm.ppf(FALSE_ALARM / 18)
        return unbiased and min(ratios) > 0.6 and max(ratios) < most

    factor, other = (1, 4) if kind is gs.AFFD else (4, 1)
    assert holds(samples, factor)
    assert not holds(samples, other)  # one transform too few, or too many
    assert not holds(1.1**2 * samples, factor)


def qk_theory(x: Tensor, y: Tensor) -> float:
    assert x is y
    return variance.qk(x, gs.QK(N, D, factors=2).sizes)


@pytest.mark.parametrize("name", a_third(inputs()))
def test_variance_of_qk(name):
    only = {name: inputs()[name]}
    samples = grams(lambda seed: gs.QK(N, D, seed=seed, factors=2), only, seeds=300)
    check(samples, only, qk_theory)
    with pytest.raises(AssertionError, match="of"):
        check(1.2**2 * samples, only, qk_theory)


def test_variance_of_qk_on_a_rank_one_input_is_a_product_over_its_factors():
    sizes = gs.QK(N, D, factors=2).sizes
    product = torch.tensor([(1 + 2 / d) / (1 + 2 / b) for d, b in sizes]).prod() - 1
    assert variance.qk(inputs()["rank-one"], sizes) == pytest.approx(float(product), rel=1e-6)


def matrices(kind: str, rows: int, columns: int) -> Tensor:
    """Four matrices of unit length, flat: of full rank, of rank one, or of two directions that all share."""
    normal = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    row, other = normal(rows), normal(rows)
    made = {
        "full": lambda: normal(rows, columns),
        "rank-one": lambda: torch.outer(row + 0.5 * normal(rows), normal(columns)),
        "two-directions": lambda: torch.outer(row, normal(columns)) + torch.outer(other, normal(columns)),
    }
    flat = torch.stack([made[kind]().flatten() for _ in range(4)])
    return flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)


def noise(kind: str, rows: int, columns: int, d: int, seeds: int) -> tuple[float, float]:
    """Noise of a TiledSRHT over that of a dense sketch, measured and as its layout's model has it."""
    flat = matrices(kind, rows, columns)
    layout = Layout.of(rows, columns, d)
    samples = grams(lambda seed: gs.TiledSRHT(rows, columns, d, seed=seed), dict(enumerate(flat)), seeds)
    exact = flat @ flat.T
    mean_error = (samples.mean(0) - exact) / (samples.std(0) / seeds**0.5)
    assert float(mean_error.abs().max()) < -stats.norm.ppf(FALSE_ALARM / 32)
    dense = (1 + exact.square()) / d
    model = torch.tensor([[layout.variance(*(v.view(rows, columns) for v in (x, y))) for y in flat] for x in flat])
    measured = (samples - exact).square().mean(0)
    return float((measured / dense).mean().sqrt()), float((model / dense).mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "d"),
    a_third(
        [
            ("full", 128, 96, 256),  # four products a number
            ("rank-one", 128, 96, 256),
            ("two-directions", 128, 96, 256),
            ("rank-one", 64, 128, 1024),  # tiles of more entries than numbers
            ("two-directions", 64, 64, 2500),  # every pair, some numbers with two and some with one
            ("rank-one", 64, 100, 300),  # d no power of two
            ("full", 1, 1000, 256),  # a vector
        ],
        first=2,
    ),
)
def test_noise_of_tiled_srht_is_that_of_its_model(kind, rows, columns, d):
    """Within 5 %, and for d ≤ 16,384 at most √(1 + 1/4) of a dense sketch's, whatever the matrices are."""
    measured, model = noise(kind, rows, columns, d, seeds=150)
    assert measured == pytest.approx(model, rel=0.05)
    assert measured < 1.12 * 1.05


def test_sides_in_part_and_one_product_a_number_are_noisier_as_the_model_says(monkeypatch):
    """Two directions in all matrices, half of the coordinates: what a language model's embedding looks like."""
    whole, _ = noise("two-directions", 256, 128, 64, seeds=150)
    monkeypatch.setattr("gradsketch.sketches.layout._COORDINATES", 64)
    part, model = noise("two-directions", 256, 128, 64, seeds=150)
    assert part == pytest.approx(model, rel=0.07)
    assert part > 1.15 * whole
    monkeypatch.setattr("gradsketch.sketches.layout._COORDINATES", 256)
    monkeypatch.setattr("gradsketch.sketches.layout._products", lambda d: d)
    single, model = noise("two-directions", 256, 128, 64, seeds=150)
    assert single == pytest.approx(model, rel=0.07)
    assert single > 1.05 * whole


def rare(samples: Tensor, threshold: float) -> int:
    return int((samples.flatten() < threshold).sum())


def test_ffd_fails_where_affd_does_not():
    """[P], Theorem 3.1: on a constant block the squared norm is χ²₁ for every d, so 8 % of seeds lose the vector."""
    only = {"constant-block": inputs()["constant-block"]}
    lost = rare(grams(lambda seed: gs.FFD(N, D, seed=seed), only), 0.01)
    assert stats.binomtest(lost, SEEDS, stats.chi2(1).cdf(0.01)).pvalue > FALSE_ALARM
    assert rare(grams(lambda seed: gs.AFFD(N, D, seed=seed), only), 0.25) == 0


def test_afjl_loses_congruent_pairs_half_of_the_time():
    only = {"congruent-pair": inputs()["congruent-pair"]}
    for diagonal in ("signs", "gaussian"):
        lost = rare(grams(lambda seed: gs.AFJL(N, D, seed=seed, diagonal=diagonal), only), 1e-20)  # noqa: B023
        assert stats.binomtest(lost, SEEDS, 0.5).pvalue > FALSE_ALARM
    assert rare(grams(lambda seed: gs.AFFD(N, D, seed=seed), only), 0.25) == 0


def without_signs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Break every sketch: the diagonals drawn from streams with this name become the identity."""
    honest = Signs.multiply

    def multiply(self: Any, x: Tensor, start: int, out: Tensor) -> None:
        if name in self.stream.names:
            out.copy_(x)
        else:
            honest(self, x, start, out)

    monkeypatch.setattr(Signs, "multiply", multiply)


@pytest.mark.parametrize(
    ("kind", "name"),
    a_third(
        [
            # Not FFD's B, which acts last: the first two moments do not depend on it.
            *((kind, "B") for kind in KINDS if kind.startswith(("AFFD", "AFJL", "FJL"))),
            *((kind, "G") for kind in ("AFFD-global-signs", "AFFD-local-signs")),
            ("SJLT-1", "signs"),
            ("SJLT-4", "signs"),
        ],
        first=1,
    ),
)
def test_dropped_signs_do_not_pass(kind, name, monkeypatch):
    without_signs(monkeypatch, name)
    broken = grams(build(kind), inputs(), seeds=200)
    with pytest.raises(AssertionError, match="of"):
        check_kind(kind, broken)


@pytest.mark.parametrize(
    "kind", a_third(["Dense-gaussian", "Dense-rademacher", "AFFD-global-gaussian", "FFD", "FJL"], first=1)
)
def test_a_generator_without_signs_does_not_pass(kind, monkeypatch):
    for draw in ("normals", "signs"):
        honest = getattr(gs.Stream, draw)
        monkeypatch.setattr(gs.Stream, draw, lambda *args, honest=honest, **kw: honest(*args, **kw).abs())
    broken = grams(build(kind), inputs(), seeds=200)
    with pytest.raises(AssertionError, match="of"):
        check_kind(kind, broken)


def test_one_matrix_for_every_seed_does_not_pass():
    with pytest.raises(AssertionError, match="of"):
        check(grams(lambda _: gs.QK(N, D, factors=2), only := {"typical": inputs()["typical"]}, 200), only, qk_theory)
