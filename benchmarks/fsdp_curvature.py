"""Memory that one rank takes for curvature of a model that FSDP2 shares out among 1, 2 and 4 ranks.

    python benchmarks/fsdp_curvature.py         # about 5 minutes on 2 cores

The model is a residual network of 8 blocks of two layers, 512 -> 2048 -> 512, with 16.8 million parameters in float32,
initialised in shares. All ranks together have 32 rows. "product" is one Hessian-vector product without its check,
"check" the first product of an operator, which is held against differences in float64, and the other two are Lanczos'
method with 6 products by routes of gs.spectrum. Peak memory is that of the resident set over what the rank held before,
which has its share of the weights in it; freed memory goes back to the system at once. Ranks are processes on one
machine, joined by gloo; so seconds only say that it works. Writes benchmarks/results/fsdp_curvature.json.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from record import peak_bytes, write
from torch import nn

import gradsketch as gs

WIDTH, INNER, BLOCKS, ROWS, STEPS = 512, 2048, 8, 32, 6
# Memory that is freed leaves the process, or peaks would hold what the allocator keeps.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(1)


def shared_model() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for parameter in model.parameters():
        local: Any = parameter
        local.to_local().detach().normal_(0, 0.02, generator=generator)
    return model.eval()


def one_rank() -> None:
    """Measure this rank, and print what was found."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    model, found = shared_model(), {}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))[:, rank::ranks].clone()
    batch = {"x": rows[0], "y": rows[1]}
    operator = gs.hessian(model, losses, batch, check=False)
    shared, checked = operator.shared(), gs.hessian(model, losses, batch).shared()
    v = shared.space.drawn(partial(gs.Stream(0, "v").normals, dtype=torch.float32))
    shared(v)  # what is imported and compiled once
    tops: dict[str, float] = {}

    def spectrum(method: Any) -> None:
        tops[method] = gs.spectrum(operator, k=1, steps=STEPS, method=method, progress=False).values[0]

    jobs: dict[str, Callable[[], object]] = {
        "product": lambda: shared(v),
        "full": lambda: spectrum("full"),
        "sketched-basis": lambda: spectrum("sketched-basis"),
        "check": lambda: checked(v),
    }
    for name, job in jobs.items():
        start = time.perf_counter()
        peak = peak_bytes(job)
        found[name] = {"peak_bytes": peak, "seconds": time.perf_counter() - start}
    held = sum(p.to_local().numel() * 4 for p in model.parameters())  # type: ignore[operator]
    n = gs.Parameters(model).n
    torch.distributed.destroy_process_group()
    print(json.dumps({"n": n, "held_bytes": held, "tops": tops, "jobs": found}))


def told_by(script: str, ranks: int) -> list[dict[str, Any]]:
    """Run a script with ``--rank`` on several ranks of this machine, and return the JSON that each prints last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), **ENVIRONMENT}
    started = [
        subprocess.Popen(
            [sys.executable, script, "--rank"], env=os.environ | about | {"RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(ranks)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def most_of(told: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the most that any rank took for each job."""
    return {
        name: {
            "peak_mib": max(one["jobs"][name]["peak_bytes"] for one in told) / 2**20,
            "seconds": max(one["jobs"][name]["seconds"] for one in told),
        }
        for name in told[0]["jobs"]
    }


def run(ranks: int) -> dict[str, Any]:
    told = told_by(__file__, ranks)
    held = max(one["held_bytes"] for one in told) / 2**20
    return {"ranks": ranks, "n": told[0]["n"], "weights_held_mib": held, "tops": told[0]["tops"], **most_of(told)}


def main() -> None:
    results = []
    for ranks in (1, 2, 4):
        results.append(run(ranks))
        print(results[-1], flush=True)
    write("fsdp_curvature", results, rows=ROWS, steps=STEPS)


if __name__ == "__main__":
    one_rank() if "--rank" in sys.argv else main()
