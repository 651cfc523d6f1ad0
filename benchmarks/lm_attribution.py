"""Does the metric help on a language model? K-FAC and plain sketches of one model, by retraining on random halves.

    python benchmarks/lm_attribution.py --small                      # 30 halves of facts_lm.py: a quarter of an hour
    python benchmarks/lm_attribution.py --small --retrained FILE     # keeps the halves there, and takes them up again

Writes benchmarks/results/lm_attribution_small.json: the linear datamodeling score of every score and damping, from
indexes of the last weights, of one epoch and of four, with 95 % intervals by a bootstrap over halves and questions; in
the metric also the gain over plain sketches, whose interval is that of pairs. Every score is what ``Index.query`` says.
The builds are timed too, the estimate of the factors apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import facts_lm
import numpy as np
import torch
from jaxtyping import Float
from record import write
from scipy.stats import rankdata
from torch import Tensor

import gradsketch as gs
from gradsketch.attribution import metric
from gradsketch.attribution.metric import COORDINATES, FACTORS

# Metric, and the bound on a side's coordinates: the index's own, or none.
VARIANTS = {
    "plain": (None, None),
    "kfac": ("kfac", COORDINATES),
    "kfac, all coordinates": ("kfac", 1 << 20),
    "kfac, 128 coordinates": ("kfac", 128),
}
SCORES = (("dot", None), *((name, damping) for name in ("influence", "ridge") for damping in (0.1, 1.0, "auto")))
WEIGHTS = {"last epoch": (15,), "epoch 8": (7,), "epochs 4, 8, 12, 16": (3, 7, 11, 15)}
DRAWS = 300
Scores = Float[Tensor, "q n"]


def scored(states: list[dict[str, Tensor]], variant: str, d: int, seed: int) -> tuple[dict[str, Scores], Any]:
    """Return every kind of score of every row, and what building the index took."""
    rows, questions, _ = facts_lm.facts()
    model = facts_lm.untrained()
    precondition, metric.COORDINATES = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        index = gs.build_index(
            folder,
            model,
            facts_lm.TASK,
            rows,
            d=d,
            checkpoints=states,
            precondition=precondition,
            seed=seed,
            progress=False,
        )
        cost: dict[str, Any] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        cost["factor_seconds"] = sum(gs.Factors.load(file).seconds for file in Path(folder).glob(f"{FACTORS}*"))
        found = {}
        for name, damping in SCORES:
            options = {} if damping is None else {"damping": damping}
            hits = index.query(model, questions, k=len(rows), score=name, **options)
            found[name if damping is None else f"{name}, λ={damping}"] = facts_lm.table(hits)
    return found, cost


class Bootstrap:
    """Draws of halves and questions, the same for all scores, so that differences are those of pairs."""

    def __init__(self, retrained: gs.Retrainings) -> None:
        self.kept, self.losses = retrained.kept.double().numpy(), -retrained.losses.numpy()
        generator, (m, q) = np.random.default_rng(0), self.losses.shape
        self.draws = [(generator.integers(0, m, m), generator.integers(0, q, q)) for _ in range(DRAWS)]

    def values(self, scores: Scores) -> Float[np.ndarray, " draws"]:
        predicted = self.kept @ scores.numpy().T
        return np.array([np.nanmean(_spearman(predicted[r][:, c], self.losses[r][:, c])) for r, c in self.draws])


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (rankdata(values, axis=0) for values in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0))


def interval(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, share)) for share in (0.025, 0.975)]


def measured(retrained: gs.Retrainings, d: int, seeds: int) -> dict[str, Any]:
    model, states = facts_lm.trained(list(range(len(facts_lm.facts()[0]))))
    bootstrap, table, costs = Bootstrap(retrained), [], []
    fact = [[float(row["fact"] == question["fact"]) for row in facts_lm.facts()[0]] for question in facts_lm.facts()[1]]
    oracle = torch.tensor(fact, dtype=torch.float64)
    for weights, epochs in WEIGHTS.items():
        for seed in range(seeds):
            plain: dict[str, np.ndarray] = {}
            for variant in VARIANTS:
                found, cost = scored([states[epoch] for epoch in epochs], variant, d, seed)
                costs.append({"weights": weights, "sketches": variant, "seed": seed, **cost})
                for name, scores in found.items():
                    draws = bootstrap.values(scores)
                    entry = {"weights": weights, "sketches": variant, "seed": seed, "score": name,
                             "lds": gs.linear_datamodeling_score(scores, retrained).value,
                             "interval": interval(draws)}  # fmt: skip
                    if variant == "plain":
                        plain[name] = draws
                    else:
                        entry["gain_interval"] = interval(draws - plain[name])
                    table.append(entry)
                    print(json.dumps(entry), flush=True)
    return {
        "rows": oracle.shape[1],
        "questions": len(oracle),
        "halves": len(retrained.kept),
        "parameters": sum(p.numel() for p in model.parameters()),
        "question_loss": float(facts_lm.question_losses(model).mean()),
        "question_loss_of_halves": float(retrained.losses.mean()),
        "d": d,
        "oracle": {"lds": gs.linear_datamodeling_score(oracle, retrained).value, "is": "states the same fact"},
        "scores": table,
        "builds": costs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", required=True, help="the model of facts_lm.py")
    parser.add_argument("--halves", type=int, default=30)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=1, help="of the sketch")
    parser.add_argument("--retrained", type=Path, help="JSON file in which finished halves are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    retrained = facts_lm.retrained(options.halves, options.retrained)
    results = measured(retrained, options.d, options.seeds)
    print(write("lm_attribution_small", results))


if __name__ == "__main__":
    main()
