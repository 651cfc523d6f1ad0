"""Per-example gradient sketches against one plain forward and backward pass: throughput, memory, quality.

    python benchmarks/gradient_cost.py [--quick] [--batch 8]

Workload W1: a random-weight GPT-2 of 6 layers, width 256, vocabulary 8192, on 64 sequences of 128 random tokens.
Writes results/gradient_cost.json. "floor" runs forward and backward without any weight gradient.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from record import interleaved_seconds, peak_bytes, write

import gradsketch as gs
from gradsketch.gradients.data import batch_length
from gradsketch.gradients.gram import gradient_gram

SIZES = (512, 4096, 32768, 65536)
QUALITY_SEQUENCES = 32  # whose pairs are judged: exact inner products cost far more than sketches


def workload(quick: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    layers, sequences = (2, 16) if quick else (6, 64)
    config = GPT2Config(n_layer=layers, n_head=8, n_embd=256, vocab_size=8192, n_positions=128)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, 8192, (sequences, 128), generator=torch.Generator().manual_seed(1))
    return GPT2LMHeadModel(config).eval().to(device), ids.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, 16 sequences, 2 repeats")
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    model, ids = workload(arguments.quick)
    task, parameters = gs.CausalLM(), gs.Parameters(model)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(arguments.batch)]
    sketchers = {d: gs.GradientSketcher(model, task, gs.BlockSum(parameters, d)) for d in SIZES}

    def reference() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            task.losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    def floor() -> None:
        model.requires_grad_(False)
        handle = model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
        for batch in batches:
            task.losses(model, batch).sum().backward()
        handle.remove()
        model.requires_grad_(True)

    def sketch(d: int) -> torch.Tensor:
        return torch.cat([sketchers[d](batch).values for batch in batches])

    jobs: dict[str, Any] = {"reference": reference, "floor": floor}
    jobs |= {f"d={d}": lambda d=d: sketch(d) for d in SIZES}
    seconds = interleaved_seconds(jobs, repeats=2 if arguments.quick else 3)
    memory = {name: peak_bytes(job) for name, job in jobs.items()}
    results = {
        "batch": arguments.batch,
        "quick": arguments.quick,
        "seconds": seconds,
        "throughput": {name: seconds["reference"]["median"] / s["median"] for name, s in seconds.items()},
        "peak_bytes": memory,
        "peak_ratio": {name: m / max(1, memory["reference"]) for name, m in memory.items()},
        "quality": quality(model, task, batches, {d: sketch(d) for d in SIZES}),
    }
    path = write("gradient_cost_quick" if arguments.quick else "gradient_cost", results)
    print(f"{'d':>7} {'throughput':>11} {'memory':>7} {'noise·√d':>9} {'r':>7}")
    for d in SIZES:
        row, name = results["quality"][d], f"d={d}"
        ratios = f"{results['throughput'][name]:>11.2f} {results['peak_ratio'][name]:>7.2f}"
        print(f"{d:>7} {ratios} {row['noise_sqrt_d']:>9.3f} {row['pearson']:>7.4f}")
    print(f"floor (no weight gradients, no sketches): {results['throughput']['floor']:.2f}; written to {path}")


def quality(model: Any, task: gs.Task, batches: list[Any], sketches: dict[int, torch.Tensor]) -> dict[int, Any]:
    """Noise·√d (1 = dense Gaussian) and Pearson r of all inner products of different sequences."""
    judged = batches[: max(1, QUALITY_SEQUENCES // batch_length(batches[0]))]
    rows = [torch.cat([gradient_gram(model, task, x, y) for y in judged], 1) for x in judged]
    exact = torch.cat(rows).double()
    pairs = torch.triu_indices(len(exact), len(exact), 1).unbind()
    norms = exact.diagonal().sqrt()
    scale, truth = (norms[:, None] * norms)[pairs], exact[pairs]
    answers = {}
    for d, s in sketches.items():
        s = s[: len(exact)].double()
        estimate = (s @ s.T)[pairs]
        noise = ((estimate - truth) / scale).square().mean().sqrt().item() * d**0.5
        pearson = torch.corrcoef(torch.stack([estimate, truth]))[0, 1].item()
        answers[d] = {"noise_sqrt_d": noise, "pearson": pearson}
    return answers


if __name__ == "__main__":
    main()
