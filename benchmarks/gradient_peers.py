"""Per-example gradient sketches by gradsketch and by other libraries: one workload, one run, one machine.

    make peers     # the other libraries, in an environment of their own; absent ones are listed
    .venv-peers/bin/python benchmarks/gradient_peers.py [--quick] [--only bergson]

Every library sketches the 64 sequences of W1 (benchmarks/gradient_workloads.py), in batches of 8, in a process of its
own with a time limit, taking turns with a plain forward and backward pass. Throughput is relative to that pass; r is
the Pearson correlation of inner products of sketches with exact ones of the whole gradients, over all 2016 pairs;
bytes are the sketch's own numbers, without files or metadata. Libraries that sketch layer by layer get p × p numbers
for each of the 24 linear layers inside the blocks. traker's projector draws its matrix anew at every call, so it gets
all 64 gradients in one call, once. Writes results/gradient_peers.json, where --only replaces the rows it measures.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gradient_workloads import Workload, w1
from record import RESULTS, interleaved_seconds, peak_bytes, write
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.evaluation.quality import sketch_quality
from gradsketch.gradients.gram import gradient_gram

BATCH = 8
LIMIT = 120  # seconds a library gets, start included
Sketches = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers, 16 sequences, the smallest size")
    parser.add_argument("--only", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument("--one", nargs=3, metavar=("PEER", "D", "EXACT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = w1(arguments.quick)
    if arguments.one:
        peer, d, exact = arguments.one
        print(json.dumps(measured(work, peer, int(d), torch.load(exact))))
        return
    rows, absent = compared(work, arguments.only, arguments.quick)
    name = "gradient_peers" + ("_quick" if arguments.quick else "")
    rows = kept(name, arguments.only) + rows
    print(f"absent: {absent or 'none'}; written to {write(name, {'rows': rows, 'absent': absent})}")


def compared(work: Workload, names: list[str], quick: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each library and size, and why others have none."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.pt"
        torch.save(gradient_gram(work.model, gs.CausalLM(), work.batches(len(work.ids))[0]), exact)
        for peer in names:
            package, _, sizes = PEERS[peer]
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                absent[peer] = f"{package} is not installed"
                continue
            for d in sizes[:1] if quick else sizes:
                row = {"peer": peer, "version": version} | in_a_process(peer, d, exact, quick)
                rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
    return rows, absent


def kept(name: str, measured_now: list[str]) -> list[dict[str, Any]]:
    """Return the rows of an earlier run that this one did not replace."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text())["results"]["rows"] if path.exists() else []
    return [row for row in earlier if row["peer"] not in measured_now]


