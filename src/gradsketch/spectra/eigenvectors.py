"""Eigenvectors in R^n by a second pass over the same recurrence."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from gradsketch.errors import GradsketchError, InputError
from gradsketch.linear_map import LinearMap
from gradsketch.sketches.affd import AFFD
from gradsketch.spectra.krylov import FullBasis
from gradsketch.spectra.lanczos import Lanczos, norm, start_vector
from gradsketch.spectra.plan import home
from gradsketch.spectra.results import Spectrum

__all__ = ["eigenvectors"]

_LEAST_COSINE = 0.9


def eigenvectors(operator: LinearMap, result: Spectrum, *, first: int | None = None) -> Float[Tensor, "r n"]:
    """Return unit eigenvectors of the ``first`` eigenvalues asked for (default: all), in the order of ``values``.

    Repeats the ``result.steps`` products of the run, holds r + 3 vectors (all of them for the route "full") and
    compares each vector with its stored sketch.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> H = gs.hessian(model, task, data)
        >>> result = gs.spectrum(H, k=3, progress=False)
        >>> y = gs.eigenvectors(H, result)
        >>> torch.allclose(y @ H(y).T, torch.diag(torch.tensor(result.values).float()), atol=1e-3)
        True

    Raises:
        InputError: the result came from a sketched operator, whose eigenvectors lie in R^d: ``result.sketches``.
        GradsketchError: the operator's products are not those of the first pass, to the last bit.
    """
    if result.method == "sketched-operator" or operator.n != result.n:
        raise InputError(
            f"a spectrum by {result.method!r} of n={result.n} with an operator of n={operator.n}",
            "the operator of a 'sketched-basis' or 'full' run",
            "Use result.sketches, or run spectrum(H, method='sketched-basis')",
        )
    places = [result.eigenvalues.index(e) for e in result.asked[:first]]
    _, vectors = eigh_tridiagonal(np.array(result.alphas), np.array(result.betas[:-1]))
    coefficients = vectors[:, [result.columns[p] for p in places]]
    start = start_vector(operator.n, result.seed, "start", *home(operator))
    out = _combine_again(operator, result, start, coefficients)
    for row in out:
        row.div_(norm(row))
    _check(out, result, places)
    return out


def _combine_again(
    operator: LinearMap, result: Spectrum, q: Float[Tensor, " n"], coefficients: Float[np.ndarray, "m r"]
) -> Float[Tensor, "r n"]:
    if result.method == "full":
        lanczos = Lanczos(operator, FullBasis(), q, result.seed)
        for _ in range(result.steps):
            lanczos.step()
        return lanczos.basis.combine(torch.from_numpy(np.ascontiguousarray(coefficients)))
    out = q.new_zeros(coefficients.shape[1], len(q))
    previous: Tensor | None = None
    for j in range(result.steps):
        for row, weight in zip(out, coefficients[j], strict=True):
            row.add_(q, alpha=float(weight))
        if j + 1 == result.steps:
            break
        w = operator(q)
        if previous is not None:
            w.sub_(previous, alpha=result.betas[j - 1])
        w.sub_(q, alpha=result.alphas[j]).div_(result.betas[j])
        previous, q = q, w
    return out


def _check(vectors: Float[Tensor, "r n"], result: Spectrum, places: list[int]) -> None:
    """Compare with the stored sketches, up to sign and length."""
    phi = None if result.sketch == "identity" else AFFD(result.n, result.d, seed=result.seed)
    if phi is not None and phi.fingerprint != result.sketch:
        return
    for vector, place in zip(vectors, places, strict=True):
        again = (vector if phi is None else phi(vector)).to("cpu", torch.float32)
        cosine = abs(float(torch.cosine_similarity(again, result.sketches[place], dim=0)))
        if cosine < _LEAST_COSINE:
            raise GradsketchError(
                f"the eigenvector of {result.eigenvalues[place].value:.6g} has cosine {cosine:.3f} with its sketch",
                "the products of the first pass, to the last bit",
                "Use the same weights, batches, device and threads, and torch.use_deterministic_algorithms(True)",
            )
