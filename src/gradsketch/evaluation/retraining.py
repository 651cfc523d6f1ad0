"""Training again on part of the data, and asking the same questions: the ground truth of attribution."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from gradsketch.as_found import evaluating
from gradsketch.durable import read_record, require_same, write_record
from gradsketch.errors import InputError, NonFiniteError
from gradsketch.gradients.fingerprints import code_digest
from gradsketch.random import Stream
from gradsketch.report.numbers import groups_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Measure", "Retrainings", "Train", "retrain_on_subsets", "retrained_losses"]

# From the rows to train on, in increasing order, to a trained model: the same rows must give the same model.
Train = Callable[[list[int]], nn.Module]
# From a model, in evaluation mode, to the loss of each query, [q].
Measure = Callable[[nn.Module], Float[Tensor, " q"]]


@dataclass(frozen=True, eq=False)
class Retrainings(Result):
    """What m models trained on random subsets say: the rows each one ``kept``, and each query's ``losses`` under it.

    ``seconds`` is what training and asking took, of this run only where another one began it.
    """

    kept: Bool[Tensor, "m n"]
    losses: Float[Tensor, "m q"]
    seconds: float

    def summary(self) -> str:
        (m, n), q = self.kept.shape, self.losses.shape[1]
        return f"{m} models, each trained on {int(self.kept[0].sum())} of {n} rows, {q} queries ({self.seconds:.0f} s)"

    def __str__(self) -> str:
        """Return mean and spread of every query's loss as a table for the terminal."""
        spread = torch.stack([self.losses.mean(0), self.losses.std(0)], 1).tolist()
        cells = [[str(i), *(f"{number:.4g}" for number in row)] for i, row in enumerate(spread)]
        return "\n".join([*aligned(["query", "mean loss", "standard deviation"], cells), self.summary()])

    def _figure(self) -> Figure:
        return groups_figure({"one model each": self.losses.T.tolist()}, "loss", "query")


def retrain_on_subsets(
    train: Train,
    measure: Measure,
    n: int,
    *,
    subsets: int = 50,
    fraction: float = 0.5,
    seed: int = 0,
    path: str | Path | None = None,
) -> Retrainings:
    """Train on random subsets of the ``n`` training rows and measure every query's loss under each model.

    Subsets are drawn without replacement, each from its own random stream, so that more of them extend fewer. With
    ``path``, a JSON file, finished subsets are kept and the same call goes on where it was interrupted.

    Args:
        train: from rows to a trained model; give it the same seed each time.
        measure: from a model, which is in evaluation mode, to the queries' losses ``[q]``.
        n: number of training rows.
        subsets: how many models; the error of a score shrinks like 1/√subsets.
        fraction: share of the rows in each subset.
        seed: of the subsets.
        path: where finished subsets are kept, for the same code of ``train`` and ``measure``; lists and models that
            these read are not looked into, so take another file where such a thing changes.

    Example:
        >>> y = torch.randn(20)
        >>> def train(rows):
        ...     model = torch.nn.Linear(1, 1)
        ...     model.bias.data = y[rows].mean()[None]
        ...     return model
        >>> def measure(model):
        ...     return (model.bias - y[:3]).square()
        >>> gs.retrain_on_subsets(train, measure, n=20, subsets=5).losses.shape
        torch.Size([5, 3])

    Raises:
        InputError: fewer than two subsets, or subsets that are empty or everything; losses that are not one a query.
        NonFiniteError: a loss is not a finite number.
        FingerprintError: the file holds subsets that were drawn otherwise, or what other code made of them.
    """
    size = round(fraction * n) if math.isfinite(fraction) else 0
    if not 0 < size < n or not isinstance(subsets, Integral) or subsets < 2:
        raise InputError(
            f"{subsets} subsets of {size} of {n} rows",
            "at least 2 subsets, each smaller than the data and not empty",
            "Type subsets=50, fraction=0.5",
        )
    start = time.perf_counter()
    drawn = [Stream(seed, "subset", str(j)).permutation(n)[:size].sort().values for j in range(subsets)]
    decides = {"train": code_digest(train), "measure": code_digest(measure)}
    log = _Log(path, {"n": n, "fraction": fraction, "seed": seed, **decides})
    for j in tqdm(range(len(log.losses), subsets), desc="retraining", unit="model", disable=None):
        log.append(retrained_losses(train, measure, drawn[j].tolist(), f"subset {j}").tolist(), j)
    kept = torch.zeros(subsets, n, dtype=torch.bool, device="cpu")
    for j, rows in enumerate(drawn):
        kept[j, rows] = True
    losses = torch.tensor(log.losses[:subsets], dtype=torch.float64, device="cpu")
    return Retrainings(kept, losses, time.perf_counter() - start)


def retrained_losses(train: Train, measure: Measure, rows: Sequence[int], name: str) -> Float[Tensor, " q"]:
    """Return the queries' losses under a model trained on ``rows``, in float64 on the CPU.

    The model is in evaluation mode while it is asked, so that no dropout stands between two models.

    Raises:
        InputError: what was measured is not one number a query.
        NonFiniteError: one is not finite; ``name`` says of which model.
    """
    model = train(list(rows))
    with torch.no_grad(), evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        came = measure(model)
    if not isinstance(came, Tensor) or came.ndim != 1 or not len(came) or came.is_complex():
        shape = f" of {came.dtype}, {list(came.shape)}" if isinstance(came, Tensor) else ""
        raise InputError(
            f"losses of type {type(came).__name__}{shape} under the model of {name}",
            "a tensor of one loss a query, [q]",
            "Return torch.stack of the queries' losses",
        )
    losses = came.detach().double().cpu()
    if not torch.isfinite(losses).all():
        raise NonFiniteError(
            f"the loss of query {int((~torch.isfinite(losses)).nonzero()[0])} under the model of {name} is not finite",
            "a training run that converges on every subset",
            "Lower the learning rate, or keep more rows",
        )
    return losses


class _Log:
    """Losses of finished subsets, in memory and in a file that is replaced whole after each."""

    def __init__(self, path: str | Path | None, facts: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.facts, self.losses = facts, list[list[float]]()
        if self.path is not None and self.path.exists():
            stored = read_record(self.path)
            self.losses = stored.pop("losses", [])
            require_same(facts, stored, self.path)

    def append(self, losses: list[float], subset: int) -> None:
        if self.losses and len(losses) != len(self.losses[0]):
            kept = "" if self.path is None else f", or take another file than {self.path}"
            raise InputError(
                f"losses of {len(losses)} queries under the model of subset {subset}",
                f"of {len(self.losses[0])}, as under those before it",
                f"Measure the same queries under every model{kept}",
            )
        self.losses.append(losses)
        if self.path is not None:
            write_record(self.path, {**self.facts, "losses": self.losses})
