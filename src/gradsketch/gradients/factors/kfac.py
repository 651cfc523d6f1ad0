"""K-FAC and EK-FAC: Kronecker-factored approximations of the Fisher matrix, by the capture that also makes sketches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from gradsketch.as_found import evaluating
from gradsketch.errors import InputError
from gradsketch.gradients.data import Batches
from gradsketch.gradients.factors.corrected import EigenMoments
from gradsketch.gradients.factors.eigenbases import damped_roots, spectrum_of
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.factors.moments import SideMoments
from gradsketch.gradients.factors.passes import Pass
from gradsketch.gradients.fingerprints import data_facts, model_facts, task_facts
from gradsketch.gradients.parameters import Parameters, Selection, bare, selected
from gradsketch.gradients.per_example.capture import Capture
from gradsketch.gradients.per_example.differentiating import differentiating
from gradsketch.gradients.tasks import Task, TaskLike, as_task
from gradsketch.sketches.block_sum import as_matrix

__all__ = ["DAMPING", "Labels", "ekfac", "factor_facts", "kfac"]

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
    options = _Options(damping, labels, seed)
    return _estimated("kfac", model, task, data, parameters, options, batch_tokens, advance)


def ekfac(
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
    """Estimate K-FAC factors whose eigenvalues are corrected by a second pass over the data.

    EK-FAC keeps the eigenbases U of S and V of A, and measures Λ_ij = E (Uᵀ X V)_ij² there, positions of an example
    added up first. Here Λ is taken for r_i c_j / ΣΛ with its own sums over rows and columns, which acts on a layer's
    factors and so on a sketch: X ↦ U (r + λ_r)^(−1/2) Uᵀ X V (c + λ_c)^(−1/2) Vᵀ √ΣΛ. The second pass forms each
    example's gradient, matrix by matrix, and costs about as much as vmap.

    The arguments are those of :func:`kfac`; ``advance`` hears of every example twice.

    Source: T. George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS
    2018; R. Grosse et al., "Studying Large Language Model Generalization with Influence Functions", 2023.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> gs.ekfac(model, task, [(torch.randn(20), i % 2) for i in range(32)]).method
        'ekfac'

    Raises:
        InputError, NonFiniteError: as ``kfac``.
    """
    options = _Options(damping, labels, seed)
    return _estimated("ekfac", model, task, data, parameters, options, batch_tokens, advance)


@dataclass(frozen=True)
class _Options:
    damping: float
    labels: Labels
    seed: int


def _estimated(
    method: str,
    model: nn.Module,
    task: TaskLike,
    data: Any,
    parameters: Selection,
    options: _Options,
    batch_tokens: int,
    advance: Callable[[int], Any],
) -> Factors:
    """Run one pass for the factors and, where they are to be corrected, another in their eigenbases."""
    began, task = time.perf_counter(), as_task(task)
    _check(options)
    batches, chosen = Batches(task, data), selected(model, parameters)
    tensors, model = dict(chosen), bare(model)
    capture, seed = Capture(model, task, tensors), None if options.labels == "empirical" else options.seed
    first = Pass(
        model, capture, lambda: {n: SideMoments(*as_matrix(t.shape)) for n, t in capture.tensors.items()}, seed
    )
    with evaluating(model), differentiating(model, tensors):
        first.over(batches, batch_tokens, advance)
        with torch.no_grad():
            spectra = {name: spectrum_of(part, first.examples) for name, part in first.moments.items()}
        if method == "ekfac":
            second = Pass(model, capture, lambda: {n: EigenMoments(s) for n, s in spectra.items()}, seed)
            second.over(batches, batch_tokens, advance)
            spectra = {name: part.corrected(second.examples) for name, part in second.moments.items()}
    with torch.no_grad():
        roots = damped_roots(spectra, options.damping, next(iter(tensors.values())).dtype)
    facts = factor_facts(method, model, task, chosen, **asdict(options)) | {"data": data_facts(batches)}
    return Factors(method, roots, facts, first.examples, time.perf_counter() - began)


def factor_facts(
    method: str,
    model: nn.Module,
    task: Task,
    parameters: Parameters,
    *,
    damping: float = DAMPING,
    labels: Labels = "sampled",
    seed: int = 0,
) -> dict[str, Any]:
    """Return what decides the numbers of an estimate besides the data."""
    return {
        "method": method,
        "model": model_facts(bare(model)),
        "task": task_facts(task),
        "parameters": list(parameters.names),
        "damping": float(damping),
        "labels": labels if labels == "empirical" else f"sampled with seed {seed}",
    }


def _check(options: _Options) -> None:
    damping, labels = options.damping, options.labels
    if labels not in ("sampled", "empirical"):
        raise InputError(f"labels={labels!r}", '"sampled" or "empirical"', 'Type labels="sampled"')
    if not (isinstance(damping, int | float) and math.isfinite(damping) and damping > 0):
        raise InputError(f"damping={damping!r}", "a positive number", f"Type damping={DAMPING}, the default")
