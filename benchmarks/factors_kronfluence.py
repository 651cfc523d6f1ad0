"""Are EK-FAC's scores those of Kronfluence? Both libraries on the same models, data, labels and damping, in float64.

    python benchmarks/factors_kronfluence.py     (with the environment that `make peers` makes)

Scores q' (F + λ)⁻¹ x of 32 questions with 256 training rows: labels of the data, λ a tenth of the mean eigenvalue of
each layer. Linear layers without biases, one token a row and eight: Kronfluence counts a bias as one more
input, gradsketch by itself. Writes results/factors_kronfluence.json: the largest difference in units of the
largest score, Pearson's r, and seconds of one run, which show what set-up costs rather than speed.
"""

from __future__ import annotations

import logging
import tempfile
import time
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from record import write
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradsketch as gs

ROWS, QUESTIONS, WIDTH, CLASSES = 256, 32, 24, 5


def main() -> None:
    logging.disable(logging.WARNING)
    results = {}
    for tokens in (1, 8):
        theirs, their_seconds = timed(lambda t=tokens: kronfluence_scores(*problem(t)))
        ours, our_seconds = timed(lambda t=tokens: our_scores(*problem(t)))
        results[f"{tokens} tokens a row"] = {
            "largest difference / largest score": float((ours - theirs).abs().max() / theirs.abs().max()),
            "pearson": float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]),
            "seconds": {"gradsketch": our_seconds, "kronfluence": their_seconds},
        }
        print(results)
    print(write("factors_kronfluence", results))


def problem(tokens: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Return a network of three layers, training rows [N, t, i] with their classes [N, t], and questions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, WIDTH, bias=False),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.Tanh(),
        nn.Linear(WIDTH, CLASSES, bias=False),
    ).double()
    x = torch.randn(ROWS + QUESTIONS, tokens, 12, dtype=torch.float64)
    y = torch.randint(CLASSES, (ROWS + QUESTIONS, tokens))
    return model, x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the sum over its tokens of each row's cross-entropy, [b]."""
    x, y = batch
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape).sum(1)


def our_scores(model: nn.Module, x: Tensor, y: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
    data = list(zip(x, y, strict=True))
    inverse = gs.inverse_fisher(model, losses, data, damping=0.1, labels="empirical")
    chosen = gs.Parameters(model)

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        tensors = [tensor for _, tensor in chosen]
        each = [torch.autograd.grad(losses(model, (x[i : i + 1], y[i : i + 1])).sum(), tensors) for i in range(len(x))]
        return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])

    return gradients(questions, answers) @ inverse(gradients(x, y)).T


class _Task(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return losses(model, batch).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return losses(model, batch).sum()


def kronfluence_scores(model: nn.Module, x: Tensor, y: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
    task = _Task()
    wide = {name: torch.float64 for name in FactorArguments.__dataclass_fields__ if name.endswith("dtype")}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("a", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors(
            "f",
            TensorDataset(x, y),
            per_device_batch_size=64,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True, **wide),
        )
        wide = {name: torch.float64 for name in ScoreArguments.__dataclass_fields__ if name.endswith("dtype")}
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            TensorDataset(questions, answers),
            TensorDataset(x, y),
            per_device_query_batch_size=32,
            per_device_train_batch_size=64,
            score_args=ScoreArguments(damping_factor=None, **wide),
        )
        return analyzer.load_pairwise_scores("s")["all_modules"].double()


def timed(job: Any) -> tuple[Tensor, float]:
    began = time.perf_counter()
    return job(), time.perf_counter() - began


if __name__ == "__main__":
    main()
