"""Hessian-vector products in JAX, and the outer eigenvalues that Lanczos finds with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal

from gradsketch.errors import InputError, NonFiniteError
from gradsketch.jax.random import normals
from gradsketch.random import Stream

__all__ = ["Eigenvalues", "hvp", "spectrum"]

Loss = Callable[[Any, Any], Float[Array, ""]]
Product = Callable[[Any, Any, Any], Any]

# A new direction shorter than this, relative to the largest coefficient, is rounding.
_CLOSED = 1e-5


class Eigenvalues(NamedTuple):
    """The largest eigenvalues, descending.

    ``errors`` bounds how far each is from an eigenvalue, and ``products`` counts products with the operator.
    """

    values: Float[np.ndarray, " k"]
    errors: Float[np.ndarray, " k"]
    products: int


def hvp(loss: Loss) -> Product:
    """Return ``(params, batch, v) → H v``, H the Hessian of the mean loss over the batch; v is a tree like the params.

    Forward over reverse: the derivative of the gradient along v, exact up to rounding, at about two gradients' cost.

    Example:
        >>> product = gj.hvp(lambda params, x: jnp.square(params @ x).sum() / 2)
        >>> product(jnp.ones(2), jnp.eye(2), jnp.array([2.0, 4.0]))
        Array([1., 2.], dtype=float32)
    """

    def product(params: Any, batch: Any, v: Any) -> Any:
        def mean(params: Any) -> Array:
            return jax.vmap(lambda example: loss(params, example))(batch).mean()

        return jax.jvp(jax.grad(mean), (params,), (v,))[1]

    return product


def spectrum(product: Product, params: Any, batch: Any, *, k: int = 10, steps: int = 100, seed: int = 0) -> Eigenvalues:
    """Return the k largest eigenvalues of a symmetric operator, such as ``hvp(loss)``, by Lanczos.

    Every direction is kept and each new one made orthogonal to all, so memory is ``steps`` times the parameters. It
    starts at the direction that ``gs.spectrum`` starts at. An eigenvalue that is repeated is found once.

    Raises:
        InputError: k or steps is not positive, or k is more than steps.
        NonFiniteError: a product is not finite.
    """
    flat, unravel = ravel_pytree(params)
    steps = min(steps, len(flat))
    if not 1 <= k <= steps:
        raise InputError(f"k={k} with steps={steps}", "1 ≤ k ≤ steps ≤ n", "Pass a smaller k, or more steps")

    @jax.jit
    def step(basis: Array, q: Array) -> tuple[Array, Array, Array]:
        w = ravel_pytree(product(params, batch, unravel(q)))[0]
        alpha = jnp.vdot(q, w, precision=lax.Precision.HIGHEST)
        for _ in range(2):  # Gram–Schmidt twice is enough (Giraud, Langou & Rozloznik 2005)
            overlaps = jnp.matmul(basis, w, precision=lax.Precision.HIGHEST)
            w = w - jnp.matmul(overlaps, basis, precision=lax.Precision.HIGHEST)
        return alpha, jnp.linalg.norm(w), w

    q = normals(Stream(seed, "spectrum", "start"), len(flat), flat.dtype)
    q, basis = q / jnp.linalg.norm(q), jnp.zeros((steps, len(flat)), flat.dtype)
    alphas: list[float] = []
    betas: list[float] = []
    for number in range(steps):
        basis = basis.at[number].set(q)
        alpha, beta, w = step(basis, q)
        if not np.isfinite(float(alpha) + float(beta)):
            raise NonFiniteError(
                f"product {number + 1} with the operator is not finite", "finite products", "Look at the loss"
            )
        alphas.append(float(alpha))
        betas.append(float(beta))
        if betas[-1] <= _CLOSED * max(map(abs, (*alphas, *betas))):
            betas[-1] = 0.0
            break
        q = w / beta
    values, vectors = eigh_tridiagonal(np.array(alphas), np.array(betas[:-1]))
    errors = betas[-1] * np.abs(vectors[-1])
    order = np.argsort(-values, kind="stable")[:k]
    return Eigenvalues(values[order], errors[order], len(alphas))
