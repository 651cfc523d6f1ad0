"""What does a second look at whole gradients bring? Re-ranked candidates of one index, by retraining on random halves.

    python benchmarks/rerank.py [--retrained FILE]     # a quarter of an hour on one core

Writes benchmarks/results/rerank.json, for the model of facts_lm.py and indexes of one epoch and of four: the linear
datamodeling score of sketches, of exact EK-FAC over all rows, and of EK-FAC over the candidates that sketches found,
where all other rows count as zero; which share of the exact top ten was among the candidates; and seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import facts_lm
import torch
from jaxtyping import Float
from lm_attribution import WEIGHTS, Bootstrap, interval
from record import table, write
from torch import Tensor

import gradsketch as gs

SKETCHES = {"plain": None, "kfac": "kfac"}
CANDIDATES = (10, 25, 50, 100)
LAMBDA = 1.0  # of the sketches' ridge score: what scored best in lm_attribution_small.json
DAMPINGS = (0.01, 0.1)  # of EK-FAC
Scores = Float[Tensor, "q n"]


def asked(index: gs.Index, model: torch.nn.Module, **options: Any) -> tuple[Scores, gs.Hits]:
    rows, questions, _ = facts_lm.facts()
    hits = index.query(model, questions, k=len(rows), score="ridge", damping=LAMBDA, **options)
    return table(hits), hits


def exact(index: gs.Index, model: torch.nn.Module, damping: float) -> tuple[Scores, float]:
    """Return the scores of all rows by EK-FAC, and the seconds that they took."""
    rows, questions, _ = facts_lm.facts()
    every = len(rows)
    hits = index.query(model, questions, k=every, rerank=every, score="dot", damping=damping, data=rows)
    return table(hits), hits.cost.rerank


def measured(retrained: gs.Retrainings, d: int) -> dict[str, Any]:
    rows, bootstrap = facts_lm.facts()[0], Bootstrap(retrained)
    model, states = facts_lm.untrained(), facts_lm.trained(list(range(len(facts_lm.facts()[0]))))[1]

    def lds(scores: Scores) -> dict[str, Any]:
        value = gs.linear_datamodeling_score(scores, retrained).value
        return {"lds": value, "interval": interval(bootstrap.values(scores))}

    results: list[dict[str, Any]] = []
    for weights, epochs in WEIGHTS.items():
        truths: dict[float, Scores] = {}
        for sketches, precondition in SKETCHES.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                index = gs.build_index(
                    folder,
                    model,
                    facts_lm.TASK,
                    rows,
                    d=d,
                    checkpoints=[states[epoch] for epoch in epochs],
                    precondition=precondition,
                    progress=False,
                )
                entry = {"weights": weights, "sketches": sketches, "build_seconds": time.perf_counter() - began}
                found, _ = asked(index, model)
                order = found.argsort(dim=1, descending=True)
                results.append({**entry, "ranked by": f"ridge, λ={LAMBDA:g}", **lds(found)})
                for damping in DAMPINGS:
                    if damping not in truths:
                        truths[damping], seconds = exact(index, model, damping)
                        own = {"weights": weights, "sketches": None, "ranked by": f"EK-FAC, λ={damping:g}"}
                        results.append({**own, "seconds": seconds, **lds(truths[damping])})
                    truth = truths[damping]
                    best = truth.topk(10, dim=1).indices
                    for count in CANDIDATES:
                        kept = torch.zeros_like(truth, dtype=torch.bool)
                        kept.scatter_(1, order[:, :count], True).scatter_(1, order[:, -count:], True)
                        first = torch.zeros_like(kept).scatter_(1, order[:, :count], True)
                        name = f"EK-FAC, λ={damping:g}, of {count} proponents and {count} opponents"
                        recall = float(first.gather(1, best).double().mean())
                        results.append({**entry, "ranked by": name, "recall_of_10": recall, **lds(truth * kept)})
                        print(results[-1], flush=True)
    return {"rows": len(rows), "halves": len(retrained.kept), "d": d, "scores": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halves", type=int, default=30)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--retrained", type=Path, help="JSON file in which finished halves are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    retrained = facts_lm.retrained(options.halves, options.retrained)
    print(write("rerank", measured(retrained, options.d)))


if __name__ == "__main__":
    main()
