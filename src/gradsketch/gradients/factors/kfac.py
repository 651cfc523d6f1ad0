"""K-FAC and EK-FAC: Kronecker-factored approximations of the Fisher matrix, by the capture that also makes sketches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradsketch.gradients.factors.corrected import Margins, corrected
from gradsketch.gradients.factors.eigenbases import damped_roots
from gradsketch.gradients.factors.estimation import DAMPING, Estimation, Labels, Options
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import TaskLike

__all__ = ["ekfac", "kfac"]


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
        InputError: a task that cannot draw labels, a damping that is not positive or beyond the weights' precision, or
            as ``GradientSketcher``.
        NonFiniteError: a gradient is not finite.
    """
    options = Options(damping, labels, seed)
    return _estimated("kfac", Estimation(model, task, data, parameters, options, batch_tokens, advance))


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
    options = Options(damping, labels, seed)
    return _estimated("ekfac", Estimation(model, task, data, parameters, options, batch_tokens, advance))


def _estimated(method: str, estimation: Estimation) -> Factors:
    """Run one pass for the factors and, where they are to be corrected, another in their eigenbases."""
    began = time.perf_counter()
    spectra = estimation.spectra()
    if method == "ekfac":
        squares = estimation.squares(spectra, Margins)
        spectra = {name: corrected(part, estimation.examples) for name, part in squares.items()}
    with torch.no_grad():
        dtypes = {name: tensor.dtype for name, tensor in estimation.tensors.items()}
        roots = damped_roots(spectra, estimation.options.damping, dtypes)
    return Factors(method, roots, estimation.facts(method), estimation.examples, time.perf_counter() - began)
