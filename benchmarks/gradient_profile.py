"""Where the time of per-example sketches goes: by kind of parameter, next to a pass without any of it.

    python benchmarks/gradient_profile.py
    python benchmarks/gradient_profile.py --build LABEL      (the parts of a whole build: build_overhead.py)

W1 in batches of 8. Writes results/gradient_profile.json: seconds a part, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from build_overhead import profile_build
from gradient_cost import floor
from gradient_workloads import Workload, w1
from record import interleaved_seconds, write

import gradsketch as gs

SIZES = (4096, 32768)
REPEATS = 5
VECTORS = "add_gradient", "add_vectors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", metavar="LABEL", help="profile a build, and keep its figures under this label")
    arguments = parser.parse_args()
    if arguments.build:
        profile_build(arguments.build)
    else:
        profile_kinds()


def profile_kinds() -> None:
    """Measure the sketch of each kind of parameter."""
    work = w1()
    batches = work.batches(8)
    jobs = {"plain": lambda: work.plain(batches), "without weight gradients": lambda: floor(work, batches)}
    seconds = {name: s["median"] for name, s in interleaved_seconds(jobs, 3).items()}
    rows = {d: parts(work, d) for d in SIZES}
    path = write("gradient_profile", {"seconds": seconds, "parts": rows})
    for name, value in seconds.items():
        print(f"{name:>34} {value:6.2f} s")
    for d, row in rows.items():
        print(f"d = {d}: " + ", ".join(f"{name} {value:.2f} s" for name, value in row.items()))
    print(f"written to {path}")


def parts(work: Workload, d: int) -> dict[str, float]:
    """Return the seconds spent in the sketch of each kind of parameter, and in all of it."""
    phi = gs.BlockSum(gs.Parameters(work.model), d)
    spent: dict[str, float] = defaultdict(float)
    for method in ("add_outer", "add_rows", *VECTORS):
        setattr(phi, method, timed(getattr(phi, method), method, spent))
    sketcher = gs.GradientSketcher(work.model, gs.CausalLM(), phi)
    runs = []
    for _ in range(REPEATS + 1):
        spent.clear()
        start = time.perf_counter()
        for batch in work.batches(8):
            sketcher(batch)
        runs.append(dict(spent) | {"all": time.perf_counter() - start})
    return {name: statistics.median(run[name] for run in runs[1:]) for name in sorted(runs[0])}


def timed(method: Callable[..., None], kind: str, spent: dict[str, float]) -> Callable[..., None]:
    """Return the method, counting its time as that of the vocabulary, linear layers, embeddings or vectors."""
    labels = {"add_outer": "linear layers", "add_rows": "embeddings", **dict.fromkeys(VECTORS, "biases and norms")}

    def run(out: Any, name: Any, *factors: Any) -> None:
        start = time.perf_counter()
        method(out, name, *factors)
        vocabulary = kind == "add_outer" and ".wte." in name
        spent["tied head" if vocabulary else labels[kind]] += time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
