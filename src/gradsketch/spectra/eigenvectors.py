"""Eigenvectors in R^n by a second pass over the same recurrence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from gradsketch.errors import GradsketchError, InputError
from gradsketch.linear_map import LinearMap
from gradsketch.lockstep import in_step
from gradsketch.sketches.affd import AFFD
from gradsketch.spectra.krylov import Forgetful
from gradsketch.spectra.lanczos import Lanczos
from gradsketch.spectra.plan import Plan, make_plan
from gradsketch.spectra.results import Spectrum
from gradsketch.spectra.resume import RunFile
from gradsketch.spectra.scratch import check_scratch
from gradsketch.spectra.solve import Run, checked_gradient, sketched_basis, start

__all__ = ["eigenvectors"]

_LEAST_COSINE = 0.9


@in_step
def eigenvectors(
    operator: LinearMap,
    result: Spectrum,
    *,
    first: int | None = None,
    gradient: Float[Tensor, " n"] | None = None,
    scratch: str | Path | None = None,
) -> Float[Tensor, "r n"]:
    """Return unit eigenvectors of the ``first`` eigenvalues asked for (default: all), in the order of ``values``.

    Repeats the ``result.steps`` products of the run, holds r + 3 vectors (the basis for the route "full") and compares
    each vector with its stored sketch. ``gradient`` is the one that the run was given: it began there. ``scratch`` is a
    folder for the Krylov vectors, where the run had one.

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
    _check_gradient(result, gradient)
    places = [result.eigenvalues.index(e) for e in result.asked[:first]]
    plan = _plan(operator, result, scratch)
    gradient = checked_gradient(gradient, plan)
    if result.method == "full":
        out = _search_again(plan, gradient, [result.columns[p] for p in places])
    else:
        basis = Forgetful() if plan.scratch is None else sketched_basis(plan, None)
        lanczos = Lanczos(plan.operator, basis, start(plan, gradient), plan.seed)
        out = _combine_again(lanczos, result, places)
    for row in out:
        row.div_(plan.space.norm(row))
    out = torch.stack([plan.space.whole(row) for row in out]) if plan.space.is_shared else out
    _check(out, result, places)
    return out


def _check_gradient(result: Spectrum, gradient: Tensor | None) -> None:
    began = any(e.gradient_share is not None for e in result.eigenvalues)
    if began and gradient is None:
        raise InputError("no gradient for a spectrum that was given one", "the same gradient", "Type gradient=g")


def _plan(operator: LinearMap, result: Spectrum, scratch: str | Path | None) -> Plan:
    plan = make_plan(operator, result.k, result.which, "full", None, None, result.tolerance, 0, result.seed)
    plan = replace(plan, steps=result.steps, room=result.room)
    if not result.disk_bytes:
        return plan
    if scratch is None:
        raise InputError(
            "no scratch folder for a spectrum whose Krylov vectors were kept in one", "a folder", "Type scratch='/tmp'"
        )
    check_scratch(scratch, result.steps, plan.space)
    return replace(plan, scratch=Path(scratch))


def _search_again(plan: Plan, gradient: Float[Tensor, " n"] | None, columns: list[int]) -> Float[Tensor, "r n"]:
    run = Run.begin(plan, gradient, RunFile(None, {}))
    pairs = run.iterate(progress=False)
    return run.lanczos.basis.combine(torch.from_numpy(np.ascontiguousarray(pairs.coefficients[:, columns])))


def _combine_again(lanczos: Lanczos, result: Spectrum, places: list[int]) -> Float[Tensor, "r n"]:
    _, vectors = eigh_tridiagonal(np.array(result.alphas), np.array(result.betas[:-1]))
    coefficients = vectors[:, [result.columns[p] for p in places]]
    out = lanczos.q.new_zeros(coefficients.shape[1], len(lanczos.q))
    for j in range(result.steps):
        for row, weight in zip(out, coefficients[j], strict=True):
            row.add_(lanczos.q, alpha=float(weight))
        if j + 1 < result.steps:
            lanczos.step()
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
