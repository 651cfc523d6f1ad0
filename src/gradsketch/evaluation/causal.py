"""The causal check: remove what was found, train again, ask again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from gradsketch.errors import InputError
from gradsketch.evaluation.retraining import Measure, Train, retrained_losses
from gradsketch.places import as_places
from gradsketch.random import Stream
from gradsketch.report.numbers import groups_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Removal", "removal_check"]


@dataclass(frozen=True, eq=False)
class Removal(Result):
    """Each query's loss under the model trained on everything, without its found rows, and without random ones.

    The three are ``before``, ``after`` and, for each of r draws of as many rows, ``random``. ``removed`` counts the
    rows found for each query, ``models`` the models that were trained.
    ``value`` is the rise of the loss when the found rows go, beyond the rise when as many random rows go, averaged
    over queries; ``standard_error`` takes the queries as a sample (of one query: the spread of the random removals).
    """

    before: Float[Tensor, " q"]
    after: Float[Tensor, " q"]
    random: Float[Tensor, "r q"]
    value: float
    standard_error: float
    removed: tuple[int, ...]
    models: int
    seconds: float

    def summary(self) -> str:
        return (
            f"loss {self.before.mean():.3g} → {self.after.mean():.3g} without the rows found, "
            f"{self.random.mean():.3g} without as many random ones: rise {self.value:.3g} ± {self.standard_error:.2g}"
        )

    def __str__(self) -> str:
        """Return the losses of every query as a table for the terminal."""
        losses = torch.stack([self.before, self.after, self.random.mean(0)], 1).tolist()
        cells = [[str(i), *(f"{loss:.4g}" for loss in row), str(self.removed[i])] for i, row in enumerate(losses)]
        header = ["query", "loss", "without rows found", "without random rows", "rows"]
        return "\n".join([*aligned(header, cells), self.summary()])

    def _figure(self) -> Figure:
        series = {"everything": self.before[None], "without rows found": self.after[None], "random": self.random}
        return groups_figure({name: losses.T.tolist() for name, losses in series.items()}, "loss", "query")


def removal_check(
    train: Train, measure: Measure, n: int, found: Sequence[Sequence[int]], *, controls: int = 3, seed: int = 0
) -> Removal:
    """Train without each query's found rows, and measure how much its loss rises.

    Rows that made the model say something are missed when they go; rows that merely look alike are not. Models that
    would be trained on the same rows are trained once.

    Args:
        train: from rows to a trained model; give it the same seed each time.
        measure: from a model, which is in evaluation mode, to the queries' losses ``[q]``.
        n: number of training rows.
        found: for each query the rows to remove, such as ``[[hit.row for hit in query] for query in hits]``.
        controls: how many times as many random rows are removed instead, for comparison; at least two. Queries of
            several lengths have controls of several lengths, each of which is a model more.
        seed: of the random rows.

    Example:
        >>> y = torch.tensor([5.0] + [0.0] * 19)  # the model is a mean, and row 0 pulls it up
        >>> def train(rows):
        ...     model = torch.nn.Linear(1, 1)
        ...     model.bias.data = y[rows].mean()[None]
        ...     return model
        >>> def measure(model):
        ...     return (model.bias - 5).square()
        >>> gs.removal_check(train, measure, n=20, found=[[0]]).value > 0
        True

    Raises:
        InputError: no query, a row out of range, nothing or everything to remove, or fewer than two controls.
        NonFiniteError: a loss is not a finite number.
    """
    start = time.perf_counter()
    groups = [frozenset(as_places(rows, n, f"query {i}: row")) for i, rows in enumerate(found)]
    _check(groups, n, controls)
    drawn = [Stream(seed, "control", str(j)).permutation(n).tolist() for j in range(controls)]
    # As many as were found for the query: a query of few rows is not held against the loss of many.
    others = [[frozenset(order[: len(group)]) for group in groups] for order in drawn]
    losses = {}
    plan = list(dict.fromkeys([frozenset[int](), *groups, *(group for draw in others for group in draw)]))
    for gone in tqdm(plan, desc="retraining", unit="model", disable=None):
        rows = [row for row in range(n) if row not in gone]
        losses[gone] = retrained_losses(train, measure, rows, f"{n - len(gone)} of {n} rows")
    before = losses[frozenset[int]()]
    if len(before) != len(groups):
        raise InputError(
            f"rows to remove for {len(groups)} queries, losses of {len(before)}",
            "as many losses as queries",
            "Measure the queries that were asked",
        )
    after = torch.stack([losses[group][i] for i, group in enumerate(groups)])
    random = torch.stack([torch.stack([losses[group][i] for i, group in enumerate(draw)]) for draw in others])
    value, error = _rise(after, random)
    return Removal(before, after, random, value, error, tuple(map(len, groups)), len(plan), time.perf_counter() - start)


def _rise(after: Float[Tensor, " q"], random: Float[Tensor, "r q"]) -> tuple[float, float]:
    rises = after - random.mean(0)
    if len(rises) > 1:
        return float(rises.mean()), float(rises.std() / len(rises) ** 0.5)
    return float(rises.mean()), float(random.std() * (1 + 1 / len(random)) ** 0.5)


def _check(groups: list[frozenset[int]], n: int, controls: int) -> None:
    for i, group in enumerate(groups):
        if not 0 < len(group) < n:
            raise InputError(
                f"query {i} with {len(group)} rows to remove",
                f"at least one row and not all, from 0 to {n - 1}",
                "Pass [[hit.row for hit in query] for query in hits]",
            )
    if not groups or not isinstance(controls, Integral) or controls < 2:
        raise InputError(
            f"{len(groups)} queries and {controls!r} controls", "at least one query and two controls", "Type controls=3"
        )
