"""How well per-example gradient sketches keep inner products: noise·√d and Pearson r at every d, over several draws.

    python benchmarks/gradient_quality.py [--workload smollm2] [--quick]

Against exact inner products of all pairs of sequences. Each row gives the mean over the draws of the sketch and its
standard error, and the 95 % interval of the first draw by a bootstrap over sequences. A dense Gaussian projection has
noise·√d = 1. "layers" gives the noise of every matrix's inner products alone, over a dense sketch's, as the model in
``gradsketch.sketches.layout`` has it for the exact gradients of four sequences: the worst, and the median.
Writes results/gradient_quality.json (gradient_quality_smollm2.json, gradient_quality_minilm.json).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from gradient_workloads import WORKLOADS, Workload
from record import write

import gradsketch as gs
from gradsketch.evaluation.quality import sketch_quality
from gradsketch.gradients.gram import gradient_gram
from gradsketch.sketches.layout import Layout

ALL = tuple(512 << i for i in range(8))
SIZES = {"w1": ALL, "minilm": ALL, "smollm2": (512, 4096, 65536)}
SEEDS = {"w1": 3, "minilm": 3, "smollm2": 3}
SEQUENCES_A_LAYER = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=SIZES, default="w1")
    parser.add_argument("--quick", action="store_true", help="fewer layers or sequences, two draws")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.workload](arguments.quick)
    seeds = 2 if arguments.quick else SEEDS[work.name]
    exact = gradient_gram(work.model, work.task, work.batches(len(work.ids))[0])
    rows = [measured(work, exact, d, seeds) for d in SIZES[work.name]]
    suffix = ("" if work.name == "w1" else f"_{work.name}") + ("_quick" if arguments.quick else "")
    layers = [layer_noise(work, d) for d in SIZES[work.name]]
    results = {"sequences": list(work.ids.shape), "draws": seeds, "rows": rows, "layers": layers}
    path = write(f"gradient_quality{suffix}", results)
    print(f"{'d':>7} {'noise·√d':>9} {'± s.e.':>7} {'r':>7} {'± s.e.':>7}")
    for row in rows:
        noise = f"{row['noise_sqrt_d']:>9.3f} {row['noise_standard_error']:>7.3f}"
        print(f"{row['d']:>7} {noise} {row['pearson']:>7.4f} {row['pearson_standard_error']:>7.4f}")
    for row in layers:
        numbers = f"median {row['median']:.3f}, worst {row['worst']:.3f} ({row['of']})"
        print(f"{row['d']:>7} one layer's noise over dense: {numbers}")
    print(f"written to {path}")


def measured(work: Workload, exact: torch.Tensor, d: int, seeds: int) -> dict[str, Any]:
    parameters = gs.Parameters(work.model)
    sketches = []
    for seed in range(seeds):
        sketcher = gs.GradientSketcher(work.model, work.task, gs.BlockSum(parameters, d, seed=seed))
        sketches.append(torch.cat([sketcher(batch).values for batch in work.batches(8)]))
    return draws(exact, sketches)


def layer_noise(work: Workload, d: int) -> dict[str, Any]:
    """Return the predicted noise of single matrices' inner products, over a dense sketch's."""
    parameters = {name: p for name, p in work.model.named_parameters() if p.ndim > 1}
    found = {}
    for name, gradients in _gradients(work, parameters):
        pairs = [(x, y) for i, x in enumerate(gradients) for y in gradients[:i]]
        layout = Layout.of(*gradients[0].shape, d)
        dense = [float(x.square().sum() * y.square().sum() + (x * y).sum().square()) / d for x, y in pairs]
        noises = [layout.variance(x, y) / each for (x, y), each in zip(pairs, dense, strict=True) if each]
        if noises:
            found[name] = statistics.mean(noises) ** 0.5
    worst = max(found, key=found.__getitem__)
    return {"d": d, "median": statistics.median(found.values()), "worst": found[worst], "of": worst}


def _gradients(work: Workload, parameters: dict[str, torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each parameter with its gradients of a few sequences as matrices, some parameters at a time."""
    names = list(parameters)
    for first in range(0, len(names), 40):
        part = names[first : first + 40]
        made: dict[str, list[torch.Tensor]] = {name: [] for name in part}
        for batch in work.batches(1)[:SEQUENCES_A_LAYER]:
            losses = work.task.losses(work.model, batch).sum()
            for name, g in zip(part, torch.autograd.grad(losses, [parameters[n] for n in part]), strict=True):
                made[name].append(g.flatten(1))
        yield from made.items()


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
