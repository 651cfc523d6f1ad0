"""The battery every orthonormal transform must pass, and each one's values by a different route."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

import gradsketch as gs
from gradsketch.transforms import Fourier, Haar, Hadamard, LocalHadamard
from gradsketch.transforms.haar import PermutedHadamard

CASES = {
    "Hadamard": Hadamard,
    "LocalHadamard": lambda n: LocalHadamard(n, min(n, 16)),
    "Haar": lambda n: Haar(n, gs.Stream(0, "haar")),
    "PermutedHadamard": lambda n: PermutedHadamard(n, gs.Stream(0, "permuted")),
    "Fourier": Fourier,
}
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
LONG = 1 << 19  # more than one cache-sized piece: leading factors act on panels of columns


def vectors(b, n, dtype=torch.float64):
    return torch.randn(b, n, dtype=dtype, generator=torch.Generator().manual_seed(n))


@cases
@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_orthonormal(make, n):
    matrix = make(n).dense()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(make(n).T.dense(), matrix.T, rtol=0, atol=1e-12)


@cases
def test_isometry_and_adjoint_beyond_one_piece(make):
    transform, x, y = make(LONG), vectors(1, LONG), vectors(1, LONG).flip(-1)
    assert float(transform(x).norm() / x.norm()) == pytest.approx(1, abs=1e-12)
    assert float(transform(x)[0] @ y[0]) == pytest.approx(float(x[0] @ transform.T(y)[0]), abs=1e-8)
    torch.testing.assert_close(transform.T(transform(x)), x, rtol=0, atol=1e-11)


@cases
@pytest.mark.parametrize("n", [64, LONG])
def test_in_place_is_out_of_place(make, n):
    for dtype in (torch.float32, torch.float64):
        x = vectors(2, n, dtype)
        for adjoint in (False, True):
            expected = make(n).T(x) if adjoint else make(n)(x)
            y = x.clone()
            assert make(n).apply_(y, adjoint=adjoint) is y
            assert torch.equal(y, expected)


@cases
@pytest.mark.parametrize("n", [2, 64, 1024, LONG])
def test_bits_do_not_depend_on_batch_or_threads(make, n):
    x, before = vectors(3, n, torch.float32), torch.get_num_threads()
    whole = make(n)(x)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(make(n)(x[:1]), whole[:1])
            assert torch.equal(make(n)(x[1:]), whole[1:])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@cases
def test_narrow_input_is_widened(make):
    x = vectors(2, 64, torch.bfloat16)
    assert torch.equal(make(64)(x), make(64)(x.float()))


@cases
def test_errors_say_what_to_do(make):
    transform = make(64)
    with pytest.raises(gs.InputError, match="vectors of length 64"):
        transform(torch.zeros(2, 63))
    for bad in (torch.zeros(64, 2).T, torch.zeros(2, 63), torch.zeros(64, dtype=torch.bfloat16)):
        with pytest.raises(gs.InputError, match="a contiguous float32 or float64 tensor"):
            transform.apply_(bad)
    for empty in (transform, transform.apply_):
        with pytest.raises(gs.InputError, match=r"an empty batch.* Wanted: at least one vector"):
            empty(torch.zeros(0, 64))
    with pytest.raises(gs.InputError, match="outside any graph"):
        transform.apply_(torch.zeros(64, requires_grad=True))
    with pytest.raises(gs.NonFiniteError, match="position 3"):
        transform(torch.where(torch.arange(64) == 3, torch.nan, 0.0))


def test_lengths_that_fit_are_named():
    with pytest.raises(gs.InputError, match="Type n=32 or n=64"):
        Hadamard(48)
    with pytest.raises(gs.InputError, match="a multiple of the length"):
        LocalHadamard(48, 32)
    with pytest.raises(gs.InputError, match="Type length=2 or length=4"):
        LocalHadamard(48, 3)
    with pytest.raises(gs.InputError, match="type n=8"):
        Fourier(7)


@pytest.mark.parametrize("bits", range(11))
def test_hadamard_is_sylvesters(bits):
    n = 1 << bits
    expected = torch.from_numpy(hadamard(n)).double() / n**0.5
    torch.testing.assert_close(Hadamard(n).dense(), expected, rtol=0, atol=1e-13)
    if n >= 16:
        local = torch.kron(torch.eye(n // 16, dtype=torch.float64), torch.from_numpy(hadamard(16)).double() / 4)
        torch.testing.assert_close(LocalHadamard(n, 16).dense(), local, rtol=0, atol=1e-13)


def test_hadamard_of_a_long_vector():
    x = vectors(1, 1 << 20)
    h = torch.from_numpy(hadamard(1024)).double() / 32
    expected = (h @ x.view(1024, 1024) @ h).view(1, -1)
    torch.testing.assert_close(Hadamard(1 << 20)(x), expected, rtol=0, atol=1e-12)
    assert float((Hadamard(1 << 20)(x.float()) - expected).norm() / expected.norm()) < 1e-6


def test_fourier_is_the_complex_transform_of_pairs():
    x = vectors(1, 48)[0]
    expected = np.fft.fft(x[0::2].numpy() + 1j * x[1::2].numpy(), norm="ortho")
    got = Fourier(48)(x)
    np.testing.assert_allclose(got[0::2].numpy() + 1j * got[1::2].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("n", [LONG, 2 * LONG])
def test_fourier_of_a_long_vector(n):
    x = vectors(1, n)[0]
    for adjoint, transform in ((False, torch.fft.fft), (True, torch.fft.ifft)):
        expected = torch.view_as_real(transform(torch.view_as_complex(x.view(-1, 2)), norm="ortho")).flatten()
        torch.testing.assert_close(Fourier(n).apply_(x.clone(), adjoint=adjoint), expected, rtol=0, atol=1e-13)
        narrow = Fourier(n).apply_(x.float(), adjoint=adjoint)
        assert float((narrow - expected).norm() / expected.norm()) < 1e-6


PEAK = """
import torch
from gradsketch.evaluation.cost import peak_bytes
from gradsketch.transforms import {name}
transform, x = {name}(1 << 23), torch.ones(1 << 23)
peaks = [peak_bytes(lambda: transform(x)) for _ in range(2)]
print(peaks[-1] / x.nbytes if peaks[-1] is not None else "unmeasured")
"""


@pytest.mark.parametrize("name", ["Hadamard", "Fourier"])
def test_a_long_vector_needs_half_its_memory_besides_input_and_result(name):
    # In a process whose freed blocks go back at once: a test run's heap is full of holes too small for a part.
    # The second call: the first reads the library from the disk.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK.format(name=name)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if answer == "unmeasured":
        pytest.skip("peak memory is measured on Linux and GPUs")
    assert float(answer) < 1.5


def test_haar_factors_have_the_moments_of_uniform_orthogonal_matrices():
    """E Q = 0 and E Q⁴ = 3/(n(n+2)) entrywise: signs of the QR decomposition must not be left to the library."""
    draws = torch.stack([Haar(4, gs.Stream(seed, "q")).dense() for seed in range(600)])
    assert float(draws.mean(0).abs().max()) < 5 * (1 / 4 / 600) ** 0.5
    assert float(draws.pow(4).mean()) == pytest.approx(3 / 24, rel=0.06)


def test_gradients_pass_through():
    x = vectors(1, 16).requires_grad_()
    assert torch.autograd.gradcheck(Fourier(16), (x,))
    assert torch.autograd.gradcheck(Hadamard(16), (x,))


BITS = """
import torch
import gradsketch as gs
from gradsketch.transforms import Hadamard, Haar

def under(threads, job):
    torch.set_num_threads(threads)
    return job()

for make in (Hadamard, lambda n: Haar(n, gs.Stream(0, "haar"))):
    for n in (2, 64, 1024, 1 << 15):
        x = torch.randn(7, n)
        whole = under(1, lambda: make(n)(x))
        for threads in (1, 2, 3):
            parts = [under(threads, lambda: make(n)(part)) for part in x.split(3)]
            assert torch.equal(torch.cat(parts), whole), (n, threads)
phi, w = gs.AFFD(300_001, 4096, form="paper"), torch.randn(1, 4096)
assert torch.equal(under(1, lambda: phi.lift(w)), under(2, lambda: phi.lift(w)))
phi, x = gs.Dense(5000, 70), torch.randn(3, 5000)
assert torch.equal(under(1, lambda: phi(x)), torch.cat([under(3, lambda: phi(row)) for row in x.split(1)]))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_bits_are_kept_where_the_library_rounds_remainders_otherwise(instructions):
    """Intel's does, by its instructions; on other processors the setting says nothing."""
    environment = os.environ | {"MKL_ENABLE_INSTRUCTIONS": instructions}
    done = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
