"""Philox streams: known answers, addressability, independence, distribution."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from gradsketch.errors import InputError
from gradsketch.random import Stream, philox4x32
from unchecked import errors_of

PUBLISHED = [  # Random123, kat_vectors, philox4x32 10 rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

GOLDEN_WORDS = [-1312950910, 474204898, -928947991, 581565469]
GOLDEN_PERMUTATION = [4, 6, 2, 7, 3, 0, 1, 5]
GOLDEN_NORMALS = [-0.8621416604958461, 1.2243536682363196, -0.5718481312449234]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_known_answers(counter, key, words):
    out = torch.empty(1, 4, dtype=torch.int32)
    philox4x32((torch.tensor([counter[0]]), *counter[1:]), key, out)
    assert [int(word) & 0xFFFFFFFF for word in out[0]] == list(words)


def test_these_numbers_never_change():
    """Indexes built years ago depend on them."""
    s = Stream(7, "golden")
    assert s.words(0, 4).tolist() == GOLDEN_WORDS
    assert s.permutation(8).tolist() == GOLDEN_PERMUTATION
    assert s.normals(0, 3, dtype=torch.float64).tolist() == GOLDEN_NORMALS


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 2**40), count=st.integers(1, 200), skip=st.integers(0, 150))
def test_any_slice_equals_the_slice_of_the_whole(start, count, skip):
    s = Stream(3, "slices")
    for draw in (s.words, s.signs, s.normals, s.uniforms):
        assert torch.equal(draw(start + skip, count), draw(start, skip + count)[skip:])


def test_a_slice_across_the_32_bit_counter_boundary():
    s, start = Stream(3, "boundary"), 4 * 2**32 - 6
    assert torch.equal(s.words(start, 12)[6:], s.words(start + 6, 6))
    assert not torch.equal(s.words(start + 6, 6), s.words(0, 6))  # the counter does not wrap


def test_passes_do_not_show():
    s = Stream(3, "passes")
    assert torch.equal(s.words(0, 300_000)[262_000:], s.words(262_000, 38_000))


def test_dtype_changes_rounding_only():
    s = Stream(1, "dtype")
    exact = s.normals(0, 1000, dtype=torch.float64)
    assert torch.equal(s.normals(0, 1000), exact.float())
    assert torch.equal(s.normals(0, 1000, dtype=torch.bfloat16), exact.bfloat16())


def test_threads_do_not_show():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Stream(1, "threads").normals(0, 100_000)
        torch.set_num_threads(2)
        assert torch.equal(one, Stream(1, "threads").normals(0, 100_000))
    finally:
        torch.set_num_threads(before)


def test_permutation_is_one():
    p = Stream(0, "permutation").permutation(1000)
    assert torch.equal(p.sort().values, torch.arange(1000))
    assert not torch.equal(p, torch.arange(1000))


def test_names_are_not_confused():
    """Joining names must not make two lists of them alike."""
    lists = [("a", "b"), ("ab",), ("a", "", "b"), ("b", "a"), ("a",), ("a', 'b",)]
    draws = {tuple(Stream(0, *names).words(0, 8).tolist()) for names in lists}
    assert len(draws) == len(lists)
    assert torch.equal(Stream(0, "a").child("b").words(0, 8), Stream(0, "a", "b").words(0, 8))


def test_a_seed_is_an_integer():
    with pytest.raises(InputError, match="seed=True"):
        Stream(True)
    seeds = ["1.5", "'0'", "None"]
    for seed, error in zip(seeds, errors_of([f"gs.Stream({s})" for s in seeds]), strict=True):
        assert error.startswith(f"InputError: seed={seed}. Wanted: an integer.")


N = 1 << 20
# Each statistical test below fails by chance for one seed in 10^6 (two-sided); the seeds are fixed.
FALSE_ALARM = 1e-6
BOUND = float(-stats.norm.ppf(FALSE_ALARM / 2))


@pytest.mark.statistical
@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_streams_that_differ_in_one_bit_are_uncorrelated(bit):
    base = Stream(12345, "name").signs(0, N)
    for other in (Stream(12345 ^ (1 << bit), "name"), Stream(12345, chr(ord("n") ^ (1 << bit % 7)) + "ame")):
        assert abs(float(base @ other.signs(0, N))) / N**0.5 < BOUND


@pytest.mark.statistical
@pytest.mark.parametrize("lag", [1, 2, 32, 128])
def test_signs_are_fair_and_serially_uncorrelated(lag):
    signs = Stream(5, "fair").signs(0, N)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) / N**0.5 < BOUND
    assert abs(float(signs[lag:] @ signs[:-lag])) / (N - lag) ** 0.5 < BOUND


@pytest.mark.statistical
def test_normals_are_normal():
    z = Stream(5, "normal").normals(0, N, dtype=torch.float64)
    assert stats.kstest(z.numpy(), "norm").pvalue > FALSE_ALARM
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - mean) / (variance / N) ** 0.5 < BOUND
    assert 4.5 < float(z.abs().max()) < 6.3


@pytest.mark.statistical
def test_integers_and_uniforms_fill_their_range():
    counts = Stream(5, "integers").integers(0, N, 10).bincount(minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM
    assert stats.kstest(Stream(5, "uniform").uniforms(0, N).numpy(), "uniform").pvalue > FALSE_ALARM
