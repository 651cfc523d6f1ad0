"""Eigenvalues of a map whose Krylov basis would not fit: the public function and its loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from gradsketch.durable import require_same
from gradsketch.errors import InputError
from gradsketch.gradients.curvature.base import Curvature
from gradsketch.linear_map import LinearMap
from gradsketch.lockstep import in_step
from gradsketch.progress import hidden
from gradsketch.sketches.base import Sketch
from gradsketch.spectra.bias import corrected, detection_threshold, effective_d, least_d, sampling_error
from gradsketch.spectra.krylov import SketchedBasis, sketched
from gradsketch.spectra.lanczos import Lanczos, check_self_adjoint, start_vector
from gradsketch.spectra.moments import moments
from gradsketch.spectra.plan import Plan, make_plan
from gradsketch.spectra.results import Eigenvalue, Estimate, Method, Spectrum, Which
from gradsketch.spectra.resume import RunFile
from gradsketch.spectra.ritz import RitzPairs, ritz_pairs
from gradsketch.spectra.scratch import OrthogonalizedBasis, kept_file
from gradsketch.spectra.search import Search
from gradsketch.spectra.truncation import differenced

__all__ = ["Run", "checked_gradient", "require_same_map", "spectrum", "start"]

# Relative difference of two evaluations of one product: central differences in float32 reach 1e-3.
_SAME = 0.01
# The search for copies ends when another eigenvalue beyond the last, by this share of it, has less than this chance.
_DOUBT, _SLACK = 0.01, 0.001
_ZERO_GRADIENT = "The gradient is zero: no eigenvector has a share in it."
# The search usually takes fewer products than this, and as many vectors are made room for.
_ROOM = 30


@in_step
def spectrum(
    operator: LinearMap,
    k: int = 10,
    *,
    which: Which = "magnitude",
    method: Literal["auto"] | Method = "auto",
    sketch: Sketch | int | None = None,
    steps: int | None = None,
    tolerance: float = 1e-3,
    gradient: Float[Tensor, " n"] | None = None,
    probes: int = 10,
    seed: int = 0,
    memory: int = 1 << 28,
    resume: str | Path | None = None,
    scratch: str | Path | None = None,
    progress: bool | None = None,
) -> Spectrum:
    """Return the outermost eigenvalues of a self-adjoint map, positive and negative, by Lanczos' method.

    Three routes, of which "auto" takes one and says why:

    * "full": re-orthogonalisation against a basis of vectors in R^n, as many as fit in ``memory`` bytes, with thick
      restarts where more are needed. Copies of repeated eigenvalues are counted: when everything has settled, the
      complement is searched for what is missing, until ``confidence`` is above 99 %.
    * "sketched-basis": a three-term recurrence in R^n that holds four vectors. Of the Krylov vectors only sketches
      are kept, d numbers each: they tell ghosts from eigenvalues and give the eigenvectors in sketch space. Values
      are unbiased. A repeated eigenvalue is found at least once and never more often than it occurs.
    * "sketched-operator": Phi H Phiᵀ in R^d with full re-orthogonalisation ([P], §5.3), for hundreds of eigenvalues;
      what ``spectrum(phi @ H @ phi.T)`` does. Values are corrected to first order for the bias that sketching adds,
      by ``probes`` more products (0: not corrected); ``raw`` values stand beside them.

    Stops when the eigenvalues asked for have relative residuals ``‖Hy − λy‖/|λ|`` below ``tolerance``, or after
    ``steps`` products; what has not settled by then is marked so.

    Args:
        operator: self-adjoint map on vectors ``[n]``.
        k: how many eigenvalues.
        which: the k largest by "magnitude", or k positive and k negative with "both".
        method: the route.
        sketch: a sketch of vectors ``[n]``, or its size d.
        steps: most products the recurrence may take; by default 10 k, 20 k for both sides, at least 100, and three
            times as many for "full", which counts copies.
        tolerance: relative residual of a converged eigenvalue.
        gradient: vector ``[n]`` whose share in each eigenvector is wanted; the recurrence begins with it, too.
        probes: products spent on tr H and ‖H‖_F² by the sketched operator.
        seed: of the start vector and of the sketch.
        memory: bytes that the basis of "full" may take, if it is large enough for what is asked.
        resume: file that holds the state of the run. A run that finds its file goes on from there.
        scratch: folder in which "sketched-basis" keeps the Krylov vectors, too, a byte a number, and makes every new
            one orthogonal to them: up to ``steps`` n bytes, read twice a step. Hardly a product is spent on copies
            then, which are half of them otherwise. With ``resume`` the file stays there, for the run to go on.
        progress: show a progress bar; by default where there is a terminal.

    Example:
        >>> phi = gs.AFFD(1000, 64)
        >>> s = gs.spectrum(phi.T @ phi, k=3)
        >>> s.converged.all()
        np.True_

    Raises:
        InputError: not self-adjoint (declared, or found by a probe), not the same at every product, k > n or > d.
        NonFiniteError: a product holds a NaN or an infinity.
        FingerprintError: the file in ``resume`` is of another run: other weights, data, task, parameters, options.
        StoreError: the file in ``resume`` is damaged, or cannot be written.
    """
    plan = make_plan(operator, k, which, method, sketch, steps, tolerance, memory, seed, scratch)
    if resume is not None and plan.inner.ranks.several:
        raise InputError("resume= for a model that ranks share out", "a run without a file", "Leave resume out")
    given, gradient = gradient is not None, checked_gradient(gradient, plan)
    facts = {} if resume is None else plan.facts() | {"gradient": gradient is not None}
    run = Run.begin(plan, gradient, RunFile(resume, facts))
    run.notes += [_ZERO_GRADIENT] if given and gradient is None else []
    pairs = run.iterate(progress)
    estimates: tuple[Estimate, Estimate] | None = None
    if plan.method == "sketched-operator" and probes > 0:
        estimates = moments(plan.inner, probes, seed, plan.dtype, plan.device)
        run.products += probes
    return run.result(pairs, estimates)


@dataclass
class Run:
    """A Lanczos run with its costs."""

    plan: Plan
    lanczos: Lanczos | Search
    gradient: Float[Tensor, " n"] | None
    file: RunFile
    overlaps: list[float] = field(default_factory=list)
    products: int = 0
    settled_after: int | None = None
    seconds: float = 0.0
    safe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, plan: Plan, gradient: Float[Tensor, " n"] | None, file: RunFile) -> Run:
        """Start, or take up what the file holds."""
        saved = file.load()
        run = cls(
            plan,
            recurrence(
                plan, torch.empty(0, dtype=torch.float32, device="cpu") if saved else start(plan, gradient), file
            ),
            gradient,
            file,
        )
        if saved:
            run.lanczos.restore(saved["lanczos"], plan.device)
            run.overlaps, run.products, run.seconds = saved["overlaps"], saved["products"], saved["seconds"]
            run.settled_after = saved["settled after"]
            require_same_gradient(plan, gradient, saved["gradient"], str(file.path))
            run._check_last()
        return run

    def _check_last(self) -> None:
        """Compare one product with those of a run that needs no more of them; others are compared at every step."""
        pairs = self._pairs_when_due()
        over = self.lanczos.closed or len(self.lanczos) >= self.plan.steps
        if self.lanczos.alphas and (over or (pairs is not None and self._done(pairs))):
            first = self.lanczos.alphas[0], self.lanczos.betas[0]
            require_same_map(self.plan, self.gradient, first, str(self.file.path))

    def iterate(self, progress: bool | None) -> RitzPairs:
        """Step until the wanted eigenvalues are found, the steps are used up or nothing is left to search."""
        lanczos, plan, clock, before = self.lanczos, self.plan, time.monotonic(), self.seconds
        disable = hidden(progress, plan.inner.ranks.rank)
        with tqdm(total=plan.steps, initial=len(lanczos), unit="HVP", disable=disable, leave=False) as bar:
            while True:
                pairs = self._pairs_when_due()
                if pairs is not None:
                    bar.set_postfix_str(_leaders(pairs))
                if lanczos.closed or len(lanczos) >= plan.steps or (pairs is not None and self._done(pairs)):
                    break
                self._step()
                self.seconds = before + time.monotonic() - clock
                self._keep()
                bar.update()
        self._save()
        return self._pairs() if pairs is None else pairs

    def _pairs_when_due(self) -> RitzPairs | None:
        """Return the Ritz pairs where they are looked at, which the number of steps alone decides.

        So a run that was interrupted stops at the step at which it would have stopped anyway.
        """
        count = len(self.lanczos)
        return self._pairs() if count >= self.plan.k and count % max(1, count // 32) == 0 else None

    def _done(self, pairs: RitzPairs) -> bool:
        """Whether what is wanted has been found; if not, make ready for the step that brings it closer."""
        wanted, unsettled, enough = self._wanted(pairs)
        if enough and not len(unsettled) and self.settled_after is None:
            self.settled_after = self.products
        if not isinstance(self.lanczos, Search):
            return enough and not len(unsettled)
        if len(unsettled):
            self.lanczos.choose_head(pairs, unsettled)
            return False
        # Sketching H splits repeated eigenvalues, so that there are no copies to search for.
        return (enough and self.plan.method != "full") or self._searched(pairs, wanted)

    def _searched(self, pairs: RitzPairs, wanted: Int[np.ndarray, " c"]) -> bool:
        """Whether the complement holds no more of what is wanted; if that is not sure, see to it that it gets so."""
        assert isinstance(self.lanczos, Search)
        bounds = self._bounds(pairs, wanted)
        if self.lanczos.doubt(*bounds) <= _DOUBT:
            return True
        if not self.lanczos.goes_on(*bounds):
            self.lanczos.make_room(pairs, min(_ROOM, (self.plan.room - len(wanted)) // 2))
            self.lanczos.begin_trial()
        return False

    def _step(self) -> None:
        lanczos = self.lanczos
        try:
            if isinstance(lanczos, Search) and not lanczos.fits(1):
                lanczos.make_room(self._pairs(), (self.plan.room - self.plan.wanted) // 2)
            if self.gradient is not None and isinstance(lanczos, Lanczos):
                self.overlaps.append(self.plan.space.dot(self.gradient, lanczos.q))
            lanczos.step(self._probed() if len(lanczos) == 0 else None)
            self.products += 1
        except KeyboardInterrupt:
            self._save()
            raise

    def _probed(self) -> Float[Tensor, " n"] | None:
        """Return the first product, compared with another that shows whether the map is its own adjoint.

        A curvature has compared its products with differences of gradients itself.
        """
        if isinstance(self.plan.inner, Curvature):
            return None
        product = self.plan.operator(self.lanczos.q)
        check_self_adjoint(self.plan.operator, self.lanczos.q, product, self.plan.seed)
        self.products += 1
        return product

    def _save(self) -> None:
        if self.safe:  # else no step has been made, and the file is as it was found
            self.file.save(self.safe)

    def _keep(self) -> None:
        if self.file.path is None:
            return
        self.safe = {
            "lanczos": self.lanczos.state(),
            "overlaps": list(self.overlaps),
            "gradient": None if self.gradient is None else gradient_mark(self.plan, self.gradient),
            "products": self.products,
            "settled after": self.settled_after,
            "seconds": self.seconds,
        }
        self.file.save_sometimes(self.safe)

    def _pairs(self) -> RitzPairs:
        lanczos = self.lanczos
        if isinstance(lanczos, Search):
            return lanczos.pairs()
        return ritz_pairs(lanczos.alphas, lanczos.betas, lanczos.basis, lanczos.noise)

    def _wanted(self, pairs: RitzPairs) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " u"], bool]:
        """Return the places of the pairs asked for, of those among them that have not settled, and if all are there."""
        wanted = _both_ends(pairs.values, self.plan.k, self._zero())
        if self.plan.which == "magnitude":
            wanted = wanted[np.argsort(-np.abs(pairs.values[wanted]))][: self.plan.k]
        unsettled = wanted[self._relative(pairs)[wanted] > self.plan.tolerance]
        return wanted, unsettled, len(wanted) >= self.plan.wanted

    def _bounds(self, pairs: RitzPairs, wanted: Int[np.ndarray, " c"]) -> tuple[float, float]:
        """Return beyond which values, upwards and downwards, another eigenvalue would be wanted too."""
        found, k, zero = pairs.values[wanted], self.plan.k, self._zero()
        if self.plan.which == "magnitude":
            least = float(np.abs(found).min()) if len(found) == k else zero
            return (1 + _SLACK) * least, (1 + _SLACK) * least
        ends = [np.abs(side).min() if len(side) == k else zero for side in (found[found > 0], found[found < 0])]
        return (1 + _SLACK) * float(ends[0]), (1 + _SLACK) * float(ends[1])

    def _zero(self) -> float:
        """Return the magnitude below which a value is rounding."""
        eps = torch.finfo(self.plan.dtype).eps
        return max(self.lanczos.noise, 10 * eps * self.lanczos.scale)

    def _relative(self, pairs: RitzPairs) -> Float[np.ndarray, " r"]:
        relative: Float[np.ndarray, " r"] = pairs.residuals / np.maximum(np.abs(pairs.values), np.finfo(float).tiny)
        return relative

    def result(self, pairs: RitzPairs, estimates: tuple[Estimate, Estimate] | None) -> Spectrum:
        """Return what was found, corrected where the operator was sketched."""
        plan, lanczos = self.plan, self.lanczos
        chosen = _both_ends(pairs.values, plan.k, self._zero())
        eigenvalues = self._eigenvalues(pairs, chosen)
        confidence = self._confidence(pairs)
        threshold, notes = None, self._notes(len(self._wanted(pairs)[1]), confidence)
        if estimates is not None:
            d = effective_d(plan.sketch, plan.seed)
            threshold = detection_threshold(estimates[1].value, d)
            eigenvalues, seen = self._corrected(pairs, chosen, eigenvalues, d, estimates)
            notes += _undetected(eigenvalues, seen, threshold, estimates[1].value, plan.inner.n)
            order = np.argsort([-e.value for e in eigenvalues], kind="stable")
            eigenvalues, chosen = [eigenvalues[i] for i in order], chosen[order]
        return Spectrum(
            eigenvalues=tuple(eigenvalues),
            k=plan.k,
            which=plan.which,
            method=plan.method,
            reason=plan.reason,
            n=plan.inner.n,
            d=plan.sketch.shape[0],
            tolerance=plan.tolerance,
            seed=plan.seed,
            steps=len(lanczos),
            hvps=self.products,
            settled_after=self.settled_after,
            room=plan.room,
            seconds=self.seconds,
            peak_bytes=_peak_bytes(plan.device),
            vectors_held=self._vectors_held(),
            copies=pairs.copies,
            confidence=confidence,
            noise=lanczos.noise,
            notes=tuple(notes),
            trace=estimates[0] if estimates else None,
            squared_norm=estimates[1] if estimates else None,
            threshold=threshold,
            sketch=plan.sketch.fingerprint,
            alphas=tuple(lanczos.alphas),
            betas=tuple(lanczos.betas),
            columns=tuple(int(c) for c in pairs.columns[chosen]),
            sketches=self._sketches(pairs.coefficients[:, chosen]),
            disk_bytes=lanczos.basis.disk_bytes,
        )

    def _eigenvalues(self, pairs: RitzPairs, chosen: Int[np.ndarray, " r"]) -> list[Eigenvalue]:
        relative = self._relative(pairs)
        shares: list[float | None] = [None] * len(chosen)
        if self.gradient is not None:
            overlaps = self._overlaps(self.gradient) @ pairs.coefficients[:, chosen]
            # A length that is known from a sketch only can come out too short.
            shares = list(np.minimum(overlaps**2 / self.plan.space.dot(self.gradient, self.gradient), 1.0))
        truncated, rounding = self._truncation(pairs), torch.finfo(self.plan.dtype).eps
        bounds = pairs.residuals + self.lanczos.noise
        return [
            Eigenvalue(
                value=float(pairs.values[i]),
                residual=float(relative[i]),
                error=float(bounds[i]) + rounding * abs(float(pairs.values[i])) + truncated.get(int(i), 0.0),
                converged=bool(relative[i] <= self.plan.tolerance),
                gradient_share=None if share is None else float(share),
            )
            for i, share in zip(chosen, shares, strict=True)
        ]

    def _truncation(self, pairs: RitzPairs) -> dict[int, float]:
        """Return, for each pair asked for, what differences in the place of products add to the error of its value."""
        operator = differenced(self.plan.operator)
        if operator is None or not isinstance(self.lanczos, Search):
            return {}
        wanted = self._wanted(pairs)[0]
        vectors = self._vectors(pairs.coefficients[:, wanted])
        return {int(i): operator.error_along(y / self.plan.space.norm(y)) for i, y in zip(wanted, vectors, strict=True)}

    def _vectors(self, coefficients: Float[np.ndarray, "m r"]) -> Iterator[Float[Tensor, " n"]]:
        """Yield combinations of what is kept of the Krylov vectors, one at a time."""
        for column in torch.from_numpy(np.ascontiguousarray(coefficients)).T:
            yield self.lanczos.basis.combine(column[:, None])[0]

    def _overlaps(self, gradient: Float[Tensor, " n"]) -> Float[np.ndarray, " m"]:
        if isinstance(self.lanczos, Search):
            overlaps: Float[np.ndarray, " m"] = self.lanczos.basis.overlaps(gradient).numpy()
            return overlaps
        return np.array(self.overlaps)

    def _corrected(
        self,
        pairs: RitzPairs,
        chosen: Int[np.ndarray, " r"],
        eigenvalues: list[Eigenvalue],
        d: float,
        estimates: tuple[Estimate, Estimate],
    ) -> tuple[list[Eigenvalue], Bool[np.ndarray, " r"]]:
        trace, squared_norm = estimates
        known = np.union1d(np.flatnonzero(self._relative(pairs) <= self.plan.tolerance), chosen)
        places = np.searchsorted(known, chosen)
        values, seen = (a[places] for a in corrected(pairs.values[known], d, trace.value, squared_norm.value))
        errors = sampling_error(values, d, trace, squared_norm)
        fixed = [
            Eigenvalue(
                value=float(value),
                residual=e.residual,
                error=float(error) + e.error,
                converged=e.converged and bool(outside),
                raw=e.value,
                gradient_share=e.gradient_share,
            )
            for e, value, error, outside in zip(eigenvalues, values, errors, seen, strict=True)
        ]
        return fixed, seen

    def _sketches(self, coefficients: Float[np.ndarray, "m r"]) -> Float[Tensor, "r d"]:
        basis, weights = self.lanczos.basis, torch.from_numpy(np.ascontiguousarray(coefficients))
        if weights.shape[1] == 0:
            return torch.zeros(0, self.plan.sketch.shape[0], dtype=torch.float32, device="cpu")
        if self.plan.method != "full":
            return basis.combine(weights).to("cpu", torch.float32)
        columns = [sketched(self.plan.sketch, self.plan.space, vector) for vector in self._vectors(coefficients)]
        return torch.stack(columns).to("cpu", torch.float32)

    def _vectors_held(self) -> int:
        gradient = int(self.gradient is not None)
        if self.plan.method != "full":
            return {"sketched-basis": 4, "sketched-operator": 2}[self.plan.method] + gradient
        return min(len(self.lanczos), self.plan.room) + max(len(self._heads()), 1) + 2 + gradient

    def _heads(self) -> list[Tensor]:
        return self.lanczos.heads if isinstance(self.lanczos, Search) else []

    def _confidence(self, pairs: RitzPairs) -> float | None:
        if self.plan.method != "full" or not isinstance(self.lanczos, Search):
            return None
        wanted, unsettled, _ = self._wanted(pairs)
        if self.lanczos.closed:
            return 1.0
        return 0.0 if len(unsettled) else 1 - self.lanczos.doubt(*self._bounds(pairs, wanted))

    def _notes(self, unsettled: int, confidence: float | None) -> list[str]:
        steps, plan, notes = len(self.lanczos), self.plan, list(self.notes)
        if self.lanczos.closed:
            what = "every distinct eigenvalue" if plan.method == "sketched-basis" else "every eigenvalue"
            notes.append(f"The Krylov space closed after {steps} products: {what} has been found.")
        if unsettled and not self.lanczos.closed:
            notes.append(
                f"{unsettled} of the values asked for had not settled to {plan.tolerance:g}"
                f" after {steps} products; raise steps."
            )
        if plan.method == "sketched-basis":
            notes.append(
                "A repeated eigenvalue may stand here once: this route does not count copies, method='full' does."
            )
        if plan.method != "full" and differenced(plan.inner) is not None:
            notes.append(
                "Products are central differences. The errors stated leave out their truncation, which method='full'"
                " measures."
            )
        if plan.method == "sketched-operator" and 2 * plan.sketch.shape[0] >= plan.inner.n:
            notes.append(
                f"d = {plan.sketch.shape[0]} is no less than half of n = {plan.inner.n}: method='full' is exact, and"
                " its products cost no more."
            )
        if confidence is not None and confidence < 1 - _DOUBT:
            notes.append(f"The search for further copies was cut short after {steps} products; raise steps.")
        return notes


def require_same_map(plan: Plan, gradient: Float[Tensor, " m"] | None, first: tuple[float, float], source: str) -> None:
    """Check by one product that a finished run was of this very operator.

    The first product of every run is that with its start vector. It finds what facts do not tell: a function that
    reads another global variable, or an operator of the user's own.

    Raises:
        FingerprintError: the first coefficients of the recurrence are others.
    """
    q = start(plan, gradient)
    w = plan.operator(q)
    size = plan.space.norm(w)
    own = plan.space.dot(q, w)
    rest = plan.space.norm(w.sub(q, alpha=own))
    if not max(abs(own - first[0]), abs(rest - first[1])) <= _SAME * max(size, math.hypot(*first)):
        now, then = (f"{a:.6g}, {b:.6g}" for a, b in ((own, rest), first))
        require_same({"the first product": now}, {"the first product": then}, source)


def require_same_gradient(plan: Plan, gradient: Float[Tensor, " m"] | None, mark: float | None, source: str) -> None:
    """Check that a run was given this very gradient.

    Raises:
        FingerprintError: it was another.
    """
    if gradient is None or mark is None:
        return
    own = gradient_mark(plan, gradient)
    if not abs(own - mark) <= _SAME * plan.space.norm(gradient) / math.sqrt(plan.space.n):
        require_same({"the gradient's first overlap": own}, {"the gradient's first overlap": mark}, source)


def gradient_mark(plan: Plan, gradient: Float[Tensor, " m"]) -> float:
    """Return one number that other gradients do not have: the overlap with a random direction."""
    return plan.space.dot(gradient, random_start(plan))


def recurrence(plan: Plan, first: Float[Tensor, " m"], file: RunFile) -> Lanczos | Search:
    """Return the recurrence that a plan asks for."""
    if plan.method == "sketched-basis":
        return Lanczos(plan.operator, sketched_basis(plan, file.path), first, plan.seed)
    return Search(plan.operator, first, plan.seed, plan.room, plan.which)


def sketched_basis(plan: Plan, run: Path | None) -> SketchedBasis:
    """Return the memory of a recurrence that keeps sketches, of a run that may be kept in a file."""
    if plan.scratch is None:
        return SketchedBasis(plan.sketch, plan.space)
    path = None if run is None else kept_file(plan.scratch, run)
    return OrthogonalizedBasis(plan.sketch, plan.space, plan.scratch, path)


def random_start(plan: Plan) -> Float[Tensor, " m"]:
    """Return the random direction that every run of a plan begins with."""
    return start_vector(plan.space, plan.seed, "start", plan.dtype, plan.device)


def start(plan: Plan, gradient: Float[Tensor, " m"] | None) -> Float[Tensor, " m"]:
    """Return where the recurrence begins: a random direction, and the gradient's where one is given.

    The gradient lies in the leading eigenspaces by more than its share, which saves H1 3 of 63 products. The random
    part makes sure that an eigenspace which the gradient avoids, by a symmetry say, is met.
    """
    z = random_start(plan)
    if gradient is None:
        return z
    z.add_(gradient, alpha=1 / plan.space.norm(gradient))
    return z.div_(plan.space.norm(z))


def _both_ends(values: Float[np.ndarray, " r"], k: int, zero: float) -> Int[np.ndarray, " c"]:
    """Return the places of the k largest positive and the k most negative values, of values that descend."""
    positive, negative = np.flatnonzero(values > zero), np.flatnonzero(values < -zero)
    return np.concatenate([positive[:k], negative[max(len(negative) - k, 0) :]])


def _undetected(
    eigenvalues: list[Eigenvalue], seen: Bool[np.ndarray, " r"], threshold: float, squared_norm: float, n: int
) -> list[str]:
    within = [abs(e.value) for e, outside in zip(eigenvalues, seen, strict=True) if not outside]
    if not within:
        return []
    enough = min(least_d(max(within), squared_norm, 0.1), n)
    return [
        f"{len(within)} values lie within the bulk that sketching makes of all others (detection threshold"
        f" {threshold:.3g} at this d); d = {enough} would show the largest of them."
    ]


def _leaders(pairs: RitzPairs) -> str:
    order = np.argsort(-np.abs(pairs.values))[:3]
    return "λ " + " ".join(f"{v:.4g}" for v in pairs.values[order])


def checked_gradient(gradient: Float[Tensor, " n"] | None, plan: Plan) -> Float[Tensor, " m"] | None:
    """Return the gradient where the Krylov vectors live, or None of one that is zero."""
    if gradient is None:
        return None
    if gradient.shape != (plan.inner.n,):
        raise InputError(f"a gradient of shape {list(gradient.shape)}", f"[{plan.inner.n}]", "Flatten it")
    gradient = gradient.detach().to(plan.device, plan.dtype)
    gradient = plan.sketch(gradient) if plan.method == "sketched-operator" else plan.space.cut(gradient)
    length = plan.space.norm(gradient)
    if not math.isfinite(length):
        raise InputError("a gradient that is not finite", "a vector of finite numbers", "Leave it out")
    return gradient if length > 0 else None


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
