"""Time and memory of every sketch beside two copies of the same vector in the same run.

* kinds: each kind at n = 2^18 … 2^27 and d = 2^12 … 2^22, one float32 vector: the first call of a fresh sketch (it
  draws its random signs), later calls, the lift, and the peak memory of sketch and lift beyond the input, in vectors.
  ``clone`` is ``x.clone()``, which on the CPU mostly waits for the system to hand out fresh memory; ``copy`` writes
  into memory that is there already, the fastest any reader of the vector could be. Copies of vectors that fit in a
  cache are many times cheaper a number, so ratios at small n say little.
* targets: what the project set out to reach on two CPU cores at n = 2^24, and what was reached.
* dense: a dense projection drawn on the fly against the structured kinds, the form of Table 11 of Schioppa
  (arXiv 2402.03994).
* peers: the CPU projectors of scikit-learn and of traker on a size they can hold. traker is measured where it is
  installed (pip install --no-deps traker), scikit-learn likewise.

Run: python benchmarks/sketch_speed.py [--quick]   (six minutes, 4 GB)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from record import interleaved_seconds, peak_bytes, write
from torch import Tensor

import gradsketch as gs

FAST: dict[str, dict[str, Any]] = {"AFFD": {}, "AFFD global": {"form": "global"}, "AFJL": {}, "QK": {}}
SLOW: dict[str, dict[str, Any]] = {
    "AFFD gaussian": {"diagonal": "gaussian"},
    "AFFD paper": {"form": "paper"},
    "AFFD paper fft": {"transform": "fft"},
    "AFFD paper haar": {"transform": "haar"},
    "AFJL paper": {"form": "paper"},
    "SJLT": {},
    "FJL": {},
    "FFD": {},
}
SIZES = {
    18: (12, 16),
    20: (12, 16),
    22: (12, 16, 20),
    24: (12, 14, 16, 18, 20, 22),
    26: (12, 20),
    27: (12, 16, 20, 22),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="n ≤ 2^20, seconds instead of minutes")
    quick = parser.parse_args().quick
    results: dict[str, Any] = {"kinds": []}
    for name, log_n, log_d in combinations(quick):
        results["kinds"].append(measure(name, log_n, log_d, repeats=3 if quick or log_n > 25 or name in SLOW else 7))
        print(row_text(results["kinds"][-1]), flush=True)
    if not quick:
        results["targets"] = targets(results["kinds"])
        print(results["targets"])
    results["dense"] = dense_on_the_fly(16 if quick else 20, range(6, 9 if quick else 11, 2))
    results["peers"] = peers(16 if quick else 20, 256)
    print(write("sketch_speed" + "_quick" * quick, results))


def combinations(quick: bool) -> Iterator[tuple[str, int, int]]:
    """Yield kind, log2 n, log2 d; every d at n = 2^24, the slow kinds where they say something."""
    sizes = {18: (12, 16), 20: (12, 16)} if quick else SIZES
    for log_n, log_ds in sizes.items():
        for log_d in log_ds:
            yield from ((name, log_n, log_d) for name in FAST if log_n < 26 or name != "AFFD global")
            if log_n in (18, 24) and log_d in (12, 16):
                yield from ((name, log_n, log_d) for name in SLOW)
    if not quick:
        yield "FJL", 24, 18
        yield "AFFD global", 27, 20


def sketch(name: str, n: int, d: int) -> gs.Sketch:
    built: gs.Sketch = getattr(gs, name.split()[0])(n, d, **{**FAST, **SLOW}[name])
    return built


def measure(name: str, log_n: int, log_d: int, *, repeats: int) -> dict[str, Any]:
    n, d = 1 << log_n, 1 << log_d
    x, w, room = (torch.randn(length, device=DEVICE) for length in (n, d, n))
    phi = sketch(name, n, d)
    start = time.perf_counter()
    float(phi(x)[0])  # waits for the device
    first = time.perf_counter() - start
    jobs = {"clone": x.clone, "copy": lambda: room.copy_(x), "sketch": lambda: phi(x), "lift": lambda: phi.lift(w)}
    seconds = interleaved_seconds(jobs, repeats)
    fresh = sketch(name, n, d)
    return {
        "kind": name,
        "log2_n": log_n,
        "log2_d": log_d,
        "first_call_seconds": first,
        "seconds": seconds,
        "ratio_to_clone": {job: ratio(seconds, job, "clone") for job in ("sketch", "lift")},
        "ratio_to_copy": {job: ratio(seconds, job, "copy") for job in ("sketch", "lift")},
        "sketch_peak_vectors": vectors(lambda: fresh(x), n),
        "lift_peak_vectors": vectors(lambda: fresh.lift(w), n),
    }


def ratio(seconds: dict[str, dict[str, float]], job: str, reference: str) -> float:
    return seconds[job]["median"] / seconds[reference]["median"]


def vectors(job: Callable[[], Any], n: int) -> float | None:
    """Return the peak memory of a job in vectors of n float32 numbers."""
    peak = peak_bytes(job)
    return None if peak is None else peak / 4 / n


def row_text(row: dict[str, Any]) -> str:
    peaks = [row[f"{job}_peak_vectors"] for job in ("sketch", "lift")]
    sizes = f"n = 2^{row['log2_n']}  d = 2^{row['log2_d']}"
    times = "  ".join(f"{job} {1e3 * s['median']:.1f}" for job, s in row["seconds"].items())
    peak = "" if None in peaks else f"  peak {peaks[0]:.2f} / {peaks[1]:.2f} vectors"
    return f"{row['kind']:>15}  {sizes}  ms: first {1e3 * row['first_call_seconds']:.1f}  {times}{peak}"


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the rows at n = 2^24 with what was set out to be reached, at the worst of d = 2^12 … 2^20."""
    found = {}
    for name, target in (("AFFD", 5.0), ("AFJL", 2.5), ("QK", 8.0)):
        mine = [r for r in rows if r["kind"] == name and r["log2_n"] == 24 and r["log2_d"] <= 20]
        medians = [r["seconds"]["sketch"]["median"] for r in mine]
        peaks = [r["sketch_peak_vectors"] for r in mine if r["sketch_peak_vectors"] is not None]
        found[name] = {
            "worst_ratio_to_clone": max(r["ratio_to_clone"]["sketch"] for r in mine),
            "target_ratio_to_clone": target,
            "worst_ratio_to_copy": max(r["ratio_to_copy"]["sketch"] for r in mine),
            "slowest_over_fastest_d": max(medians) / min(medians),
            "target_slowest_over_fastest_d": 1.3,
            "peak_vectors": max(peaks, default=None),
            "target_peak_vectors": 1.2 if name == "AFFD" else None,
        }
    return found


