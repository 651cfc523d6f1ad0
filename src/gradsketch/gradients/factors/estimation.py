"""The passes over data from which a metric is estimated: moments of both sides first, then squares in their bases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.errors import InputError
from gradsketch.gradients.data import Batches
from gradsketch.gradients.factors.corrected import EigenMoments, Sums
from gradsketch.gradients.factors.eigenbases import ParameterSpectrum, spectrum_of
from gradsketch.gradients.factors.moments import SideMoments
from gradsketch.gradients.factors.passes import Addable, Pass
from gradsketch.gradients.fingerprints import data_facts, model_facts, task_facts
from gradsketch.gradients.parameters import Parameters, Selection, bare, selected
from gradsketch.gradients.per_example.capture import Capture
from gradsketch.gradients.per_example.differentiating import differentiating
from gradsketch.gradients.tasks import Task, TaskLike, as_task
from gradsketch.sketches.block_sum import as_matrix

__all__ = ["DAMPING", "Estimation", "Labels", "Options", "factor_facts"]

Labels = Literal["sampled", "empirical"]
# Of the mean eigenvalue. Before a sketch .01 to .1 scored best by retraining, and .001 worse than either: the more
# directions are kept, the more noise comes with them.
DAMPING = 0.1

_Kept = TypeVar("_Kept", bound=Sums)
_Moments = TypeVar("_Moments", bound=Addable)


_LARGEST_DAMPING = 1e12


@dataclass(frozen=True)
class Options:
    """What decides an estimate besides model, task and data.

    Raises:
        InputError: no such labels, or a damping that is not positive.
    """

    damping: float = DAMPING
    labels: Labels = "sampled"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.labels not in ("sampled", "empirical"):
            raise InputError(f"labels={self.labels!r}", '"sampled" or "empirical"', 'Type labels="sampled"')
        check_damping(self.damping)


def check_damping(damping: float) -> None:
    """Refuse what is no fraction of a mean eigenvalue.

    Raises:
        InputError: it is not positive, or so large that float32 cannot hold an eigenvalue times it.
    """
    if not (isinstance(damping, int | float) and 0 < damping <= _LARGEST_DAMPING):
        raise InputError(
            f"damping={damping!r}",
            f"a positive number up to {_LARGEST_DAMPING:g}",
            f"Type damping={DAMPING}, the default",
        )


class Estimation:
    """Passes over one data set at one state of a model; ``advance`` hears of the examples of every batch."""

    def __init__(
        self,
        model: nn.Module,
        task: TaskLike,
        data: Any,
        parameters: Selection,
        options: Options,
        batch_tokens: int,
        advance: Callable[[int], Any],
    ) -> None:
        self.task, self.options, self.batch_tokens, self.advance = as_task(task), options, batch_tokens, advance
        self.batches, self.parameters = Batches(self.task, data), selected(model, parameters)
        self.tensors, self.model = dict(self.parameters), bare(model)
        self.capture = Capture(self.model, self.task, self.tensors)
        self.examples = 0

    def spectra(self) -> dict[str, ParameterSpectrum]:
        """Return eigenvalues and eigenvectors of both sides of every parameter: one pass."""
        moments = self._pass(lambda: {n: SideMoments(*as_matrix(t.shape)) for n, t in self.capture.tensors.items()})
        self._refuse_vanishing(moments.values())
        with torch.no_grad():
            return {name: spectrum_of(part, self.examples) for name, part in moments.items()}

    def _refuse_vanishing(self, moments: Iterable[SideMoments]) -> None:
        """Refuse gradients whose squares are all zero, as if there were none; beside larger ones they hardly count."""
        shares = [share for part in moments if (share := part.share_of_least) is not None]
        if shares and max(shares) < 1:
            raise InputError(
                "gradients so small that their squares have no digits in this precision",
                "a loss on the scale of its model's numbers",
                "Multiply the loss by a constant, which leaves a metric's scores as they are, or compute in float64",
            )

    def squares(
        self, spectra: dict[str, ParameterSpectrum], keep: Callable[[int, int, Tensor], _Kept]
    ) -> dict[str, EigenMoments[_Kept]]:
        """Return what ``keep`` makes of the squares of gradients in these eigenbases: another pass."""
        return self._pass(lambda: {name: EigenMoments(spectrum, keep) for name, spectrum in spectra.items()})

    def facts(self, method: str) -> dict[str, Any]:
        """Return all that decides the numbers."""
        known = factor_facts(method, self.model, self.task, self.parameters, self.options)
        return known | {"data": data_facts(self.batches)}

    def _pass(self, fresh: Callable[[], dict[str, _Moments]]) -> dict[str, _Moments]:
        seed = None if self.options.labels == "empirical" else self.options.seed
        with evaluating(self.model), differentiating(self.model, self.tensors):
            over = Pass(self.model, self.capture, fresh, seed)
            over.over(self.batches, self.batch_tokens, self.advance)
        self.examples = over.examples
        return over.moments


def factor_facts(method: str, model: nn.Module, task: Task, parameters: Parameters, options: Options) -> dict[str, Any]:
    """Return what decides the numbers of an estimate besides the data."""
    return {
        "method": method,
        "model": model_facts(bare(model)),
        "task": task_facts(task),
        "parameters": list(parameters.names),
        "damping": float(options.damping),
        "labels": "empirical" if options.labels == "empirical" else f"sampled with seed {options.seed}",
    }
