"""K-FAC: a Kronecker-factored approximation of the Fisher matrix, by the capture that also makes sketches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.errors import InputError, NonFiniteError
from gradsketch.gradients.data import Batcher, Batches, batch_length, to_device
from gradsketch.gradients.factors.damped import damped_roots
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.factors.labels import Draws
from gradsketch.gradients.factors.moments import SideMoments
from gradsketch.gradients.fingerprints import data_facts, model_facts, task_facts
from gradsketch.gradients.parameters import Parameters, Selection, bare, selected
from gradsketch.gradients.per_example.capture import Capture
from gradsketch.gradients.per_example.contributions import Consumer, Contribution
from gradsketch.gradients.per_example.differentiating import differentiating
from gradsketch.gradients.tasks import Batch, Task, TaskLike, as_task
from gradsketch.sketches.block_sum import as_matrix

__all__ = ["DAMPING", "Labels", "kfac", "kfac_facts"]

Labels = Literal["sampled", "empirical"]
# Of the mean eigenvalue. Before a sketch .01 to .1 scored best by retraining, and .001 worse than either: the more
# directions are kept, the more noise comes with them.
DAMPING = 0.1


def kfac(
    model: nn.Module,
    task: TaskLike,
    data: Any,
    *,
    parameters: Selection = None,
    damping: float = DAMPING,
    labels: Labels = "sampled",
    seed: int = 0,
    batch_tokens: int = 4096,
    advance: Callable[[int], Any] = lambda count: None,
) -> Factors:
    """Estimate the K-FAC factors of the Fisher matrix: one forward and backward pass over the data.

    A weight's gradient is X = Σ_t g_t a_tᵀ over positions t, and F ≈ S ⊗ A / T̄ with S = E Σ_t g_t g_tᵀ, A = E Σ_t a_t
    a_tᵀ and T̄ positions an example. Its root maps X to (S + λ_S I)^(−1/2) X (A + λ_A I)^(−1/2) √T̄. Norms and biases get
    the diagonal of F, as exact as the sample. So does a side of more than 4,096 entries, and the vocabulary of an
    embedding. A weight that is used in several ways (a tied head, a convolution's patches) counts all of them, and each
    expert of a stack has factors of its own.

    Args:
        model: left as it was found; used in evaluation mode.
        task: a Task, or a function (model, batch) → losses [b].
        data: as for ``hessian``: raw examples, one batch, or a DataLoader that does not shuffle. Some hundreds of
            examples are enough.
        parameters: the selection, or globs of names; by default all that are trainable.
        damping: λ as a fraction of the mean eigenvalue, for each parameter; each side gets its square root.
        labels: "sampled" draws them from the model's own distribution, as the Fisher matrix is defined; "empirical"
            takes those of the data, for losses that are no log-likelihood.
        seed: of the drawn labels.
        batch_tokens: tokens a batch, padding included, where the data are raw examples.
        advance: called with the number of examples of each batch that is done.

    Source: J. Martens and R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
    2015; R. Grosse and J. Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016;
    the sum over positions: R. Eschenhagen et al., NeurIPS 2023, "expand".

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> factors = gs.kfac(model, task, data)
        >>> phi = gs.BlockSum(gs.Parameters(model), 32)
        >>> gs.sketch_gradients(model, task, task.collate(data), phi, precondition=factors).shape
        torch.Size([32, 32])

    Raises:
        InputError: a task that cannot draw labels, a damping that is not positive, or as ``GradientSketcher``.
        NonFiniteError: a gradient is not finite.
    """
    began, task = time.perf_counter(), as_task(task)
    batches = Batches(task, data)
    if labels not in ("sampled", "empirical"):
        raise InputError(f"labels={labels!r}", '"sampled" or "empirical"', 'Type labels="sampled"')
    if not (isinstance(damping, int | float) and math.isfinite(damping) and damping > 0):
        raise InputError(f"damping={damping!r}", "a positive number", f"Type damping={DAMPING}, the default")
    tensors = dict(selected(model, parameters))
    work = _Pass(bare(model), Capture(bare(model), task, tensors), seed if labels == "sampled" else None)
    with evaluating(model), differentiating(bare(model), tensors):
        for count in _mapped(work, batches, batch_tokens):
            advance(count)
    facts = kfac_facts(model, task, selected(model, parameters), damping=damping, labels=labels, seed=seed)
    facts["data"] = data_facts(batches)
    _check_finite(work.moments)
    with torch.no_grad():
        roots = damped_roots(work.moments, work.examples, damping, next(iter(tensors.values())).dtype)
    return Factors("kfac", roots, facts, work.examples, time.perf_counter() - began)


def kfac_facts(
    model: nn.Module,
    task: Task,
    parameters: Parameters,
    *,
    damping: float = DAMPING,
    labels: Labels = "sampled",
    seed: int = 0,
) -> dict[str, Any]:
    """Return what decides the numbers of ``kfac`` besides the data."""
    return {
        "method": "kfac",
        "model": model_facts(bare(model)),
        "task": task_facts(task),
        "parameters": list(parameters.names),
        "damping": float(damping),
        "labels": labels if labels == "empirical" else f"sampled with seed {seed}",
    }


class _Pass:
    """Adds batch after batch up."""

    def __init__(self, model: nn.Module, capture: Capture, seed: int | None) -> None:
        self.model, self.capture, self.seed = model, capture, seed
        self.moments = _moments_of(capture)
        self.examples = 0

    def __call__(self, batch: Batch, places: list[int]) -> None:
        if self.seed is not None:
            with torch.no_grad():
                batch = self.capture.task.sampled(self.model, batch, Draws(self.seed, places))
        attempt: list[_OneBatch] = []

        def begin() -> Consumer:
            attempt[:] = [_OneBatch(self.capture, batch_length(batch))]
            return attempt[0]

        losses = self.capture(batch, begin)
        attempt[0].finish()
        for name, moments in attempt[0].moments.items():
            self.moments[name].merge(moments)
        self.examples += len(losses)


class _OneBatch:
    """Moments of one batch, and the gradients of its vectors, which add up over their uses before they are squared."""

    def __init__(self, capture: Capture, count: int) -> None:
        self.moments, self._count = _moments_of(capture), count
        self._vectors: dict[str, Tensor] = {}
        self._tensors = capture.tensors

    def __call__(self, name: str, contribution: Contribution, which: slice) -> None:
        tensor = self._tensors[name]
        if tensor.ndim > 1:
            contribution.measure(self.moments[name])
            return
        gradient = contribution.dense(1, tensor.numel()).flatten(1)
        if name not in self._vectors:
            self._vectors[name] = gradient.new_zeros(self._count, tensor.numel())
        self._vectors[name][which] += gradient

    def finish(self) -> None:
        for name, gradient in self._vectors.items():
            self.moments[name].add_gradient(gradient)


def _moments_of(capture: Capture) -> dict[str, SideMoments]:
    return {name: SideMoments(*as_matrix(tensor.shape)) for name, tensor in capture.tensors.items()}


def _mapped(work: _Pass, batches: Batches, tokens: int) -> Iterator[int]:
    """Work through the data, in batches as large as memory takes where they are made here; yield their sizes."""
    device = next(iter(work.capture.tensors.values())).device
    if batches.is_raw:
        batcher = Batcher(batches.task, tokens=tokens, device=device)
        yield from (len(places) for places, _ in batcher.map_placed(work, batches.data))
        return
    start = 0
    for batch in batches:
        count = batch_length(batch)
        work(to_device(batch, device), list(range(start, start + count)))
        start += count
        yield count


def _check_finite(moments: dict[str, SideMoments]) -> None:
    for name, part in moments.items():
        if not part.is_finite:
            raise NonFiniteError(
                f"the gradients of {name} are not finite for an example of the data",
                "finite gradients",
                "Sketch them with sketch_gradients, which names the example",
            )
