"""What is measured on a GPU. A section hands over rows as it has them, so that one that is stopped keeps the others."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradsketch as gs
from benchmarks.gradient_workloads import WORKLOADS
from benchmarks.record import peak_bytes
from gradsketch.attribution.scan import Probe, top
from gradsketch.kernels import switched_off
from gradsketch.store import Manifest, Rows, Store, default_shard_rows

__all__ = ["SECTIONS", "Keep"]

Keep = Callable[[dict[str, Any]], None]
ROOT = Path(__file__).parents[2]
D = 4096
BATCH = {"w1": 8, "gpt2-small": 16, "llama-1b": 4}


def machine(quick: bool, keep: Keep) -> None:
    """What it runs on."""
    found = {name: _version(name) for name in ("torch", "triton", "transformers", "numpy")}
    row: dict[str, Any] = {
        "python": sys.version.split()[0],
        **found,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        row |= {"gpu": about.name, "multiprocessors": about.multi_processor_count, "memory": about.total_memory}
        row |= {"capability": list(torch.cuda.get_device_capability(0))}
    keep(row)


def tests(quick: bool, keep: Keep) -> None:
    """``pytest -m gpu``: the same numbers as on the CPU."""
    if find_spec("pytest") is None:
        return keep({"outcome": "pytest is not installed"})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    return keep({"exit": done.returncode, "outcome": lines[-1] if lines else "", "last lines": lines[-30:]})


def kernels(quick: bool, keep: Keep) -> None:
    """Sketches of one long vector, by kernels and by torch, beside a copy of it on the device in the same process."""
    n = _length(quick)
    x = torch.ones(n, device=_device())
    copied = torch.empty_like(x)
    rate = 8 * n / seconds(lambda: copied.copy_(x))["best"]
    del copied
    keep({"what": "copy", "n": n, "bytes_a_second": rate})
    for kind, dtype, d in _sketches(n):
        with told(keep, {"what": kind.__name__, "n": n, "d": d, "dtype": str(dtype)[6:]}) as row:
            row |= _applied(kind(n, d), x.to(dtype), rate)
    for kind in (gs.AFFD, gs.AFJL):
        with told(keep, {"what": f"{kind.__name__} lift", "n": n, "d": min(n, D), "dtype": "float32"}) as row:
            row |= _lifted(kind(n, min(n, D)), rate)


def _sketches(n: int) -> Iterator[tuple[type[gs.Sketch], torch.dtype, int]]:
    for dtype in (torch.float32, torch.bfloat16):
        for d in (1 << 12, 1 << 16, 1 << 20):
            if d <= n:
                yield gs.AFFD, dtype, d
        yield gs.AFJL, dtype, min(n, D)
    yield gs.QK, torch.float32, min(n, D)


def _applied(phi: gs.Sketch, x: Tensor, rate: float) -> dict[str, Any]:
    """Time a sketch; the least that must be moved is one read of the vector."""
    row = _both_ways(lambda: phi(x), x.numel() * x.element_size(), rate)
    kernel = getattr(getattr(phi, "_form", None), "_kernel", None)
    row["kernel"] = bool(kernel and kernel.can_fold(x[None]))
    if row["kernel"]:  # without the outer transform and the check for finite numbers
        alone = seconds(lambda: kernel.fold(x[None], 1 << (phi.d - 1).bit_length()))["best"]
        row |= {"fold_s": alone, "fold_share_of_copy": x.numel() * x.element_size() / alone / rate}
    return row


def _lifted(phi: gs.Sketch, rate: float) -> dict[str, Any]:
    w = torch.ones(phi.d, device=_device())
    return _both_ways(lambda: phi.lift(w), 4 * phi.n, rate)


def _both_ways(job: Callable[[], Any], moved: int, rate: float) -> dict[str, Any]:
    taken = seconds(job)["best"]
    with switched_off():
        plain = seconds(job)["best"]
    return {"seconds": taken, "torch_s": plain, "bytes_a_second": moved / taken, "share_of_copy": moved / taken / rate}


def model(name: str) -> Callable[[bool, Keep], None]:
    """Return a section: sketches of a model's gradients beside plain forward and backward passes."""

    def section(quick: bool, keep: Keep) -> None:
        work = WORKLOADS[name](quick)
        batches = work.batches(BATCH[name])
        tokens, parameters = work.ids.numel(), gs.Parameters(work.model)
        plain = seconds(lambda: work.plain(batches))["median"]
        about = {"parameters": parameters.n, "sequences": list(work.ids.shape), "batch": BATCH[name]}
        peak = peak_bytes(lambda: work.plain(batches))
        keep(
            about | {"what": "forward and backward", "seconds": plain, "tokens_a_second": tokens / plain, "peak": peak}
        )
        for d in (D,) if quick else (D, 1 << 16):
            with told(keep, {"what": "sketches", "d": d}) as row:
                sketcher = gs.GradientSketcher(work.model, work.task, gs.BlockSum(parameters, d))
                job = lambda sketcher=sketcher: [sketcher(batch) for batch in batches]  # noqa: E731
                taken = seconds(job)["median"]
                row |= {"seconds": taken, "tokens_a_second": tokens / taken, "throughput": plain / taken}
                row |= {"peak": peak_bytes(job)}

    return section


