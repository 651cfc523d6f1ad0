"""[P], Table 7: the least log2 d for which the top-10 eigenvalue error is below .2, .1 and .05, raw and corrected.

    python benchmarks/spectrum_dimension.py     # about 15 minutes on 2 cores; --quick: about 2

The model is a byte-level GPT trained here on the text of Python's own licence and standard library documentation
strings; the eigenvalues of its Hessian come from the full route in R^n. The error is the mean over the top ten by
magnitude of |l - l'| / |l|, matched in order of value, as a median over seeds. Writes
benchmarks/results/spectrum_dimension.json.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import numpy as np
import torch
from record import write
from transformers import GPT2Config, GPT2LMHeadModel

import gradsketch as gs

LIMITS = (0.2, 0.1, 0.05)
KINDS = {"AFFD": gs.AFFD, "AFJL": gs.AFJL, "QK": gs.QK}
K = 10


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


def trained(steps: int, width: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=width, vocab_size=256, n_positions=64, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - 64, (16,))
        batch = {"input_ids": torch.stack([data[s : s + 64] for s in starts])}
        loss = losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    starts = torch.randint(0, len(data) - 64, (8,))
    return model.eval(), {"input_ids": torch.stack([data[s : s + 64] for s in starts])}, float(loss.detach())


def error(found: list[float], exact: np.ndarray) -> float:
    """Mean relative error, matched in order of value."""
    return float(np.mean(np.abs(np.sort(found) - np.sort(exact)) / np.abs(np.sort(exact))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    model, batch, loss = trained(50 if quick else 600, 32 if quick else 96)
    operator = gs.hessian(model, losses, batch)
    exact = gs.spectrum(operator, K, method="full", steps=200, tolerance=1e-4, progress=False)
    print(f"n = {operator.n}, loss {loss:.3f}\n{exact}", file=sys.stderr)
    seeds = range(1 if quick else 3)
    sizes = range(8, 11) if quick else range(7, 14)
    kinds = {"AFFD": KINDS["AFFD"]} if quick else KINDS
    results: dict[str, Any] = {"n": operator.n, "loss": loss, "exact": exact.values.tolist(), "kinds": {}}
    for name, kind in kinds.items():
        table: dict[str, dict[str, float]] = {"raw": {}, "corrected": {}}
        for log2 in sizes:
            pairs = []
            for seed in seeds:
                phi = kind(operator.n, 2**log2, seed=seed)
                steps = min(2**log2, 80)
                s = gs.spectrum(phi @ operator @ phi.T, K, seed=seed, steps=steps, tolerance=1e-2, progress=False)
                by_raw = sorted(s.eigenvalues, key=lambda e: -abs(e.raw or 0.0))[:K]
                pairs.append(
                    (error([e.raw or 0.0 for e in by_raw], exact.values), error(s.values.tolist(), exact.values))
                )
            raw, fixed = np.median(np.array(pairs), axis=0)
            table["raw"][str(log2)], table["corrected"][str(log2)] = float(raw), float(fixed)
            print(f"{name} log2 d = {log2}: raw {raw:.3f}, corrected {fixed:.3f}", file=sys.stderr)
        least = {form: {str(limit): _least(errors, limit) for limit in LIMITS} for form, errors in table.items()}
        results["kinds"][name] = {"errors": table, "least_log2_d": least}
    print(write("spectrum_dimension_quick" if quick else "spectrum_dimension", results))


def _least(errors: dict[str, float], limit: float) -> int | None:
    """Return the least log2 d from which on every error is below the limit."""
    sizes = sorted(int(s) for s in errors)
    good = [s for s in sizes if all(errors[str(t)] < limit for t in sizes if t >= s)]
    return good[0] if good else None


if __name__ == "__main__":
    main()
