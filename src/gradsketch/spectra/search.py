"""Lanczos with its basis at hand: full re-orthogonalisation, thick restarts, and a search for what one start misses.

One start vector meets each eigenspace in one direction, so a repeated eigenvalue shows once however long the recurrence
runs, and interior values take the place of its copies. So when everything wanted has settled, a new random vector from
the complement of the basis begins a chain of its own. What the complement still holds beyond the last value wanted
shows in that chain within a few products, because nothing else in the complement is that large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsketch.linear_map import LinearMap
from gradsketch.spectra.krylov import FullBasis
from gradsketch.spectra.lanczos import Steps, require_unchanged, start_vector
from gradsketch.spectra.results import Which
from gradsketch.spectra.ritz import RitzPairs

__all__ = ["Search", "Trial"]

# A head that loses more than this of its length has lost digits of its orthogonality too.
_SHORT = 0.7


@dataclass
class Trial:
    """A chain from a random vector of the complement: its coefficients, which also say what it cannot have missed."""

    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)

    def log_weight(self, bound: float) -> float | None:
        """Return the logarithm of the most that an eigenspace at or beyond ``bound`` > 0 can weigh in the start.

        Of all measures whose moments are those of the chain, none puts more on a point t beyond the chain's Ritz
        values than 1/Σ p_j(t)², where p_j are the chain's orthonormal polynomials (Chebyshev, Markov, Stieltjes; Szegő
        1939, §3.41). None where a Ritz value of the chain lies beyond the bound itself.
        """
        logs, ratio, before = [0.0], math.inf, 0.0
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            numerator = bound - alpha - before / ratio
            if numerator <= 0:
                return None
            if beta == 0:
                return -math.inf
            ratio, before = numerator / beta, beta
            logs.append(logs[-1] + math.log(ratio))
        return -float(np.logaddexp.reduce(2 * np.array(logs)))

    def flipped(self) -> Trial:
        """Return the chain of −H, whose upper end is the lower end of H."""
        return Trial([-alpha for alpha in self.alphas], self.betas)


class Search(Steps):
    """A basis V with M = VᵀHV, and heads: unit vectors orthogonal to V and to one another that hold the rest of HV.

    H V = V M + W C, with the heads as the columns of W. One step takes the product with one head, which becomes the
    next vector of the basis. Every new head turns the others away from itself, and C with them. So a chain goes through
    all of the complement of V, other heads included, and no eigenvector can hide behind those. A thick restart (Wu &
    Simon 2000) turns V into some of its Ritz vectors, M into their values and C accordingly. So at most ``room``
    vectors are held, and one head for every chain.
    """

    def __init__(self, operator: LinearMap, start: Float[Tensor, " n"], seed: int, room: int, which: Which) -> None:
        super().__init__()
        self.operator, self.seed, self.room, self.which = operator, seed, room, which
        self.space, self.n = operator.space, operator.space.n
        self.basis = FullBasis(self.space)
        self.matrix = np.zeros((0, 0))
        self.heads: list[Tensor] = [start]
        self.couplings = np.zeros((1, 0))
        self.active = 0
        self.trials = [Trial()]
        self.on_trial = True

    @property
    def q(self) -> Float[Tensor, " n"]:
        """The vector that the next product is taken with."""
        return self.heads[self.active]

    @property
    def closed(self) -> bool:
        """Whether all of R^n has been searched."""
        return len(self.basis.rows) == self.n or not self.heads

    def step(self, product: Float[Tensor, " n"] | None = None) -> None:
        """Take the product with the active head, or use it where the caller has it already, and go on from there.

        Raises:
            InputError: the product does not fit the symmetric matrix seen so far.
            NonFiniteError: the operator returned a NaN or an infinity.
        """
        q, coupling = self._taken(self.active)
        w = self.operator(q) if product is None else product
        if w.data_ptr() == q.data_ptr():
            w = w.clone()
        self._watch(w, coupling)
        alpha = self.space.dot(q, w)
        self.basis.append(q)
        self.matrix = np.block([[self.matrix, coupling[:, None]], [coupling, np.array(alpha)]])
        self.couplings = np.pad(self.couplings, ((0, 0), (0, 1)))
        self.alphas.append(alpha)
        self._advance(w, alpha)

    def _watch(self, w: Float[Tensor, " n"], coupling: Float[np.ndarray, " m"]) -> None:
        """Compare ⟨u, Hq⟩ with ⟨Hu, q⟩ for the direction u of the basis that leads to q."""
        expected = float(np.linalg.norm(coupling))
        if expected > 0:
            places = np.flatnonzero(coupling)
            found = sum(coupling[j] * self.space.dot(self.basis.rows[int(j)], w) for j in places) / expected
            self.drifts.append(float(found) - expected)
            require_unchanged(self.operator, len(self), float(found), expected, self.scale)

    def _advance(self, w: Float[Tensor, " n"], alpha: float) -> None:
        """Turn what H added to the basis into the next head, or find another head where it added nothing."""
        self.basis.orthogonalize(w)
        beta = self.space.norm(w)
        ends = len(self.basis.rows) == self.n or beta <= self._negligible(w)
        self.betas.append(0.0 if ends else beta)
        if self.on_trial:
            self.trials[-1].alphas.append(alpha)
            self.trials[-1].betas.append(self.betas[-1])
        if not ends:
            coupling = np.zeros(len(self.basis.rows))
            coupling[-1] = beta
            self._add(w.div_(beta), coupling)
        elif self.heads:
            self._go_on_with(len(self.heads) - 1)
        else:
            self.begin_trial()

    def _negligible(self, w: Tensor) -> float:
        return 10 * torch.finfo(w.dtype).eps * self.scale

    def _add(self, head: Float[Tensor, " n"], coupling: Float[np.ndarray, " m"]) -> None:
        """Take in a head, of which the others lose what they have in common with it."""
        others, couplings = [], []
        for other, shared in zip(self.heads, self.couplings, strict=True):
            overlap = self.space.dot(head, other)
            length = self.space.norm(other.sub_(head, alpha=overlap))
            coupling = coupling + overlap * shared
            if length * np.linalg.norm(shared) > self._negligible(head):
                others.append(self._sharpened(other.div_(length), head) if length < _SHORT else other.div_(length))
                couplings.append(length * shared)
        self.heads, self.active = [*others, head], len(others)
        self.couplings = np.stack([*couplings, coupling])

    def _sharpened(self, other: Float[Tensor, " n"], head: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Make a head orthogonal again, of which little was left but rounding of what it lost."""
        self.basis.orthogonalize(other)
        other.sub_(head, alpha=self.space.dot(head, other))
        return other.div_(self.space.norm(other))

    def _go_on_with(self, place: int) -> None:
        # A chain says something about one complement; as soon as another head is taken, that is another one.
        head, coupling = self._taken(place)
        self._add(head, coupling)
        self.on_trial = False

    def _taken(self, place: int) -> tuple[Float[Tensor, " n"], Float[np.ndarray, " m"]]:
        head, coupling = self.heads.pop(place), self.couplings[place]
        self.couplings = np.delete(self.couplings, place, axis=0)
        return head, coupling

    def begin_trial(self) -> None:
        """Begin a chain from a random vector of the complement, if that holds any."""
        if len(self.basis.rows) == self.n:
            return
        q = self.basis.rows[0]
        z = start_vector(self.space, self.seed, f"restart {len(self)}", q.dtype, q.device)
        self.basis.orthogonalize(z)
        self._add(z.div_(self.space.norm(z)), np.zeros(len(self.basis.rows)))
        self.trials.append(Trial())
        self.on_trial = True

    def pairs(self) -> RitzPairs:
        """Return the Ritz pairs of the basis."""
        values, vectors = np.linalg.eigh(self.matrix)
        values, vectors = values[::-1], vectors[:, ::-1]
        residuals = np.hypot(np.linalg.norm(self.couplings @ vectors, axis=0), self.noise)
        return RitzPairs(values, residuals, vectors, np.arange(len(values)), 0)

    def fits(self, count: int) -> bool:
        """Whether so many more vectors fit, or all of R^n does."""
        return self.room == self.n or len(self.basis.rows) + count <= self.room

    def make_room(self, pairs: RitzPairs, free: int) -> None:
        """Restart if fewer than ``free`` vectors more would fit."""
        if self.fits(free):
            return
        kept = outermost(pairs.values, self.room - free, self.which)
        self.basis.recombine(torch.from_numpy(np.ascontiguousarray(pairs.coefficients[:, kept])))
        self.matrix = np.diag(pairs.values[kept])
        self.couplings = self.couplings @ pairs.coefficients[:, kept]
        self.on_trial = False

    def choose_head(self, pairs: RitzPairs, unsettled: Int[np.ndarray, " u"]) -> None:
        """Go on from the head that most of the residuals of these pairs lie along."""
        shares = np.abs(self.couplings @ pairs.coefficients[:, unsettled]).sum(1)
        best = int(np.argmax(shares)) if len(shares) else self.active
        if best != self.active and shares[best] > shares[self.active]:
            self._go_on_with(best)

    def doubt(self, above: float, below: float) -> float:
        """Return the chance that the complement holds an eigenvalue ≥ ``above`` or ≤ −``below`` that no trial met.

        An eigenvector has a share of less than ε² in a random vector with a chance of at most ε √(2n/π), and each trial
        started from a random vector of its own.
        """
        return min(1.0, self._missed(self.trials, above) + self._missed([t.flipped() for t in self.trials], below))

    def _missed(self, trials: list[Trial], bound: float) -> float:
        weights = [w for trial in trials if (w := trial.log_weight(bound)) is not None]
        chances = [0.5 * (math.log(2 * self.n / math.pi) + w) for w in weights]
        return math.exp(sum(min(0.0, chance) for chance in chances))

    def goes_on(self, above: float, below: float) -> bool:
        """Whether the present trial can still lower the doubt: it has met nothing beyond the bounds and is not over."""
        trial = self.trials[-1]
        weights = trial.log_weight(above), trial.flipped().log_weight(below)
        return self.on_trial and None not in weights

    def state(self) -> dict[str, Any]:
        """Return what a later ``restore`` needs to go on as if nothing had happened."""
        return {
            "rows": self.basis.rows.blocks(),
            "heads": list(self.heads),
            "matrix": torch.from_numpy(self.matrix),
            "couplings": torch.from_numpy(self.couplings),
            "active": self.active,
            "on_trial": self.on_trial,
            "trials": [(list(trial.alphas), list(trial.betas)) for trial in self.trials],
            "alphas": list(self.alphas),
            "betas": list(self.betas),
            "drifts": list(self.drifts),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a state made by ``state`` for the same operator and start."""
        for row in (row for block in state["rows"] for row in block):
            self.basis.rows.append(row.to(device))
        self.heads = [head.to(device) for head in state["heads"]]
        self.matrix, self.couplings = state["matrix"].numpy(), state["couplings"].numpy()
        self.active, self.on_trial = state["active"], state["on_trial"]
        self.trials = [Trial(alphas, betas) for alphas, betas in state["trials"]]
        self.alphas, self.betas, self.drifts = state["alphas"], state["betas"], state["drifts"]


def outermost(values: Float[np.ndarray, " r"], count: int, which: Which) -> Int[np.ndarray, " c"]:
    """Return the places of the outermost of values that descend: by magnitude, or as many from each end."""
    if which == "magnitude":
        return np.sort(np.argsort(-np.abs(values), kind="stable")[:count])
    top = (count + 1) // 2
    places: Int[np.ndarray, " c"] = np.r_[np.arange(top), np.arange(len(values) - (count - top), len(values))]
    return places
