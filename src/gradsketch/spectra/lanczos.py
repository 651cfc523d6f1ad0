"""The Lanczos recurrence: from products with a self-adjoint map to a tridiagonal matrix.

Symmetry is checked at every step: ⟨q_{j−1}, H q_j⟩ must equal β_{j−1}. One extra dot product a step finds dropout,
another operator behind a resumed run and a wrong derivative, and its median is the noise floor that residuals and
errors carry.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap
from gradsketch.random import Stream
from gradsketch.space import Space
from gradsketch.spectra.krylov import KrylovBasis

__all__ = ["Lanczos", "Steps", "check_self_adjoint", "require_unchanged", "start_vector"]

# |⟨q_{j−1}, H q_j⟩ − β_{j−1}| over ‖T‖: central differences in float32 reach 1e-3, a changed operator about 1.
_DRIFT = 0.05
# |⟨y, Hx⟩ − ⟨Hy, x⟩| over ‖Hx‖ for standard normal y: rounding reaches 1e-3.
_ASYMMETRY = 0.01
# A new direction shorter than this, relative to ‖T‖, is what a subtraction of long vectors left over.
_CANCELLATION = 0.1


def start_vector(space: Space, seed: int, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a unit vector of uniformly random direction, a function of seed, name and the space's n alone."""
    stream = Stream(seed, "spectrum", name)
    vector = space.drawn(partial(stream.normals, dtype=dtype, device=device))
    return vector.div_(space.norm(vector))


def check_self_adjoint(operator: LinearMap, x: Float[Tensor, " n"], product: Float[Tensor, " n"], seed: int) -> None:
    """Compare ⟨y, Hx⟩ with ⟨Hy, x⟩ for a random y: one product more.

    Raises:
        InputError: they differ by more than rounding; an asymmetry of 5 % of ‖H‖_F is found with 9 chances in 10.
    """
    stream, space = Stream(seed, "spectrum", "probe"), operator.space
    y = space.drawn(partial(stream.normals, dtype=x.dtype, device=x.device))
    forward, scale = space.dot(y, product), space.norm(product)
    y = operator(y)
    difference = abs(forward - space.dot(y, x))
    if difference > _ASYMMETRY * scale:
        raise InputError(
            f"{operator!r} is not self-adjoint: <y, Hx> and <Hy, x> differ by {difference / scale:.1%} of |Hx|",
            "the same operator at every product, with <y, Hx> = <x, Hy>",
            "Check for dropout, the order of batches and forward-mode derivatives through normalisation layers",
        )


def require_unchanged(operator: LinearMap, product: int, found: float, expected: float, scale: float) -> None:
    """Check that ⟨p, Hq⟩ is what ⟨q, Hp⟩ was at an earlier product.

    Raises:
        InputError: they differ by more than central differences do.
    """
    if abs(found - expected) > _DRIFT * max(scale, abs(found)):
        raise InputError(
            f"{operator!r} changed between products {product} and {product + 1}:"
            f" <p, Hq> is {found:.4g} where <q, Hp> was {expected:.4g}",
            "the same symmetric operator at every product",
            "Turn dropout off (model.eval()), fix the order of the data, and resume only with the same weights",
        )


class Steps:
    """What a run has seen so far: its coefficients, and how far each product was from that of a symmetric map."""

    def __init__(self) -> None:
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.drifts: list[float] = []

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def scale(self) -> float:
        """Largest coefficient so far, a stand-in for ‖H‖."""
        return max((abs(c) for c in (*self.alphas, *self.betas)), default=0.0)

    @property
    def noise(self) -> float:
        """Typical difference of ⟨p, Hq⟩ and ⟨q, Hp⟩: how far the products are from those of one symmetric map."""
        return statistics.median(map(abs, self.drifts)) if self.drifts else 0.0


class Lanczos(Steps):
    """State of one run: q_{j−1}, q_j, the coefficients so far, and a basis that remembers what it can.

    H q_j = β_{j−1} q_{j−1} + α_j q_j + β_j q_{j+1}, evaluated as Paige (1972) advises: subtract the old direction
    before measuring α. Holds two vectors between steps and three within one, besides the basis and the operator.
    """

    def __init__(self, operator: LinearMap, basis: KrylovBasis, start: Float[Tensor, " n"], seed: int = 0) -> None:
        super().__init__()
        self.operator, self.space, self.basis, self.seed = operator, operator.space, basis, seed
        self.q: Tensor = start
        self.previous: Tensor | None = None
        self.closed = False

    @property
    def noise(self) -> float:
        return max(super().noise, self.basis.noise)

    def step(self, product: Float[Tensor, " n"] | None = None) -> None:
        """Take one product and one step; ``product`` is H q_j where the caller has it already.

        Raises:
            InputError: the product does not fit the symmetric matrix seen so far.
            NonFiniteError: the operator returned a NaN or an infinity.
        """
        w = self.operator(self.q) if product is None else product
        if w.data_ptr() == self.q.data_ptr():
            w = w.clone()
        self.basis.append(self.q)
        if self.previous is not None:
            self._watch(self.space.dot(self.previous, w))
            w.sub_(self.previous, alpha=self.betas[-1])
        alpha = self.space.dot(self.q, w)
        w.sub_(self.q, alpha=alpha)
        self.basis.orthogonalize(w)
        beta = self.space.norm(w)
        if beta < _CANCELLATION * self.scale:
            alpha, beta = self._again(w, alpha)
        self.alphas.append(alpha)
        self._advance(w, beta)

    def _again(self, w: Float[Tensor, " n"], alpha: float) -> tuple[float, float]:
        """Remove both neighbours once more, since most of w cancelled: local orthogonality is what Lanczos rests on."""
        if self.previous is not None:
            w.sub_(self.previous, alpha=self.space.dot(self.previous, w))
        rest = self.space.dot(self.q, w)
        w.sub_(self.q, alpha=rest)
        return alpha + rest, self.space.norm(w)

    def _watch(self, overlap: float) -> None:
        self.drifts.append(overlap - self.betas[-1])
        require_unchanged(self.operator, len(self), overlap, self.betas[-1], self.scale)

    def _advance(self, w: Float[Tensor, " n"], beta: float) -> None:
        if beta > 10 * torch.finfo(w.dtype).eps * self.scale:
            self.betas.append(beta)
            self.previous, self.q = self.q, w.div_(beta)
            return
        # The Krylov space is invariant. What is left, if it is known what that is, has spectrum of its own.
        self.betas.append(0.0)
        self.closed = not self.basis.is_orthogonal or len(self) == self.space.n
        if not self.closed:
            self.q = start_vector(self.space, self.seed, f"restart {len(self)}", w.dtype, w.device)
            self.basis.orthogonalize(self.q)
            self.q.div_(self.space.norm(self.q))

    def state(self) -> dict[str, Any]:
        """Return what a later ``restore`` needs to go on as if nothing had happened."""
        return {
            "q": self.q,
            "previous": self.previous,
            "rows": self.basis.rows.blocks(),
            "basis": self.basis.state(),
            "alphas": list(self.alphas),
            "betas": list(self.betas),
            "drifts": list(self.drifts),
            "closed": self.closed,
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a state made by ``state`` for the same operator, basis and start."""
        self.q = state["q"].to(device)
        self.previous = None if state["previous"] is None else state["previous"].to(device)
        self.alphas, self.betas, self.drifts = state["alphas"], state["betas"], state["drifts"]
        self.closed = state["closed"]
        for row in (row for block in state["rows"] for row in block):
            self.basis.rows.append(row.to(device) if self.basis.is_orthogonal else row)
        self.basis.restore(state.get("basis", {}))
