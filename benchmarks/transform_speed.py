"""The measurements behind the choices in ``random`` and ``transforms``: CPU seconds of one thread, best of several.

* random: signs and normals for 2^26 numbers against ``torch.randn`` of the same length (aim: signs in at most 4 times).
* factors: Hadamard matrices of 8 to 64 rows multiplied to a vector, in seconds a bit of the transform's length.
* pieces: flipping the signs of a vector in pieces of 2^14 … 2^22 numbers.
* lengths: the Walsh–Hadamard transform of blocks of 2^8 … n, in seconds; "butterflies 2^12" the same by additions and
  subtractions of halves in cache-sized pieces, log2(4096) passes instead of three products.
* fourier: the unitary transform of pairs in place, against one call of ``torch.fft.fft`` and ``torch.fft.rfft``: time
  and peak memory beyond the input.

Run: python benchmarks/transform_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from record import peak_bytes, write
from torch import Tensor

import gradsketch as gs
from gradsketch.transforms import Fourier, LocalHadamard
from gradsketch.transforms.diagonal import Signs
from gradsketch.transforms.hadamard import hadamard_matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2^20 numbers instead of 2^24")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    x = torch.randn(1 << (20 if quick else 24))
    room = torch.empty_like(x)
    results = {
        "n": len(x),
        "clone_seconds": cpu_seconds(x.clone),
        "copy_seconds": cpu_seconds(lambda: room.copy_(x)),
        "random": random(len(x) if quick else 1 << 26),
        "factors": {str(b): factor_seconds_a_bit(x, b) for b in (8, 16, 32, 64)},
        "pieces": {f"2^{k}": signs_seconds(x, 1 << k) for k in range(14, 20 if quick else 25, 2)},
        "lengths": {f"2^{k}": hadamard_seconds(x, 1 << k) for k in (8, 10, 12, 16, len(x).bit_length() - 1)}
        | {"butterflies 2^12": butterfly_seconds(x, 1 << 12)},
        "fourier": fourier(x),
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    print(write("transform_speed" + "_quick" * quick, results))


def cpu_seconds(job: Callable[[], Any], repeats: int = 5) -> float:
    job()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        job()
        seconds.append(time.process_time() - start)
    return min(seconds)


def random(n: int) -> dict[str, float]:
    """Return ratios to ``torch.randn``."""
    stream, randn = gs.Stream(0, "benchmark"), cpu_seconds(lambda: torch.randn(n), 3)
    jobs = {"packed signs": lambda: stream.words(0, n // 32), "signs": lambda: stream.signs(0, n)}
    jobs["normals"] = lambda: stream.normals(0, n)
    return {name: cpu_seconds(job, 3) / randn for name, job in jobs.items()}


def factor_seconds_a_bit(x: Tensor, width: int) -> float:
    matrix = hadamard_matrix(width, x.dtype, x.device)
    out = torch.empty(1 << 18)

    def job() -> None:
        for piece in x.split(1 << 18):
            torch.mm(piece.view(-1, width), matrix, out=out.view(-1, width))

    return cpu_seconds(job) / (width.bit_length() - 1)


def signs_seconds(x: Tensor, length: int) -> float:
    signs, out = Signs(gs.Stream(0, "benchmark"), len(x)), torch.empty(1, length)

    def job() -> None:
        for start in range(0, len(x), length):
            signs.multiply(x[None, start : start + length], start, out)

    return cpu_seconds(job)


def hadamard_seconds(x: Tensor, length: int) -> float:
    y, transform = x.clone(), LocalHadamard(len(x), length)
    return cpu_seconds(lambda: transform.apply_(y))


def butterfly_seconds(x: Tensor, length: int) -> float:
    y, buffers = x.clone(), [torch.empty(1 << 18) for _ in range(2)]

    def job() -> None:
        for piece in y.split(1 << 18):
            source, half = piece, 1
            while half < length:
                target = buffers[half.bit_length() % 2]
                (left, right), (above, below) = source.view(-1, 2, half).unbind(1), target.view(-1, 2, half).unbind(1)
                torch.add(left, right, out=above)
                torch.sub(left, right, out=below)
                source, half = target, 2 * half
            torch.mul(source, length**-0.5, out=piece)

    job()
    torch.testing.assert_close(y, LocalHadamard(len(x), length)(x), rtol=0, atol=1e-4)
    return cpu_seconds(job)


def fourier(x: Tensor) -> dict[str, float | None]:
    y, transform = x.clone(), Fourier(len(x))
    pairs = torch.view_as_complex(y.view(-1, 2))
    jobs: dict[str, Callable[[], Any]] = {
        "pairs in place": lambda: transform.apply_(y),
        "pairs torch.fft.fft": lambda: torch.fft.fft(pairs, norm="ortho", out=pairs),
        "rfft": lambda: torch.fft.rfft(x),
    }
    rows: dict[str, float | None] = {f"{name} seconds": cpu_seconds(job, 3) for name, job in jobs.items()}
    for name, job in jobs.items():
        peak = peak_bytes(job)
        rows[f"{name} peak vectors"] = None if peak is None else peak / 4 / len(x)
    return rows


if __name__ == "__main__":
    main()
