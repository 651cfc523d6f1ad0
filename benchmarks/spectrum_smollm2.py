"""SmolLM2-135M, all 134.5 M parameters, before and after a short fine-tune: 20 eigenvalues of each sign in 8 GB.

    python benchmarks/spectrum_smollm2.py       # about 20 minutes on 2 cores; --quick: about 4

One batch of 4 x 16 tokens (the documentation of torch.nn.Module), eager attention, float32. A basis of 60
vectors alone would take 32 GB. The weights are 4-bit (Q4_1), de-quantised. Writes
benchmarks/results/spectrum_smollm2.json and two figures beside it.
"""

from __future__ import annotations

import argparse
import inspect
import time
from typing import Any

import torch
from record import RESULTS, write

import gradsketch as gs
from gradsketch.demo.weights import smollm2


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    return each.view(len(logits), -1).mean(1)


def fine_tune(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    history = []
    for _ in range(steps):
        loss = losses(model, batch).mean()
        history.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return history


def take(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int, k: int) -> tuple[gs.Spectrum, float]:
    operator = gs.hessian(model, losses, batch)
    gradient = gs.loss_gradient(model, losses, batch)
    start = time.perf_counter()
    result = gs.spectrum(
        operator, k, which="both", method="sketched-basis", steps=steps, gradient=gradient, progress=False
    )
    print(result, flush=True)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    model, tokenizer = smollm2("eager")
    words = tokenizer(inspect.getdoc(torch.nn.Module) or "", return_tensors="pt").input_ids[0]
    batch = {"input_ids": words[:64].view(4, 16)}
    k, steps = (5, 20) if quick else (20, 100)
    before, seconds_before = take(model, batch, steps, k)
    history = fine_tune(model, batch, 4 if quick else 20)
    after, seconds_after = take(model, batch, steps, k)
    evolution = gs.Evolution((0, len(history)), (before, after))
    evolution.plot(RESULTS / "spectrum_smollm2.png")
    before.plot(RESULTS / "spectrum_smollm2_before.png")
    results: dict[str, Any] = {"n": before.n, "loss": history, "overlap": evolution.overlaps(k).tolist()}
    for name, s, seconds in (("before", before, seconds_before), ("after", after, seconds_after)):
        results[name] = {
            "positive": [e.value for e in s.positive],
            "negative": [e.value for e in s.negative],
            "residuals": [e.residual for e in s.eigenvalues],
            "converged": [e.converged for e in s.eigenvalues],
            "r_neg": s.r_neg,
            "outliers": s.outliers,
            "gradient_in_outliers": s.gradient_in_outliers,
            "copies_dropped": s.copies,
            "hvps": s.hvps,
            "seconds": seconds,
            "peak_gb_of_process": s.peak_bytes / 1e9,
            "vectors_held": s.vectors_held,
        }
    print(write("spectrum_smollm2_quick" if quick else "spectrum_smollm2", results))


if __name__ == "__main__":
    main()
