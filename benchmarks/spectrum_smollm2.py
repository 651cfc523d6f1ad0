"""SmolLM2-135M, all 134.5 M parameters, before and after a short fine-tune: 20 eigenvalues of each sign in 8 GB.

    python benchmarks/spectrum_smollm2.py                   # about 20 minutes on 2 cores; --quick: about 4
    python benchmarks/spectrum_smollm2.py --scratch /tmp    # about an hour, and 22 GB of disk

The loss is that of one batch of 4 x 16 tokens out of the documentation of torch.nn, on which the model is then
fine-tuned: 30 steps of AdamW on 4 x 32 tokens at 2e-5. Eager attention, float32; the weights are 4-bit (Q4_1),
de-quantised. A basis of 60 vectors alone would take 32 GB. Writes benchmarks/results/spectrum_smollm2.json and
a figure beside it. With --scratch, Krylov vectors are kept there, a byte a number, and it is the spectrum before the
fine-tune alone: benchmarks/results/spectrum_smollm2_scratch.json.
"""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path
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


def tokens(tokenizer: Any) -> torch.Tensor:
    """The documentation of PyTorch's layers, which whoever runs this has."""
    layers = (
        torch.nn.Module,
        torch.nn.Transformer,
        torch.nn.Linear,
        torch.nn.Conv2d,
        torch.nn.LSTM,
        torch.nn.Embedding,
    )
    return tokenizer("\n".join(inspect.getdoc(layer) or "" for layer in layers), return_tensors="pt").input_ids[0]


def train_model(model: torch.nn.Module, text: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 32, (4,), generator=generator)
        loss = losses(model, {"input_ids": torch.stack([text[s : s + 32] for s in starts])}).mean()
        history.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return history


def take(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int, k: int, scratch: Path | None = None
) -> dict[str, Any]:
    operator = gs.hessian(model, losses, batch)
    with torch.no_grad():
        loss = float(losses(model, batch).mean())
    gradient = gs.loss_gradient(model, losses, batch)
    start = time.perf_counter()
    options: dict[str, Any] = {"which": "both", "method": "sketched-basis", "steps": steps, "scratch": scratch}
    result = gs.spectrum(operator, k, gradient=gradient, progress=False, **options)
    print(f"loss {loss:.3f}\n{result}", flush=True)
    return {"spectrum": result, "loss": loss, "seconds": time.perf_counter() - start}


def summary(spectrum: gs.Spectrum, loss: float, seconds: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "positive": [e.value for e in spectrum.positive],
        "negative": [e.value for e in spectrum.negative],
        "residuals": [e.residual for e in spectrum.eigenvalues],
        "converged": [e.converged for e in spectrum.eigenvalues],
        "r_neg": spectrum.r_neg,
        "outliers": spectrum.outliers,
        "gradient_in_outliers": spectrum.gradient_in_outliers,
        "copies_dropped": spectrum.copies,
        "largest_cosine_of_two_eigenvectors": largest_cosine(spectrum),
        "hvps": spectrum.hvps,
        "settled_after": spectrum.settled_after,
        "seconds": seconds,
        "peak_gb_of_process": spectrum.peak_bytes / 1e9,
        "vectors_held": spectrum.vectors_held,
        "gb_on_disk": spectrum.disk_bytes / 1e9,
    }


def largest_cosine(spectrum: gs.Spectrum) -> float:
    """Largest |cosine| between sketches of two settled eigenvectors: a ghost beside its original would show as 1."""
    settled = torch.tensor([e.converged for e in spectrum.eigenvalues])
    rows = torch.nn.functional.normalize(spectrum.sketches[settled], dim=1)
    return float((rows @ rows.T).fill_diagonal_(0).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    quick = options.quick
    model, tokenizer = smollm2("eager")
    text = tokens(tokenizer)
    batch = {"input_ids": text[:64].view(4, 16)}
    k, steps = (5, 20) if quick else (20, 160)
    before = take(model, batch, steps, k, options.scratch)
    name = "spectrum_smollm2_quick" if quick else "spectrum_smollm2"
    if options.scratch is not None:
        print(write(f"{name}_scratch", {"n": before["spectrum"].n, "before": summary(**before)}))
        return
    history = train_model(model, text, 4 if quick else 30)
    after = take(model, batch, steps, k)
    evolution = gs.Evolution((0, len(history)), (before["spectrum"], after["spectrum"]))
    results: dict[str, Any] = {
        "n": before["spectrum"].n,
        "training_loss": history,
        "overlap": evolution.overlaps(k).tolist(),
        "before": summary(**before),
        "after": summary(**after),
    }
    draw(results, RESULTS / f"{name}.png")
    print(write(name, results))


def draw(results: dict[str, Any], path: Path) -> None:
    """Both ends of the spectrum before and after, and R_n; open marks have not settled."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for point, mark, shade in (("before", "o", 1.0), ("after", "s", 0.5)):
        row = results[point]
        count = len(row["positive"])
        settled = {"positive": row["converged"][:count], "negative": row["converged"][count:][::-1]}
        for side, colour in (("positive", "#0072b2"), ("negative", "#d55e00")):
            for rank, (value, done) in enumerate(zip(row[side], settled[side], strict=True), 1):
                face, label = colour if done else "white", f"{side}, {point}" if rank == 1 else None
                left.plot(rank, abs(value), mark, color=colour, ms=4, mfc=face, alpha=shade, label=label)
        ratios = [value / row["positive"][0] for value in row["positive"]]
        label = f"{point}: loss {row['loss']:.2f}, R_NEG {row['r_neg']:.2f}, {row['outliers']} outliers"
        right.plot(range(1, count + 1), ratios, f"{mark}-", color="#0072b2" if point == "before" else "#7fb8d9", ms=3.5,
                   lw=1, label=label)  # fmt: skip
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.set_ylabel("|eigenvalue| (open: not settled)")
    right.axhline(0.2, color="#555555", ls="--", lw=1)
    right.set_ylim(0, 1.05)
    right.set_ylabel("R_n = λ_n / λ_1")
    for axes in (left, right):
        axes.set_xticks([1, 5, 10, 15, 20])
        axes.set_xlabel("rank")
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"SmolLM2-135M, all {results['n']:,} parameters, {results['before']['hvps']} products a point", fontsize=10
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
