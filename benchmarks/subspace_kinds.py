"""The kind of sketch hardly matters for intrinsic dimension: FFD, AFJL, AFFD and QK, three seeds each.

The form of Table 10 of Schioppa (arXiv 2402.03994): log2 of the dimension found by the single-run search, by kind and
seed. There kinds and seeds agreed within a factor of two on most tasks. Here: a multi-layer perceptron (n = 85,002) on
the 8 × 8 digits of scikit-learn, target 90 % of the accuracy of full fine-tuning.

Run: python benchmarks/subspace_kinds.py [--quick]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import Any

import torch
from record import write
from sklearn.datasets import load_digits
from torch import nn

import gradsketch as gs

KINDS = ("FFD", "AFJL", "AFFD", "QK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    quick = parser.parse_args().quick
    seeds = (0,) if quick else (0, 1, 2)
    common = on_digits()
    full = gs.fine_tune(*common, steps=500, lr=1e-3, batch_size=64)
    print(f"full fine-tuning {full.value:.4f}, n = {full.d:,}", flush=True)
    rows: dict[str, Any] = {}
    for kind in KINDS:
        result = searched(common, kind, full.value, seeds)
        rows[kind] = row(result)
        print(f"{kind:>5}: {result}; log2 d = {rows[kind]['log2_d']}", flush=True)
    found = [d for row in rows.values() for d in row["d"] if d is not None]
    factor = max(found) / min(found)
    print(f"largest over smallest: {factor:g}")
    results = {"full": asdict(full), "settings": result.settings, "seeds": seeds, "kinds": rows, "factor": factor}
    print(write("subspace_kinds" + "_quick" * quick, results))


def on_digits() -> tuple[nn.Module, gs.Task, list[Any], gs.Accuracy]:
    """Return the model, the task, the examples, and the metric."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    task, (train, test) = gs.Classification(), digits()
    return model, task, train, gs.Accuracy(task, test, batch_size=500)


def searched(common: Any, kind: str, full: float, seeds: tuple[int, ...], share: float = 0.9) -> gs.IntrinsicDimension:
    """Search in subspaces of one kind, for a share of the accuracy."""
    return gs.intrinsic_dimension(
        *common,
        target=share * full,
        full=full,
        sketch=getattr(gs, kind),
        d_min=8,
        d_max=1 << 14,
        check_every=100,
        lr=2e-3,
        batch_size=64,
        seeds=seeds,
        progress=False,
    )


def row(result: gs.IntrinsicDimension) -> dict[str, Any]:
    """Return what is kept of a search."""
    dims = [search.d for search in result.searches]
    return {
        "d": dims,
        "log2_d": [None if d is None else math.log2(d) for d in dims],
        "steps": [search.steps for search in result.searches],
        "seconds": [search.seconds for search in result.searches],
    }


def digits() -> tuple[list[Any], list[Any]]:
    """Return 1,200 examples for training and 597 for the metric."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(torch.tensor(x[i] / 16, dtype=torch.float32), int(y[i])) for i in order]
    return rows[:1200], rows[1200:]


if __name__ == "__main__":
    main()
