"""What a row costs in bytes and in fidelity: sketches stored as float16, int8, int4 and signs, at several sizes.

    python benchmarks/stored_bytes.py [--workload smollm2] [--quick]

Rows are what an index would hold, questions are float32. "pearson": with exact inner products, over all pairs of
sequences; the interval is a bootstrap over sequences. "top10": of the ten sequences with the largest exact inner
product with each sequence, the share among its ten best by stored rows. "logra_bytes": 16 × 16 float16 numbers
for every linear layer, as LoGra (Choe et al. 2024) has them. Writes results/stored_bytes_WORKLOAD.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from gradient_workloads import WORKLOADS, Workload
from record import write
from torch import nn

import gradsketch as gs
from gradsketch.evaluation.stored import stored_qualities
from gradsketch.gradients.gram import gradient_gram
from gradsketch.store.encoding import decode, encode

SIZES = (1024, 4096, 16384, 65536)
K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("w1", "smollm2", "minilm"), default="w1")
    parser.add_argument("--quick", action="store_true", help="fewer layers or sequences, written to no file")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.workload](arguments.quick)
    exact = gradient_gram(work.model, work.task, work.batches(len(work.ids))[0])
    rows = [row for d in SIZES for row in measured(work, exact, d)]
    for row in rows:
        print(
            f"{row['d']:>7} {row['dtype']:>8} {row['bytes']:>8,} B   r {row['pearson']:.4f}   top 10 {row['top10']:.3f}"
        )
    if not arguments.quick:
        results = {"sequences": list(work.ids.shape), "logra_bytes": logra_bytes(work.model), "rows": rows}
        print(write(f"stored_bytes_{work.name}", results))


def measured(work: Workload, exact: torch.Tensor, d: int) -> list[dict[str, Any]]:
    sketcher = gs.GradientSketcher(work.model, work.task, gs.BlockSum(gs.Parameters(work.model), d))
    sketches = torch.cat([sketcher(batch).values for batch in work.batches(8)])
    found = stored_qualities(exact, [sketches])
    return [asdict(each) | {"top10": overlap(exact, sketches, each.dtype)} for each in found]


def overlap(exact: torch.Tensor, sketches: torch.Tensor, dtype: str) -> float:
    rows = decode(*encode(sketches.float(), dtype), sketches.shape[1], dtype)
    true, found = (_best(products) for products in (exact.double(), (sketches.float() @ rows.T).double()))
    return sum(len(set(a) & set(b)) for a, b in zip(true, found, strict=True)) / (K * len(true))


def _best(products: torch.Tensor) -> list[list[int]]:
    """The ten other sequences with the largest product, for each sequence."""
    best: list[list[int]] = products.clone().fill_diagonal_(-torch.inf).topk(K, dim=1).indices.tolist()
    return best


def logra_bytes(model: nn.Module) -> int:
    from transformers.pytorch_utils import Conv1D

    return sum(16 * 16 * 2 for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


if __name__ == "__main__":
    main()
