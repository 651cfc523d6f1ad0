"""From a tridiagonal matrix to eigenvalues: residuals, error bounds, and copies told from multiplicities.

Copies ("ghosts") are recognised in sketches of the Krylov vectors: in order of convergence a Ritz vector is kept if at
least half its squared length lies outside the span of those kept before. Against the Cullum–Willoughby test on T alone
this needs no tolerance, also catches copies still on their way, and keeps second eigenvectors of repeated eigenvalues.
A multiplicity found is a lower bound. Nothing is re-orthogonalised from sketches: their inner products are noisy at
1/√d, so loss of orthogonality shows long after it could have been prevented.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.linalg import eigh_tridiagonal

from gradsketch.spectra.krylov import KrylovBasis

__all__ = ["RitzPairs", "ritz_pairs"]


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs (θ, y = Q s), descending.

    Residuals are norms ‖H y − θ y‖ for ‖y‖ = 1, which bound |θ − λ| for an eigenvalue λ; column i of ``coefficients``
    is s, scaled so that ‖y‖ = 1; ``columns`` says which eigenvectors of T they are.
    """

    values: Float[np.ndarray, " r"]
    residuals: Float[np.ndarray, " r"]
    coefficients: Float[np.ndarray, "m r"]
    columns: Int[np.ndarray, " r"]
    copies: int


def ritz_pairs(alphas: list[float], betas: list[float], basis: KrylovBasis, noise: float = 0.0) -> RitzPairs:
    """Return the eigenpairs of T = tridiag(β, α, β) that stand for distinct eigenvectors of the operator.

    The residual is β_m |s_m| (Paige 1971), with the inexactness of the products, ``noise``, as its floor. It bounds the
    error. Kato and Temple's residual²/gap would be less by far, but holds only for the gap to every other eigenvalue,
    and nobody knows of those that the start vector hardly holds: in clusters it was exceeded.
    """
    values, vectors = eigh_tridiagonal(np.asarray(alphas), np.asarray(betas[:-1]))
    residuals = betas[-1] * np.abs(vectors[-1])
    lengths = np.ones(len(values))
    kept = np.arange(len(values))
    if not basis.is_orthogonal:
        kept, lengths = _distinct(vectors, residuals, basis)
    kept = kept[np.argsort(-values[kept], kind="stable")]
    residuals = np.hypot(residuals[kept] / lengths[kept], noise)
    return RitzPairs(
        values=values[kept],
        residuals=residuals,
        coefficients=vectors[:, kept] / lengths[kept],
        columns=kept,
        copies=len(values) - len(kept),
    )


def _distinct(
    vectors: Float[np.ndarray, "m m"], residuals: Float[np.ndarray, " m"], basis: KrylovBasis
) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, " m"]]:
    """Return which Ritz vectors add a direction of their own, and the lengths of all.

    Without re-orthogonalisation a converged eigenvector enters the Krylov vectors again: its value is repeated, and
    other values are on their way to repeat it. Cullum & Willoughby (1985) recognise these ghosts in T alone, up to a
    tolerance and at the price of all multiplicities. Here the sketches of the Ritz vectors are at hand: in order of
    convergence, a Ritz vector is kept if at least half its squared length lies outside the span of those kept before.
    A ghost lies inside; a second eigenvector of a repeated eigenvalue does not.
    """
    ritz = basis.combine(torch.from_numpy(vectors))
    gram = (ritz @ ritz.T).numpy()
    lengths = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    kept: list[int] = []
    d = ritz.shape[1]
    for i in np.argsort(residuals / lengths, kind="stable"):
        # Projecting on r random directions of R^d leaves 1 − r/d of a vector that has nothing to do with them.
        if gram[i, i] <= 0.5 * (1 - len(kept) / d):
            continue
        kept.append(int(i))
        gram -= np.outer(gram[i], gram[i] / gram[i, i])
    return np.array(kept), lengths