def in_a_process(peer: str, d: int, exact: Path, quick: bool) -> dict[str, Any]:
    """Return one measurement, or why there is none."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--one", peer, str(d), str(exact)]
    try:
        done = subprocess.run(
            [*command, *["--quick"][: int(quick)]],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            cwd=exact.parent,  # logix leaves a folder behind
        )
    except subprocess.TimeoutExpired:
        return {"asked": d, "failed": f"did not end in {LIMIT} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"asked": d, "failed": said[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"asked": d} | result


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['peer']:<34} {row['asked']:>6}  {row['failed']}"
    interval = "{:.3f}-{:.3f}".format(*row["pearson_interval"])
    figures = f"{row['throughput']:>6.2f}  r {row['pearson']:.3f} ({interval})  {row['peak_bytes'] / 2**20:>6.0f} MB"
    return f"{row['peer']:<34} {row['d']:>6}  {figures}"


def measured(work: Workload, peer: str, d: int, exact: Tensor) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    batches = work.batches(BATCH)
    seen: list[Tensor] = []
    plain = interleaved_seconds({"plain": lambda: work.plain(batches)}, repeats=1)  # before a library changes the model
    sketch = PEERS[peer][1](work, d)
    jobs = {"peer": lambda: seen.append(sketch())}
    if peer in ONCE:
        start = time.perf_counter()
        peak = peak_bytes(jobs["peer"])
        seconds = plain | {"peer": {"median": time.perf_counter() - start}}
    else:
        if peer not in CHANGES_MODEL:
            jobs["plain"] = lambda: work.plain(batches)
        seconds = plain | interleaved_seconds(jobs, repeats=2)
        peak = peak_bytes(jobs["peer"])
    quality = sketch_quality(exact, seen[0])
    return {
        "d": quality.d,
        "bytes": 4 * quality.d,
        "throughput": seconds["plain"]["median"] / seconds["peer"]["median"],
        "sequences_per_second": len(work.ids) / seconds["peer"]["median"],
        "noise_sqrt_d": quality.noise,
        "pearson": quality.pearson,
        "pearson_interval": quality.pearson_interval,
        "peak_bytes": peak or 0,
    }


def gradsketch(work: Workload, d: int) -> Sketches:
    sketcher = gs.GradientSketcher(work.model, gs.CausalLM(), gs.BlockSum(gs.Parameters(work.model), d))
    return lambda: torch.cat([sketcher(batch).values for batch in work.batches(BATCH)])


def formed(work: Workload, project: Callable[[Tensor], Tensor], at_once: int = BATCH) -> Sketches:
    """Per-example gradients by vmap of grad, formed in batches, then projected ``at_once`` at a time."""
    work.model.set_attn_implementation("eager")
    tensors = {name: p.detach() for name, p in work.model.named_parameters()}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = torch.func.functional_call(work.model, values, (ids[None],), {"use_cache": False}).logits
        return nn.functional.cross_entropy(logits[0, :-1], ids[1:])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def sketch() -> Tensor:
        rows = []
        for together in work.ids.split(at_once):
            gradients = []
            for ids in together.split(BATCH):
                parts = each(tensors, ids)
                gradients.append(torch.cat([part.flatten(1) for part in parts.values()], dim=1))
            rows.append(project(torch.cat(gradients) if len(gradients) > 1 else gradients[0]))
        return torch.cat(rows)

    return sketch


def torch_func(work: Workload, d: int) -> Sketches:
    return formed(work, gs.AFFD(sum(p.numel() for p in work.model.parameters()), d))


def traker(work: Workload, d: int) -> Sketches:
    from trak.projectors import BasicProjector, ProjectionType

    n = sum(p.numel() for p in work.model.parameters())
    projector = BasicProjector(n, d, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu"))
    return formed(work, lambda gradients: projector.project(gradients, model_id=0) / d**0.5, len(work.ids))


def opacus(work: Workload, d: int) -> Sketches:
    from opacus.grad_sample import GradSampleModule

    linear_layers(work.model)  # it knows no Conv1D of transformers
    phi = gs.AFFD(sum(p.numel() for p in work.model.parameters()), d)
    model = GradSampleModule(work.model, batch_first=True, loss_reduction="sum")
    model.train()  # it looks at modules in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    places = torch.arange(work.ids.shape[1])

    def sketch() -> Tensor:
        rows = []
        for ids in work.ids.split(BATCH):
            # Positions a row each: it takes the first dimension of every input for the batch.
            logits = model(ids, position_ids=places.expand(len(ids), -1), use_cache=False).logits[:, :-1]
            each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            each.mean(1).sum().backward()
            rows.append(phi(torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)))
            model.zero_grad(set_to_none=True)
        return torch.cat(rows)

    return sketch


def dattri(work: Workload, d: int) -> Sketches:
    from dattri.func.projection import random_project

    n = sum(p.numel() for p in work.model.parameters())
    project = random_project(torch.empty(BATCH, n, device="meta"), BATCH, d, BATCH, proj_type="random_mask")
    return formed(work, project)


def dattri_llm(work: Workload, d: int) -> Sketches:
    from dattri_llm import HookManager, HookManagerConfig

    blocks = r"transformer\.h\.\d+\.(attn|mlp)\.c_"
    names = block_layers(work.model)
    options = {"style": "logra", "proj_dim": side(work, d), "proj_max_batch_size": BATCH}
    # The default seed would give layers of one shape one matrix, which costs quality.
    seeds = {name: {**options, "proj_seed": 2 * i} for i, name in enumerate(names)}
    config = HookManagerConfig(linear_io=[blocks], capture_style="materialized", projection_kwargs=seeds)
    manager = HookManager(work.model, config=config)

    def sketch() -> Tensor:
        rows = []
        with manager.collect(deregister_on_exit=True):
            for batch in work.batches(BATCH):
                gs.CausalLM().losses(work.model, batch).sum().backward()
                layers = manager.get_gradient().materialize().data
                rows.append(torch.cat([layers[name].flatten(1) for name in sorted(layers)], dim=1))
        work.model.zero_grad(set_to_none=True)
        return torch.cat(rows)

    return sketch


def bergson(work: Workload, d: int) -> Sketches:
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": work.ids.tolist()})
    targets, p = set(block_layers(work.model)), side(work, d)
    config = IndexConfig(run_path="unused", projection_dim=p, include_bias=True)
    work.model.requires_grad_(False)  # as its own loader does: no weight gradient is computed
    work.model.get_input_embeddings().requires_grad_(True)

    def sketch() -> Tensor:
        collector = InMemoryCollector(
            model=work.model,
            data=data,
            cfg=config,
            target_modules=targets,
            processor=GradientProcessor(projection_dim=p, include_bias=True, projection_seed=0),
        )
        with collector:
            for i, batch in enumerate(work.batches(BATCH)):
                losses = gs.CausalLM().losses(work.model, batch)
                losses.sum().backward()
                collector.process_batch(list(range(i * BATCH, i * BATCH + len(losses))), losses=losses)
        collector.teardown()
        work.model.zero_grad(set_to_none=True)
        return torch.cat([part.flatten(1) for part in collector.gradients.values()], dim=1)

    return sketch


def logix(work: Workload, d: int) -> Sketches:
    from logix import LogIX
    from logix.config import LoRAConfig

    linear_layers(work.model)  # it knows no Conv1D of transformers
    run = LogIX(project="w1")
    run.watch(work.model, name_filter=["c_attn", "c_proj", "c_fc"])
    run.add_lora(lora_config=LoRAConfig(init="random", rank=side(work, d)))
    run.setup({"grad": ["log"]})

    def sketch() -> Tensor:
        rows = []
        for i, batch in enumerate(work.batches(BATCH)):
            with run(data_id=[str(i * BATCH + k) for k in range(len(batch["input_ids"]))]):
                gs.CausalLM().losses(work.model, batch).sum().backward()
            _, layers = run.get_log(copy=True)
            rows.append(torch.cat([layers[name]["grad"].flatten(1) for name in sorted(layers)], dim=1))
        work.model.zero_grad(set_to_none=True)
        return torch.cat(rows)

    return sketch


def linear_layers(model: nn.Module) -> None:
    """Put nn.Linear in the place of every Conv1D of transformers."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)


