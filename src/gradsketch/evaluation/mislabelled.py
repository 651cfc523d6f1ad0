"""Finding wrong labels: area under the ROC curve, always next to that of the plain training loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.report.numbers import numbers_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AreaUnderCurve", "Mislabelled", "mislabelled_auc"]


@dataclass(frozen=True)
class AreaUnderCurve:
    """The chance that a wrong label is ranked above a right one, with its standard error.

    ``precision`` is the share of wrong labels among as many examples as there are wrong labels, most suspicious first;
    of examples that are equally suspicious at the end of that list, the mean over their orders.
    """

    value: float
    standard_error: float
    precision: float


@dataclass(frozen=True, eq=False)
class Mislabelled(Result):
    """How well a ``suspicion`` finds wrong labels, and how well the training ``loss`` alone does.

    ``wrong`` of the ``examples`` have a wrong label. ``difference`` is suspicion minus loss, and
    ``difference_standard_error`` counts both as measured on the same examples.
    """

    suspicion: AreaUnderCurve
    loss: AreaUnderCurve
    difference: float
    difference_standard_error: float
    wrong: int
    examples: int

    def summary(self) -> str:
        s, b = self.suspicion, self.loss
        return (
            f"AUC {s.value:.4f} ± {s.standard_error:.4f}, plain loss {b.value:.4f} ± {b.standard_error:.4f} "
            f"({self.wrong} wrong labels among {self.examples})"
        )

    def __str__(self) -> str:
        """Return both rankings and their difference as a table for the terminal."""
        named = {"suspicion": self.suspicion, "plain loss": self.loss}
        cells = [
            [name, *(f"{number:.4f}" for number in (a.value, a.standard_error, a.precision))]
            for name, a in named.items()
        ]
        cells += [["difference", f"{self.difference:.4f}", f"{self.difference_standard_error:.4f}", ""]]
        return "\n".join([*aligned(["", "AUC", "standard error", "precision"], cells), self.summary()])

    def _figure(self) -> Figure:
        areas = {"suspicion": self.suspicion, "plain loss": self.loss}
        named = {n: (a.value, a.value - a.standard_error, a.value + a.standard_error) for n, a in areas.items()}
        return numbers_figure(named, "AUC ± standard error", at=0.5)


def mislabelled_auc(
    suspicion: Float[Tensor, " n"], loss: Float[Tensor, " n"], wrong: Bool[Tensor, " n"]
) -> Mislabelled:
    """Compare a suspicion (larger = more likely wrong), such as self-influence, with the training loss.

    Standard errors by DeLong, DeLong and Clarke-Pearson 1988, equations 3–6: exact in form, whatever the distributions.

    Example:
        >>> wrong = torch.tensor([True, True, False, False])
        >>> result = gs.mislabelled_auc(torch.tensor([0.9, 0.8, 0.1, 0.2]), torch.tensor([0.9, 0.1, 0.2, 0.3]), wrong)
        >>> result.suspicion.value, result.loss.value
        (1.0, 0.5)

    Raises:
        InputError: fewer than two wrong or two right labels, a value that is not a number, or tensors of other shapes.
    """
    if not all(isinstance(values, Tensor) for values in (suspicion, loss, wrong)):
        kinds = ", ".join(type(values).__name__ for values in (suspicion, loss, wrong))
        raise InputError(f"suspicion, loss and wrong of types {kinds}", "three tensors", "Type torch.as_tensor(...)")
    if wrong.dtype != torch.bool or not suspicion.shape == loss.shape == wrong.shape == (len(wrong),):
        raise InputError(
            f"suspicion, loss and wrong of shapes {list(suspicion.shape)}, {list(loss.shape)} and {list(wrong.shape)}, "
            f"wrong of {wrong.dtype}",
            "three of shape [n], the last of torch.bool",
            "Type wrong.bool(), which is not a list of places",
        )
    for name, values in (("suspicion", suspicion), ("loss", loss)):
        if torch.isnan(values).any():
            place = int(torch.isnan(values).nonzero()[0])
            raise InputError(f"{name} {place} is not a number", "one number an example", "Score every example")
    if min(int(wrong.sum()), int((~wrong).sum())) < 2:
        raise InputError(
            f"{int(wrong.sum())} wrong labels among {len(wrong)}",
            "at least two wrong and two right labels",
            "Flip more labels",
        )
    curves = [_placements(values.detach().double().cpu(), wrong.cpu()) for values in (suspicion, loss)]
    areas = [
        AreaUnderCurve(float(above.mean()), _standard_error(above, below), _precision(values, wrong))
        for (above, below), values in zip(curves, (suspicion, loss), strict=True)
    ]
    paired = _standard_error(curves[0][0] - curves[1][0], curves[0][1] - curves[1][1])
    return Mislabelled(areas[0], areas[1], areas[0].value - areas[1].value, paired, int(wrong.sum()), len(wrong))


def _placements(values: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each wrong example, the share of right ones below it; for each right one, of wrong ones above it."""
    return _share_below(values[wrong], values[~wrong]), 1 - _share_below(values[~wrong], values[wrong])


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Return for each value the share of others that are smaller, ties counted half."""
    ordered = others.sort().values
    below, not_above = (torch.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (below + not_above).double() / (2 * len(others))


def _standard_error(above: Tensor, below: Tensor) -> float:
    return math.sqrt(float(above.var() / len(above) + below.var() / len(below)))


def _precision(values: Tensor, wrong: Tensor) -> float:
    """Return the precision; a tie is shared out, because the order of the data is no suspicion."""
    values, wrong = values.detach().cpu(), wrong.cpu()
    count = int(wrong.sum())
    last = values.sort(descending=True).values[count - 1]
    above, tied = values > last, values == last
    room = (count - int(above.sum())) / int(tied.sum())
    return (int((wrong & above).sum()) + room * int((wrong & tied).sum())) / count
