"""Eigenvalues of a map whose Krylov basis would not fit: the public function and its loop."""

from __future__ import annotations

import math
import sys
import time
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
from gradsketch.linear_map import LinearMap
from gradsketch.progress import hidden
from gradsketch.sketches.base import Sketch
from gradsketch.spectra.bias import corrected, detection_threshold, least_d, sampling_error
from gradsketch.spectra.krylov import FullBasis, SketchedBasis
from gradsketch.spectra.lanczos import Lanczos, check_self_adjoint, dot, norm, start_vector
from gradsketch.spectra.moments import moments
from gradsketch.spectra.plan import Plan, make_plan
from gradsketch.spectra.results import Eigenvalue, Estimate, Method, Spectrum, Which
from gradsketch.spectra.resume import RunFile
from gradsketch.spectra.ritz import RitzPairs, ritz_pairs

__all__ = ["require_same_map", "spectrum"]

# Relative difference of two evaluations of one product: central differences in float32 reach 1e-3.
_SAME = 0.01


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
    progress: bool | None = None,
) -> Spectrum:
    """Return the outermost eigenvalues of a self-adjoint map, positive and negative, by Lanczos' method.

    Three routes, of which "auto" takes one and says why:

    * "sketched-basis": a three-term recurrence in R^n that holds four vectors. Of the Krylov vectors only sketches
      are kept, d numbers each: they tell ghosts from eigenvalues and give the eigenvectors in sketch space. Values
      are unbiased. A repeated eigenvalue is found at least once and never more often than it occurs.
    * "sketched-operator": Phi H Phiᵀ in R^d with full re-orthogonalisation ([P], §5.3), for hundreds of eigenvalues;
      what ``spectrum(phi @ H @ phi.T)`` does. Values are corrected to first order for the bias that sketching adds,
      by ``probes`` more products (0: not corrected); ``raw`` values stand beside them.
    * "full": re-orthogonalisation against all Krylov vectors, kept in R^n, where they fit in ``memory`` bytes.

    Stops when the eigenvalues asked for have relative residuals ``‖Hy − λy‖/|λ|`` below ``tolerance``, or after
    ``steps`` products; what has not settled by then is marked so.

    Args:
        operator: self-adjoint map on vectors ``[n]``.
        k: how many eigenvalues.
        which: the k largest by "magnitude", or k positive and k negative with "both".
        method: the route.
        sketch: a sketch of vectors ``[n]``, or its size d.
        steps: most products the recurrence may take; by default 10 k, 20 k for both sides, at least 100.
        tolerance: relative residual of a converged eigenvalue.
        gradient: vector ``[n]`` whose share in each eigenvector is wanted.
        probes: products spent on tr H and ‖H‖_F² by the sketched operator.
        seed: of the start vector and of the sketch.
        memory: bytes that the full basis may take under "auto".
        resume: file that holds the state of the run. A run that finds its file goes on from there.
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
    plan = make_plan(operator, k, which, method, sketch, steps, tolerance, memory, seed)
    gradient = _checked_gradient(gradient, plan)
    facts = {} if resume is None else plan.facts() | {"gradient": gradient is not None}
    run = _Run.begin(plan, gradient, RunFile(resume, facts))
    pairs = run.iterate(progress)
    estimates: tuple[Estimate, Estimate] | None = None
    if plan.method == "sketched-operator" and probes > 0:
        estimates = moments(plan.inner, probes, seed, plan.dtype, plan.device)
        run.products += probes
    return run.result(pairs, estimates)


@dataclass
class _Run:
    """A Lanczos run with its costs."""

    plan: Plan
    lanczos: Lanczos
    gradient: Float[Tensor, " n"] | None
    file: RunFile
    overlaps: list[float] = field(default_factory=list)
    products: int = 0
    seconds: float = 0.0
    safe: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, plan: Plan, gradient: Float[Tensor, " n"] | None, file: RunFile) -> _Run:
        """Start, or take up what the file holds."""
        basis = SketchedBasis(plan.sketch) if plan.method == "sketched-basis" else FullBasis()
        saved = file.load()
        start = torch.empty(0) if saved else _start(plan)
        run = cls(plan, Lanczos(plan.operator, basis, start, plan.seed), gradient, file)
        if saved:
            run.lanczos.restore(saved["lanczos"], plan.device)
            run.overlaps, run.products, run.seconds = saved["overlaps"], saved["products"], saved["seconds"]
            require_same_gradient(plan, gradient, run.overlaps, str(file.path))
        return run

    def iterate(self, progress: bool | None) -> RitzPairs:
        """Step until the wanted eigenvalues have settled, the steps are used up or the Krylov space is exhausted."""
        lanczos, plan, clock = self.lanczos, self.plan, time.monotonic()
        before, check_at = self.seconds, max(plan.k, len(lanczos))
        pairs = self._pairs() if len(lanczos) >= plan.k else None
        settled = pairs is not None and self._settled(pairs)
        if settled or lanczos.closed or len(lanczos) >= plan.steps:
            self._check_finished()
        with tqdm(total=plan.steps, initial=len(lanczos), unit="HVP", disable=hidden(progress), leave=False) as bar:
            while not settled and len(lanczos) < plan.steps and not lanczos.closed:
                self._step()
                self.seconds = before + time.monotonic() - clock
                self._keep()
                bar.update()
                if len(lanczos) >= check_at:
                    pairs = self._pairs()
                    check_at = len(lanczos) + max(1, len(lanczos) // 16)
                    bar.set_postfix_str(_leaders(pairs))
                    settled = self._settled(pairs)
        self._save()
        return pairs if pairs is not None and len(pairs.coefficients) == len(lanczos) else self._pairs()

    def _check_finished(self) -> None:
        """Compare one product with those of a run that needs no more of them; others are compared at every step."""
        if self.lanczos.alphas:
            require_same_map(self.plan, self.lanczos.alphas[0], self.lanczos.betas[0], str(self.file.path))

    def _step(self) -> None:
        lanczos = self.lanczos
        try:
            if self.gradient is not None:
                self.overlaps.append(dot(self.gradient, lanczos.q))
            product = None
            if len(lanczos) == 0:
                product = self.plan.operator(lanczos.q)
                check_self_adjoint(self.plan.operator, lanczos.q, product, self.plan.seed)
                self.products += 1
            lanczos.step(product)
            self.products += 1
        except KeyboardInterrupt:
            self._save()
            raise

    def _save(self) -> None:
        if self.safe:  # else no step has been made, and the file is as it was found
            self.file.save(self.safe)

    def _keep(self) -> None:
        if self.file.path is None:
            return
        self.safe = {
            "lanczos": self.lanczos.state(),
            "overlaps": list(self.overlaps),
            "products": self.products,
            "seconds": self.seconds,
        }
        self.file.save_sometimes(self.safe)

    def _pairs(self) -> RitzPairs:
        lanczos = self.lanczos
        return ritz_pairs(lanczos.alphas, lanczos.betas, lanczos.basis, lanczos.noise)

    def _settled(self, pairs: RitzPairs) -> bool:
        chosen = _both_ends(pairs.values, self.plan.k, self._zero())
        if self.plan.which == "magnitude":
            chosen = chosen[np.argsort(-np.abs(pairs.values[chosen]))][: self.plan.k]
        enough = len(chosen) >= (self.plan.k if self.plan.which == "magnitude" else 2 * self.plan.k)
        return enough and bool((self._relative(pairs)[chosen] <= self.plan.tolerance).all())

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
        threshold, notes = None, self._notes(eigenvalues)
        if estimates is not None:
            threshold = detection_threshold(estimates[1].value, plan.sketch.shape[0])
            eigenvalues, seen = self._corrected(pairs, chosen, eigenvalues, estimates)
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
            seconds=self.seconds,
            peak_bytes=_peak_bytes(plan.device),
            vectors_held=self._vectors_held(),
            copies=pairs.copies,
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
        )

    def _eigenvalues(self, pairs: RitzPairs, chosen: Int[np.ndarray, " r"]) -> list[Eigenvalue]:
        relative = self._relative(pairs)
        shares: list[float | None] = [None] * len(chosen)
        if self.gradient is not None:
            overlaps = np.array(self.overlaps) @ pairs.coefficients[:, chosen]
            shares = list(overlaps**2 / dot(self.gradient, self.gradient))
        return [
            Eigenvalue(
                value=float(pairs.values[i]),
                residual=float(relative[i]),
                error=float(pairs.errors[i]),
                converged=bool(relative[i] <= self.plan.tolerance),
                gradient_share=None if share is None else float(share),
            )
            for i, share in zip(chosen, shares, strict=True)
        ]

    def _corrected(
        self,
        pairs: RitzPairs,
        chosen: Int[np.ndarray, " r"],
        eigenvalues: list[Eigenvalue],
        estimates: tuple[Estimate, Estimate],
    ) -> tuple[list[Eigenvalue], Bool[np.ndarray, " r"]]:
        d, (trace, squared_norm) = self.plan.sketch.shape[0], estimates
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
            return torch.zeros(0, self.plan.sketch.shape[0])
        if self.plan.method != "full":
            return basis.combine(weights).to("cpu", torch.float32)
        columns = [self.plan.sketch(basis.combine(column[:, None])[0]) for column in weights.T]
        return torch.stack(columns).to("cpu", torch.float32)

    def _vectors_held(self) -> int:
        gradient = int(self.gradient is not None)
        held = {"sketched-basis": 4, "sketched-operator": 2, "full": 4 + len(self.lanczos)}
        return held[self.plan.method] + gradient

    def _notes(self, eigenvalues: list[Eigenvalue]) -> list[str]:
        notes = []
        if self.lanczos.closed:
            notes.append(
                f"The Krylov space closed after {len(self.lanczos)} products: every distinct eigenvalue has been found."
            )
        unsettled = sum(not e.converged for e in eigenvalues)
        if unsettled and not self.lanczos.closed:
            notes.append(
                f"{unsettled} of {len(eigenvalues)} values had not settled to {self.plan.tolerance:g}"
                f" after {len(self.lanczos)} products; raise steps."
            )
        return notes


def require_same_map(plan: Plan, alpha: float, beta: float, source: str) -> None:
    """Check by one product that a finished run was of this very operator.

    The first product of every run is that with its start vector, which seed and n decide. It finds what facts do not
    tell: a function that reads another global variable, or an operator of the user's own.

    Raises:
        FingerprintError: the first coefficients of the recurrence are others.
    """
    q = _start(plan)
    w = plan.operator(q)
    size = norm(w)
    own = dot(q, w)
    rest = norm(w.sub(q, alpha=own))
    if not max(abs(own - alpha), abs(rest - beta)) <= _SAME * max(size, math.hypot(alpha, beta)):
        now, then = (f"{a:.6g}, {b:.6g}" for a, b in ((own, rest), (alpha, beta)))
        require_same({"the first product": now}, {"the first product": then}, source)


def require_same_gradient(
    plan: Plan, gradient: Float[Tensor, " n"] | None, overlaps: list[float], source: str | Path
) -> None:
    """Check that a run was given this very gradient, by its first overlap.

    Raises:
        FingerprintError: it was another.
    """
    if gradient is None or not overlaps:
        return
    own = dot(gradient, _start(plan))
    if not abs(own - overlaps[0]) <= _SAME * norm(gradient) / math.sqrt(plan.operator.n):
        require_same({"the gradient's first overlap": own}, {"the gradient's first overlap": overlaps[0]}, source)


def _start(plan: Plan) -> Float[Tensor, " n"]:
    return start_vector(plan.operator.n, plan.seed, "start", plan.dtype, plan.device)


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


def _checked_gradient(gradient: Float[Tensor, " n"] | None, plan: Plan) -> Float[Tensor, " m"] | None:
    """Return the gradient where the Krylov vectors live."""
    if gradient is None:
        return None
    if gradient.shape != (plan.inner.n,):
        raise InputError(f"a gradient of shape {list(gradient.shape)}", f"[{plan.inner.n}]", "Flatten it")
    gradient = gradient.detach().to(plan.device, plan.dtype)
    if plan.method == "sketched-operator":
        gradient = plan.sketch(gradient)
    if not norm(gradient) > 0:
        raise InputError("a gradient that is zero or not finite", "a finite non-zero vector", "Leave it out")
    return gradient


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
