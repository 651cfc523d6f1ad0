"""Memory that one rank takes to train in a Subspace of a model that FSDP2 shares out among 1, 2 and 4 ranks.

    python benchmarks/fsdp_subspace.py          # about 3 minutes on 2 cores

The model, its rows, and how memory is measured are those of fsdp_curvature.py: 16.8 million parameters in float32 and
32 rows in all. A rank opens a Subspace of d = 4096 and takes three steps of Adam on w, with each of two sketches.
Measured is the most that it takes meanwhile beyond its share of the weights. "losses" are those of rank 0's rows; each
number of ranks draws weights of its own. Ranks are processes on one machine, joined by gloo; so seconds only say that
it works. Writes benchmarks/results/fsdp_subspace.json.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from fsdp_curvature import ROWS, WIDTH, losses, most_of, shared_model, told_by
from record import peak_bytes, write

import gradsketch as gs

D, STEPS = 4096, 3


def one_rank() -> None:
    """Measure this rank, and print what was found."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))[:, rank::ranks].clone()
    batch, model = {"x": rows[0], "y": rows[1]}, shared_model()
    found: dict[str, dict[str, float]] = {}
    fell: dict[str, list[float]] = {}
    losses(model, batch).mean().backward()  # what torch makes once
    model.zero_grad()
    parameters = gs.Parameters(model)
    held = sum(p.to_local().numel() * 4 for p in model.parameters())  # type: ignore[operator]
    for sketch in (gs.AFFD(parameters.n, D), gs.BlockSum(parameters, D)):
        values: list[float] = []

        def train(sketch: gs.Sketch = sketch, values: list[float] = values) -> None:
            with gs.Subspace(model, parameters, sketch) as subspace:
                optimiser = torch.optim.Adam([subspace.w], lr=1e-3)
                for _ in range(STEPS):
                    optimiser.zero_grad()
                    loss = losses(subspace, batch).mean()
                    loss.backward()
                    optimiser.step()
                    values.append(float(loss.detach()))

        start, kind = time.perf_counter(), type(sketch).__name__
        peak = peak_bytes(train)
        found[kind] = {"peak_bytes": peak, "seconds": time.perf_counter() - start}
        fell[kind] = values
    torch.distributed.destroy_process_group()
    print(json.dumps({"n": parameters.n, "held_bytes": held, "losses": fell, "jobs": found}))


def main() -> None:
    results = []
    for ranks in (1, 2, 4):
        told = told_by(__file__, ranks)
        held = max(one["held_bytes"] for one in told) / 2**20
        about = {"ranks": ranks, "n": told[0]["n"], "weights_held_mib": held, "losses": told[0]["losses"]}
        results.append({**about, **most_of(told)})
        print(results[-1], flush=True)
    write("fsdp_subspace", results, rows=ROWS, steps=STEPS, d=D)


if __name__ == "__main__":
    one_rank() if "--rank" in sys.argv else main()
