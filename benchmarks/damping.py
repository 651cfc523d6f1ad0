"""Which λ ranks rows best? Ridge, influence and exact EK-FAC on digits, by retraining on random halves.

    python benchmarks/damping.py            # five minutes on one core

The network, the halves and the questions are those of attribution_quality.py. Writes benchmarks/results/damping.json:
the linear datamodeling score (LDS) by λ, a fraction of F's mean eigenvalue, of sketches with d = 1,024, plain and in
the metric of K-FAC, for one model and for five, and of whole gradients by EK-FAC. lm_attribution.py does the same for a
language model.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import attribution_quality as digits
import torch
from record import table, write
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.demo.digits import flipped_digits

LAMBDAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
EXACT = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SUBSETS, MODELS, D = 80, 5, 1024


def main() -> None:
    torch.set_num_threads(1)
    train, test = flipped_digits()
    train, questions = train[: digits.TRAIN], test[: digits.QUERIES]
    retrained = gs.retrain_on_subsets(
        lambda rows: digits.trained([train[row] for row in rows]),
        lambda model: digits.TASK.losses(model, digits.TASK.collate(questions)),
        digits.TRAIN,
        subsets=SUBSETS,
    )

    def lds(scores: Tensor) -> float:
        return gs.linear_datamodeling_score(scores.double(), retrained).value

    models, entries = [digits.trained(train, seed) for seed in range(MODELS)], []
    for group in (models[:1], models):
        for metric in (None, "kfac"):
            with tempfile.TemporaryDirectory() as folder:
                index = built(folder, group, train, metric, D)
                for score in ("ridge", "influence"):
                    found = {
                        f"{rate:g}": lds(index.scores(group[0], questions, score=score, damping=rate))
                        for rate in LAMBDAS
                    }
                    entries.append({"models": len(group), "metric": metric, "score": score, "lds": found})
                    print(json.dumps(entries[-1]), flush=True)
    for exact in ("ekfac", "empirical-ekfac"):
        with tempfile.TemporaryDirectory() as folder:
            index = built(folder, models[:1], train, None, 256)
            found = {f"{rate:g}": lds(whole(index, models[0], questions, train, exact, rate)) for rate in EXACT}
        entries.append({"models": 1, "metric": None, "score": exact, "lds": found})
        print(json.dumps(entries[-1]), flush=True)
    print(write("damping", {"rows": len(train), "questions": len(questions), "halves": SUBSETS, "table": entries}))


def built(folder: str, models: list[nn.Module], train: list[Any], metric: str | None, d: int) -> gs.Index:
    states = [model.state_dict() for model in models]
    options: dict[str, Any] = {"d": d, "checkpoints": states, "precondition": metric, "progress": False}
    return gs.build_index(folder, models[0], digits.TASK, train, **options)


def whole(index: gs.Index, model: nn.Module, questions: list[Any], train: list[Any], exact: str, rate: float) -> Tensor:
    """Return the exact scores of all rows."""
    every = len(train)
    return table(index.query(model, questions, k=every, rerank=every, exact=exact, damping=rate, data=train))


if __name__ == "__main__":
    main()