def block_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers inside the blocks."""
    return [name for name, _ in model.named_modules() if ".c_" in name]


def side(work: Workload, d: int) -> int:
    """Return p of the p × p numbers a layer gets."""
    return math.isqrt(d // len(block_layers(work.model)))


# Name → (package, what makes its sketches, the sizes asked for).
PEERS: dict[str, tuple[str, Callable[[Workload, int], Sketches], tuple[int, ...]]] = {
    "gradsketch": ("torch", gradsketch, (4096, 32768)),
    "bergson, per layer, with biases": ("bergson", bergson, (4096, 32868)),
    "dattri-llm, LoGra, own seeds": ("dattri-llm", dattri_llm, (4096, 32868)),
    "logix, LoGra": ("logix-ai", logix, (4096, 32868)),
    "torch.func + our AFFD": ("torch", torch_func, (4096, 32768)),
    "opacus + our AFFD": ("opacus", opacus, (4096, 32768)),
    "torch.func + dattri's random mask": ("dattri", dattri, (4096, 32768)),
    "torch.func + traker's projector": ("traker", traker, (512,)),
}
ONCE = {"torch.func + traker's projector"}
# After these a plain pass would no longer be one.
CHANGES_MODEL = {"bergson, per layer, with biases", "logix, LoGra", "opacus + our AFFD"}


if __name__ == "__main__":
    main()
