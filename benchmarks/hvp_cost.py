"""What one curvature product costs, in gradients and in vectors of length n.

``python benchmarks/hvp_cost.py`` writes results/hvp_cost.json; ``--quick`` uses a smaller model and fewer rounds;
``--smollm2`` measures SmolLM2-135M on 4 × 16 tokens instead (needs the package with its weights) and writes
results/hvp_cost_smollm2.json.

The model of the first is a GPT-2 of 1.06 M random weights (4 layers, width 128, 2,048 tokens), one batch of 16 × 64
tokens, eager attention, float32. A gradient is a plain forward and ``backward()`` of the mean loss. Ratios are
between interleaved rounds of one process. Errors are relative to grad-of-grad in float64.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from record import interleaved_seconds, peak_bytes, write
from torch import Tensor, nn

import gradsketch as gs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--smollm2", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.smollm2:
        name, model, batch = "hvp_cost_smollm2", *smollm2()
    else:
        name, model, batch = "hvp_cost", *gpt2(arguments.quick)
    results = measure(model, batch, 3 if arguments.quick or arguments.smollm2 else 9, exact=not arguments.smollm2)
    for job, row in results["products"].items():
        print(job.ljust(44), "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    if not arguments.quick:
        print(write(name, results))


def gpt2(quick: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    width = 64 if quick else 128
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=width, vocab_size=2048, n_positions=64, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 2048, (16, 64))}


def smollm2() -> tuple[nn.Module, dict[str, Tensor]]:
    from gradsketch.demo.weights import smollm2 as load

    model, _ = load("eager")
    torch.manual_seed(0)
    return model, {"input_ids": torch.randint(0, 49152, (4, 16))}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels = batch["input_ids"][:, 1:]
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def gradient(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """A plain gradient of the mean loss, with nothing of this library in it."""
    model.zero_grad()
    for batch in batches:
        (losses(model, batch).mean() / len(batches)).backward()


def products(model: nn.Module, batch: dict[str, Tensor], v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the products to time, each as a call."""
    rows = [{"input_ids": ids} for ids in batch["input_ids"]]
    half = len(rows) // 2
    jobs: dict[str, Callable[[], Tensor]] = {}
    for kind in (gs.hessian, gs.gauss_newton, gs.fisher):
        for mode in ("grad-of-grad", "jvp-of-grad", "central-difference"):
            one = kind(model, losses, batch, mode=mode)
            two = kind(model, losses, rows, mode=mode, batch_size=half)
            jobs[f"{kind.__name__}, {mode}, one batch"] = lambda operator=one: operator(v)
            jobs[f"{kind.__name__}, {mode}, streamed"] = lambda operator=two: operator(v)
    four = gs.hessian(model, losses, rows, batch_size=half)
    jobs["hessian, grad-of-grad, streamed, 4 vectors"] = lambda: four(v.expand(4, -1))[0]
    return jobs


def peers(model: nn.Module, batch: dict[str, Tensor], v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the products of other libraries, where installed."""
    jobs: dict[str, Callable[[], Tensor]] = {}

    try:
        from curvlinops import HessianLinearOperator

        parameters, data = list(model.parameters()), [(batch, batch["input_ids"][:, 1:].flatten())]
        size = len(batch["input_ids"])
        H = HessianLinearOperator(_Logits(model), nn.CrossEntropyLoss(), parameters, data, batch_size_fn=lambda _: size)
        jobs["curvlinops, hessian, one batch"] = lambda: (H @ v).detach()
    except ImportError:
        pass
    try:
        from hessian_eigenthings import HessianOperator

        for method in ("autograd", "finite_difference"):
            peer = HessianOperator(model, [batch], lambda model, batch: losses(model, batch).mean(), method=method)
            jobs[f"hessian-eigenthings, {method}, one batch"] = lambda operator=peer: operator.matvec(v)
    except ImportError:
        pass
    return jobs


class _Logits(nn.Module):
    """Logits of every predicted token, one a row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)


def measure(model: nn.Module, batch: dict[str, Tensor], rounds: int, exact: bool) -> dict[str, Any]:
    """Time every product against a gradient over the same batches; errors and memory besides."""
    n = sum(p.numel() for p in model.parameters())
    v = torch.randn(n, generator=torch.Generator().manual_seed(0))
    v /= v.norm()
    halves = [{"input_ids": half} for half in batch["input_ids"].chunk(2)]
    wanted = reference(model, batch, v) if exact else {}
    gradients = {
        "gradient, one batch": lambda: gradient(model, [batch]),
        "gradient, streamed": lambda: gradient(model, halves),
    }
    # Other libraries have rounds of their own: differences taken in place change the weights, which drops kept graphs.
    rows = compare(gradients, peers(model, batch, v), rounds, n, wanted)
    rows |= compare(gradients, products(model, batch, v), rounds, n, wanted)
    return {"n": n, "tokens": list(batch["input_ids"].shape), "products": rows}


def compare(
    gradients: dict[str, Callable[[], Any]],
    jobs: dict[str, Callable[[], Tensor]],
    rounds: int,
    n: int,
    wanted: dict[str, Tensor],
) -> dict[str, Any]:
    seconds = interleaved_seconds(gradients | jobs, rounds)
    rows: dict[str, Any] = {}
    for name, job in (gradients | jobs).items():
        own = seconds["gradient, streamed" if "streamed" in name else "gradient, one batch"]
        vectors = 4 if "4 vectors" in name else 1
        rows[name] = {"seconds": seconds[name]["best"] / vectors}
        rows[name] |= {f"gradients ({k})": seconds[name][k] / own[k] / vectors for k in ("best", "median")}
        rows[name]["peak n-vectors"] = peak_bytes(job) / (4 * n)
        kind = name.split(",")[0] if name.split(",")[0] in wanted else "hessian"
        if name in jobs and wanted:
            rows[name]["relative error"] = float((job() - wanted[kind]).norm() / wanted[kind].norm())
    return rows


def reference(model: nn.Module, batch: dict[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    wide = copy.deepcopy(model).double()
    kinds = (gs.hessian, gs.gauss_newton, gs.fisher)
    return {kind.__name__: kind(wide, losses, batch)(v.double()).float() for kind in kinds}


if __name__ == "__main__":
    main()
