"""What a metric before the sketch costs: passes of GPT-2's layers, plain and with K-FAC factors, beside training's own.

    python benchmarks/factors_cost.py

Writes benchmarks/results/factors_cost.json: CPU seconds of one batch of 8 × 128 tokens, medians of seven in turns, for
two shapes of model; a plain forward and backward pass, sketches, and sketches in the metric of K-FAC, each with all
coordinates of a side and with those that an index in the metric computes; and what the estimate of the factors took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import write
from torch import nn

import gradsketch as gs
from gradsketch.attribution.metric import COORDINATES

SHAPES = ({"width": 256, "layers": 3}, {"width": 768, "layers": 1})
VOCABULARY, ROWS, TOKENS, D, TURNS = 2048, 8, 128, 4096, 8
TASK = gs.CausalLM()


def gpt2(width: int, layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_head=4,
        n_embd=width,
        n_positions=TOKENS,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def medians(jobs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU seconds of each job, done in turns; the first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(TURNS):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def measured(width: int, layers: int) -> dict[str, Any]:
    model = gpt2(width, layers)
    batch = {"input_ids": torch.randint(0, VOCABULARY, (ROWS, TOKENS))}
    parameters = gs.Parameters(model)
    factors = gs.kfac(model, TASK, batch)

    def training() -> None:
        TASK.losses(model, batch).sum().backward()
        model.zero_grad()

    jobs: dict[str, Callable[[], Any]] = {"forward and backward": training}
    for coordinates in (None, COORDINATES):
        phi = gs.BlockSum(parameters, D, coordinates=coordinates)
        for name, precondition in (("plain", None), ("kfac", factors)):
            sketcher = gs.GradientSketcher(model, TASK, phi, precondition=precondition)
            bound = "all" if coordinates is None else coordinates
            jobs[f"{name}, {bound} coordinates"] = lambda sketcher=sketcher: sketcher(batch)
    seconds = medians(jobs)
    return {
        "width": width,
        "layers": layers,
        "parameters": parameters.n,
        "d": D,
        "factor_seconds": factors.seconds,
        "seconds": seconds,
        "over_plain": {name: value / seconds["plain, all coordinates"] for name, value in seconds.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [measured(**shape) for shape in SHAPES]
    print(results)
    print(write("factors_cost", results))