def dense_on_the_fly(log_n: int, log_ds: range) -> list[dict[str, Any]]:
    """Time Dense, which draws n·d random numbers a call, against the structured kinds, one vector."""
    n = 1 << log_n
    x = torch.randn(n, device=DEVICE)
    rows = []
    for log_d in log_ds:
        maps: dict[str, gs.Sketch] = {name: sketch(name, n, 1 << log_d) for name in ("AFFD", "AFJL", "QK")}
        for distribution in ("gaussian", "rademacher"):
            maps[f"Dense {distribution}"] = gs.Dense(n, 1 << log_d, distribution=distribution)  # type: ignore[arg-type]
        seconds = interleaved_seconds({name: lambda phi=phi: phi(x) for name, phi in maps.items()}, repeats=1)
        rows.append({"log2_n": log_n, "log2_d": log_d, "seconds": {k: s["best"] for k, s in seconds.items()}})
        print(
            f"n = 2^{log_n}, d = 2^{log_d}:",
            {k: f"{1e3 * s:.1f} ms" for k, s in rows[-1]["seconds"].items()},
            flush=True,
        )
    return rows


def peers(log_n: int, d: int) -> dict[str, Any]:
    """Time the projectors of other packages on one vector, beside ours, on the CPU."""
    n = 1 << log_n
    x = torch.randn(1, n)
    ours: list[gs.Sketch] = [gs.AFFD(n, d), gs.SJLT(n, d), gs.Dense(n, d)]
    jobs: dict[str, Callable[[], Any]] = {f"gradsketch {type(p).__name__}": lambda p=p: p(x) for p in ours}
    absent = [package for package in ("sklearn", "trak") if find_spec(package) is None]
    if "sklearn" not in absent:
        jobs |= sklearn_jobs(x, d)
    if "trak" not in absent:
        jobs["traker BasicProjector"] = traker_job(x, d)
    seconds = {name: s["best"] for name, s in interleaved_seconds(jobs, repeats=2).items()}
    print(f"n = 2^{log_n}, d = {d}:", {name: f"{1e3 * s:.1f} ms" for name, s in seconds.items()}, "absent:", absent)
    return {"log2_n": log_n, "d": d, "seconds": seconds, "absent": absent}


def sklearn_jobs(x: Tensor, d: int) -> dict[str, Callable[[], Any]]:
    """Return jobs that apply matrices scikit-learn has already drawn and holds (8·n·d bytes for the dense one)."""
    from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

    array = x.double().numpy()
    projectors = {
        "Gaussian": GaussianRandomProjection(d, random_state=0),
        "sparse": SparseRandomProjection(d, random_state=0),
    }
    fitted = {name: projector.fit(array) for name, projector in projectors.items()}
    return {f"scikit-learn {name}": lambda p=p: p.transform(array) for name, p in fitted.items()}


def traker_job(x: Tensor, d: int) -> Callable[[], Any]:
    """Return a job that lets traker's CPU projector draw its matrix again, as it does for every batch."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(x.shape[1], d, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu"))
    return lambda: projector.project(x, model_id=0)


if __name__ == "__main__":
    main()
