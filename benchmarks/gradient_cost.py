"""Per-example gradient sketches against one plain forward and backward pass: throughput and peak memory.

    python benchmarks/gradient_cost.py [--workload smollm2 | gpt2-small | llama-1b] [--quick]

Every job runs at several batch sizes, interleaved, and counts at its best. "floor" runs forward and backward without
any weight gradient and without sketches. Writes results/gradient_cost.json (gradient_cost_smollm2.json);
benchmarks/gradient_quality.py measures how good the same sketches are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gradient_workloads import WORKLOADS, Workload
from record import interleaved_seconds, peak_bytes, write

import gradsketch as gs
from gradsketch.as_found import Trainability

SIZES = {"w1": (4096, 32768, 65536), "smollm2": (4096, 65536)}
BATCHES = {"w1": (4, 8, 16), "smollm2": (4, 8)}
ON_A_GPU = (4096, 32768, 65536), (4, 16)  # sizes and batches of the other workloads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="w1")
    parser.add_argument("--quick", action="store_true", help="fewer layers or sequences, one repeat")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.workload](arguments.quick)
    sizes, batches = SIZES.get(work.name, ON_A_GPU[0]), BATCHES.get(work.name, ON_A_GPU[1])
    parameters = gs.Parameters(work.model)
    sketchers = {d: gs.GradientSketcher(work.model, gs.CausalLM(), gs.BlockSum(parameters, d)) for d in sizes}
    jobs: dict[str, Callable[[], Any]] = {}
    for size in batches:
        parts = work.batches(size)
        jobs[f"reference/{size}"] = lambda parts=parts: work.plain(parts)
        jobs[f"floor/{size}"] = lambda parts=parts: floor(work, parts)
        for d, sketcher in sketchers.items():
            jobs[f"d={d}/{size}"] = lambda parts=parts, sketcher=sketcher: [sketcher(part) for part in parts]
    seconds = interleaved_seconds(jobs, repeats=1 if arguments.quick else 3)
    rows = [best(name, batches, seconds, jobs) for name in ("reference", "floor", *(f"d={d}" for d in sizes))]
    for row in rows:
        row["throughput"] = rows[0]["seconds"] / row["seconds"]
        row["peak_ratio"] = row["peak_bytes"] / max(1, rows[0]["peak_bytes_at"][row["batch"]])
    suffix = ("" if work.name == "w1" else f"_{work.name}") + ("_quick" if arguments.quick else "")
    sequences = list(work.ids.shape)
    path = write(f"gradient_cost{suffix}", {"sequences": sequences, "seconds": seconds, "rows": rows})
    print(f"{'':>10} {'batch':>6} {'sequences/s':>12} {'throughput':>11} {'peak MB':>8} {'ratio':>6}")
    for row in rows:
        rate = sequences[0] / row["seconds"]
        figures = (
            f"{rate:>12.2f} {row['throughput']:>11.2f} {row['peak_bytes'] / 2**20:>8.0f} {row['peak_ratio']:>6.2f}"
        )
        print(f"{row['name']:>10} {row['batch']:>6} {figures}")
    print(f"written to {path}")


def best(name: str, batches: tuple[int, ...], seconds: dict[str, Any], jobs: dict[str, Any]) -> dict[str, Any]:
    """Return a job's median seconds at its best batch size, and its peak memory at every one."""
    batch = min(batches, key=lambda size: seconds[f"{name}/{size}"]["median"])
    peaks = {size: peak_bytes(jobs[f"{name}/{size}"]) or 0 for size in batches}
    return {
        "name": name,
        "batch": batch,
        "seconds": seconds[f"{name}/{batch}"]["median"],
        "peak_bytes": peaks[batch],
        "peak_bytes_at": peaks,
    }


def floor(work: Workload, batches: list[dict[str, Any]]) -> None:
    """Run forward and backward without a single weight gradient."""
    handle = work.model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
    with Trainability(work.model) as found:
        found.only([])
        for batch in batches:
            work.task.losses(work.model, batch).sum().backward()
    handle.remove()


if __name__ == "__main__":
    main()
