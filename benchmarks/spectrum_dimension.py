"""[P], Table 7: the least log2 d for which the top-10 eigenvalue error is below .2, .1 and .05, raw and corrected.

    python benchmarks/spectrum_dimension.py     # about 15 minutes on 1 core; --quick: about 2

The model is a byte-level GPT of 254,592 parameters, trained here for 1500 steps (cosine schedule, loss 1.7 nats a byte)
on the source text of six modules of Python's standard library; the eigenvalues of its Hessian come from the full route
in R^n. The error is the mean over the top ten by magnitude of |l - l'| / |l|, matched in order of value, as a median
over three seeds. Beside it stands what no correction can go below: the mean of the sketch's own noise, .8 sqrt(2/d).
Writes benchmarks/results/spectrum_dimension.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, write
from transformers import GPT2Config, GPT2LMHeadModel

import gradsketch as gs

LIMITS = (0.2, 0.1, 0.05)
KINDS = {"AFFD": gs.AFFD, "AFJL": gs.AFJL, "QK": gs.QK}
K = 10


@cache
def text() -> bytes:
    """Return English and code that every Python has: documentation strings of its standard library."""
    import argparse as a
    import datetime
    import decimal
    import statistics
    import typing

    modules = (a, datetime, decimal, statistics, typing, inspect)
    return "\n".join(inspect.getsource(m) for m in modules).encode()


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    return each.view(len(logits), -1).mean(1)


def trained(steps: int, width: int, layers: int = 2) -> tuple[torch.nn.Module, dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_head=4, n_embd=width, vocab_size=256, n_positions=64, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    loss = torch.tensor(0.0)
    for _ in range(steps):
        batch = pieces(16)
        loss = losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.eval(), pieces(8), float(loss.detach())


def pieces(count: int, length: int = 64) -> dict[str, torch.Tensor]:
    """Return pieces of the text, drawn by torch's own generator."""
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    starts = torch.randint(0, len(data) - length, (count,))
    return {"input_ids": torch.stack([data[s : s + length] for s in starts])}


def error(found: list[float], exact: np.ndarray) -> float:
    """Mean relative error, matched in order of value."""
    return float(np.mean(np.abs(np.sort(found) - np.sort(exact)) / np.abs(np.sort(exact))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    model, batch, loss = trained(50 if quick else 1500, 32 if quick else 96)
    operator = gs.hessian(model, losses, batch)
    exact = gs.spectrum(operator, K, method="full", steps=200, tolerance=1e-4, progress=False)
    print(f"n = {operator.n}, loss {loss:.3f}\n{exact}", file=sys.stderr)
    seeds = range(1 if quick else 3)
    sizes = range(8, 11) if quick else range(6, 13)
    kinds = {"AFFD": KINDS["AFFD"]} if quick else KINDS
    results: dict[str, Any] = {"n": operator.n, "loss": loss, "exact": exact.values.tolist(), "kinds": {}}
    results["floor"] = {str(log2): floor(log2) for log2 in sizes}
    for name, kind in kinds.items():
        table: dict[str, dict[str, float]] = {"raw": {}, "corrected": {}, "seen": {}}
        for log2 in sizes:
            runs = np.array([one(operator, kind, 2**log2, seed, exact.values) for seed in seeds])
            for column, median in zip(table, np.median(runs, axis=0), strict=True):
                table[column][str(log2)] = float(median)
            print(f"{name} log2 d = {log2}: {dict(zip(table, np.median(runs, axis=0), strict=True))}", file=sys.stderr)
        least = {form: {str(limit): _least(table[form], limit) for limit in LIMITS} for form in ("raw", "corrected")}
        results["kinds"][name] = {"errors": table, "least_log2_d": least}
        # A kind that is done is written, whatever becomes of the next.
        file = "spectrum_dimension_quick" if quick else "spectrum_dimension"
        draw(results, RESULTS / f"{file}.png")
        print(write(file, results))


def one(operator: gs.LinearMap, kind: Any, d: int, seed: int, exact: np.ndarray) -> tuple[float, float, float]:
    """Return the error of the raw values, that of the corrected ones, and how many of the ten stand out of the bulk."""
    phi = kind(operator.n, d, seed=seed)
    s = gs.spectrum(phi @ operator @ phi.T, K, seed=seed, steps=min(d, 80), tolerance=1e-2, progress=False)
    by_raw = sorted(s.eigenvalues, key=lambda e: -abs(e.raw or 0.0))[:K]
    return error([e.raw or 0.0 for e in by_raw], exact), error(s.values.tolist(), exact), float(s.converged.sum())


def floor(log2: int) -> float:
    """Mean |noise| of an eigenvalue relative to itself: a normal of standard deviation sqrt(2/d)."""
    return math.sqrt(2 / math.pi) * math.sqrt(2 / 2**log2)


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, kind), colour in zip(results["kinds"].items(), ("#0072b2", "#d55e00", "#009e73"), strict=False):
        for form, style in (("raw", "o--"), ("corrected", "o-")):
            errors = kind["errors"][form]
            axes.plot([2 ** int(s) for s in errors], list(errors.values()), style, color=colour, ms=4, lw=1.2)
            first = min(errors, key=int)
            place = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(f"{name}, {form}", (2 ** int(first), errors[first]), fontsize=8, color=colour, **place)
    axes.plot([2 ** int(s) for s in results["floor"]], list(results["floor"].values()), color="#555555", lw=1)
    last = max(results["floor"], key=int)
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate("noise of the sketch", (2 ** int(last), results["floor"][last]), fontsize=8, color="#555555", **place)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(2 ** int(min(results["floor"], key=int)) / 5, 2 ** int(last) * 4)
    axes.set_xlabel("d")
    axes.set_ylabel("mean relative error of the top ten eigenvalues")
    axes.set_title(f"n = {results['n']:,}, trained to {results['loss']:.2f} nats a byte", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _least(errors: dict[str, float], limit: float) -> int | None:
    """Return the least log2 d from which on every error is below the limit."""
    sizes = sorted(int(s) for s in errors)
    good = [s for s in sizes if all(errors[str(t)] < limit for t in sizes if t >= s)]
    return good[0] if good else None


if __name__ == "__main__":
    main()