def curvature(quick: bool, keep: Keep) -> None:
    """Hessian and Gauss–Newton products of W1 in float32, in gradients."""
    work = WORKLOADS["w1"](quick)
    batch = work.batches(BATCH["w1"])[0]
    plain = seconds(lambda: work.plain([batch]))["median"]
    keep({"what": "forward and backward", "seconds": plain})
    for kind in (gs.hessian, gs.gauss_newton):
        with told(keep, {"what": kind.__name__}) as row:
            operator = kind(work.model, work.task, batch)
            v = torch.ones(operator.n, device=_device())
            taken = seconds(lambda operator=operator, v=v: operator(v))["median"]
            row |= {"seconds": taken, "gradients": taken / plain}


def query(quick: bool, keep: Keep) -> None:
    """Eight questions at once to rows of an index that is in the page cache."""
    rows, d, questions = (500, 256, 8) if quick else (20_000, D, 8)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(
            Path(folder), Manifest(d=d, rows=rows, shard_rows=default_shard_rows(rows, d, "float16"), dtype="float16")
        )
        for start, count in store.missing():
            sketches = gs.Stream(start, "benchmark").normals(0, count * d).view(count, d)
            store.write(start, Rows([str(i) for i in range(start, start + count)], sketches, torch.zeros(count), {}))
        for device in dict.fromkeys(("cpu", _device())):
            with told(keep, {"what": "query", "device": device, "rows": rows, "d": d, "questions": questions}) as row:
                directions = gs.Stream(1, "questions").normals(0, questions * d).view(questions, d).to(device)
                probe = Probe(store, directions)
                taken = seconds(lambda probe=probe: top([probe], 10))["median"]
                row |= {"seconds": taken, "bytes_a_second": 2 * rows * d / taken}


SECTIONS: dict[str, tuple[Callable[[bool, Keep], None], int]] = {
    # By name: the section, and the seconds it may take.
    "machine": (machine, 40),
    "tests": (tests, 150),
    "kernels": (kernels, 120),
    "w1": (model("w1"), 60),
    "gpt2-small": (model("gpt2-small"), 90),
    "llama-1b": (model("llama-1b"), 120),
    "curvature": (curvature, 60),
    "query": (query, 60),
}


def seconds(job: Callable[[], Any], most: float = 3.0) -> dict[str, float]:
    """Return best and median of up to nine runs after one that does not count, stopping after ``most`` seconds."""
    job()
    taken: list[float] = []
    while len(taken) < 9 and sum(taken) < most:
        _synchronize()
        begin = time.perf_counter()
        job()
        _synchronize()
        taken.append(time.perf_counter() - begin)
    return {"best": min(taken), "median": statistics.median(taken)}


@contextmanager
def told(keep: Keep, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hand a row over with what went wrong in it: an error must not hide the rows after it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield row
        except Exception as failure:
            row["error"] = f"{type(failure).__name__}: {failure}"
    said = [str(w.message) for w in seen if issubclass(w.category, gs.GradsketchWarning)]
    keep(row | ({"warnings": said} if said else {}))


def _length(quick: bool) -> int:
    """Return a power of two: 2^27 numbers, or fewer where the GPU has little memory."""
    if quick:
        return 1 << 16
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 1 << 33
    return 1 << min(27, (free // 32).bit_length() - 1)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
