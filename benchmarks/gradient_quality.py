"""How well per-example gradient sketches keep inner products: noise·√d and Pearson r at every d, over several draws.

    python benchmarks/gradient_quality.py [--workload smollm2] [--quick]

Against exact inner products of all pairs of sequences. Each row gives the mean over the draws of the sketch and its
standard error, and the 95 % interval of the first draw by a bootstrap over sequences. A dense Gaussian projection has
noise·√d = 1. Writes results/gradient_quality.json (gradient_quality_smollm2.json).
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from gradient_workloads import WORKLOADS, Workload
from record import write

import gradsketch as gs
from gradsketch.evaluation.quality import sketch_quality
from gradsketch.gradients.gram import gradient_gram

SIZES = {"w1": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), "smollm2": (4096, 65536)}
SEEDS = {"w1": 3, "smollm2": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=SIZES, default="w1")
    parser.add_argument("--quick", action="store_true", help="fewer layers or sequences, two draws")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.workload](arguments.quick)
    seeds = 2 if arguments.quick else SEEDS[work.name]
    exact = gradient_gram(work.model, gs.CausalLM(), work.batches(len(work.ids))[0])
    rows = [measured(work, exact, d, seeds) for d in SIZES[work.name]]
    suffix = ("" if work.name == "w1" else f"_{work.name}") + ("_quick" if arguments.quick else "")
    results = {"sequences": list(work.ids.shape), "draws": seeds, "rows": rows}
    path = write(f"gradient_quality{suffix}", results)
    print(f"{'d':>7} {'noise·√d':>9} {'± s.e.':>7} {'r':>7} {'± s.e.':>7}")
    for row in rows:
        noise = f"{row['noise_sqrt_d']:>9.3f} {row['noise_standard_error']:>7.3f}"
        print(f"{row['d']:>7} {noise} {row['pearson']:>7.4f} {row['pearson_standard_error']:>7.4f}")
    print(f"written to {path}")


def measured(work: Workload, exact: torch.Tensor, d: int, seeds: int) -> dict[str, Any]:
    parameters = gs.Parameters(work.model)
    sketches = []
    for seed in range(seeds):
        sketcher = gs.GradientSketcher(work.model, gs.CausalLM(), gs.BlockSum(parameters, d, seed=seed))
        sketches.append(torch.cat([sketcher(batch).values for batch in work.batches(8)]))
    return draws(exact, sketches)


def draws(exact: torch.Tensor, sketches: list[torch.Tensor]) -> dict[str, Any]:
    """Return the quality over several draws of a sketch."""
    qualities = [sketch_quality(exact, part) for part in sketches]
    noises, pearsons = [q.noise for q in qualities], [q.pearson for q in qualities]
    return {
        "d": qualities[0].d,
        "noise_sqrt_d": statistics.mean(noises),
        "noise_standard_error": statistics.stdev(noises) / len(noises) ** 0.5,
        "pearson": statistics.mean(pearsons),
        "pearson_standard_error": statistics.stdev(pearsons) / len(pearsons) ** 0.5,
        "pearson_interval_first": qualities[0].pearson_interval,
    }


if __name__ == "__main__":
    main()
