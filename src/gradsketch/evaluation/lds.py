"""Linear datamodeling score: do summed scores predict what models trained on part of the data say?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.evaluation.retraining import Retrainings
from gradsketch.random import Stream
from gradsketch.report.numbers import ranked_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LinearDatamodelingScore", "linear_datamodeling_score"]

_RESAMPLES = 200
_ENOUGH = 0.9  # of the draws must have a correlation


@dataclass(frozen=True, eq=False)
class LinearDatamodelingScore(Result):
    """Mean Spearman correlation over the queries, between −1 and 1: 0 is chance.

    ``per_query`` has each query's, over ``subsets`` models.
    ``standard_error`` is that of a bootstrap over both queries and subsets (200 draws), which are shared by all
    queries; NaN for fewer than four subsets. ``seconds`` is what the retraining took.
    """

    value: float
    standard_error: float
    per_query: tuple[float, ...]
    subsets: int
    seconds: float

    def summary(self) -> str:
        return (
            f"LDS {self.value:.3f} ± {self.standard_error:.3f} ({len(self.per_query)} queries, {self.subsets} models)"
        )

    def __str__(self) -> str:
        """Return the correlation of every query as a table for the terminal."""
        cells = [[str(i), f"{value:.3f}"] for i, value in enumerate(self.per_query)]
        return "\n".join([*aligned(["query", "correlation"], cells), self.summary()])

    def _figure(self) -> Figure:
        return ranked_figure(self.per_query, "Spearman correlation", "query", mean=self.value)


def linear_datamodeling_score(
    scores: Float[Tensor, "q n"], retrainings: Retrainings, *, seed: int = 0
) -> LinearDatamodelingScore:
    """Correlate, over subsets, the sum of the kept rows' scores with minus the query's loss.

    Park et al. 2023 (TRAK), definition 2.3, with the loss for the model's output and the sign of this library: a
    positive score means that training on the row lowers the query's loss.

    Args:
        scores: of every training row for every query.
        retrainings: from :func:`retrain_on_subsets`, with the same queries in the same order.
        seed: of the bootstrap.

    Example:
        >>> y = torch.randn(20)  # the model is a mean of y; a query's loss is its distance from 0
        >>> def train(rows):
        ...     model = torch.nn.Linear(1, 1)
        ...     model.bias.data = y[rows].mean()[None] + 5
        ...     return model
        >>> def measure(model):
        ...     return model.bias.square()
        >>> retrainings = gs.retrain_on_subsets(train, measure, n=20, subsets=10)
        >>> round(gs.linear_datamodeling_score(-y[None], retrainings).value, 3)
        1.0

    Raises:
        InputError: shapes differ, a score is not finite, or a query's predictions or losses are all equal, so that
            nothing correlates.
    """
    (m, n), q = retrainings.kept.shape, retrainings.losses.shape[1]
    if scores.shape != (q, n):
        raise InputError(
            f"scores of shape {list(scores.shape)}", f"[{q}, {n}]: {q} queries, {n} training rows", "Score every row"
        )
    if not bool(torch.isfinite(scores).all()):
        query, row = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise InputError(
            f"the score of row {row} for query {query} is {float(scores[query, row])}",
            "a finite score of every row",
            "Rows that an index left out have none: retrain without them too, or score them 0",
        )
    predicted = _predicted(retrainings.kept, scores)
    actual = -retrainings.losses.numpy()
    _refuse_constant(predicted, "summed scores")
    _refuse_constant(actual, "losses")
    per_query = _spearman(predicted, actual)
    stream = Stream(seed, "lds bootstrap")
    subsets = stream.child("subsets").integers(0, _RESAMPLES * m, m).view(_RESAMPLES, m).numpy()
    queries = stream.child("queries").integers(0, _RESAMPLES * q, q).view(_RESAMPLES, q).numpy()
    draws = [_spearman(predicted[rows], actual[rows])[columns] for rows, columns in zip(subsets, queries, strict=True)]
    error = _spread(draws)
    return LinearDatamodelingScore(float(per_query.mean()), error, tuple(per_query.tolist()), m, retrainings.seconds)


def _spread(draws: Sequence[np.ndarray]) -> float:
    """Return the standard deviation of the draws' means; NaN where too many drew one subset alone."""
    means = [np.nanmean(values) for values in draws if np.isfinite(values).any()]
    return float(np.std(means, ddof=1)) if len(means) > _ENOUGH * len(draws) else math.nan


def _predicted(kept: Bool[Tensor, "m n"], scores: Float[Tensor, "q n"]) -> np.ndarray:
    return (kept.double() @ scores.detach().double().cpu().T).numpy()


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the rank correlation of each column, NaN where one of the two is constant."""
    ranks = [rankdata(values, axis=0) for values in (x, y)]
    x, y = (values - values.mean(0) for values in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0)))


def _refuse_constant(values: np.ndarray, what: str) -> None:
    constant = np.flatnonzero(np.ptp(values, axis=0) == 0)
    if len(constant):
        raise InputError(
            f"the {what} of query {constant[0]} are the same for every subset",
            "queries and scores that depend on the training data",
            "Drop the query, or check that every row was scored",
        )
