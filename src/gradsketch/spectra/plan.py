"""Decide how a spectrum is computed, and refuse what cannot be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import matmul
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap, widened
from gradsketch.sketches.affd import AFFD
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.space import Space
from gradsketch.spectra.results import Method, Which
from gradsketch.spectra.scratch import check_scratch

__all__ = ["Identity", "Plan", "check_operator", "home", "make_plan"]

_LEAST_D = 4096
# From this k on, three-term Lanczos spends most of its products on copies.
_MANY = 100
# Every copy of an eigenvalue takes a chain of its own, so where copies are counted more steps are allowed by default.
_COPIES = 3


class Identity(LinearMap):
    """The sketch of vectors that are short already: themselves."""

    fingerprint = "identity"

    def __init__(self, n: int) -> None:
        self.shape, self.is_self_adjoint = (n, n), True

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return x.clone()

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return w.clone()


@dataclass(frozen=True)
class Plan:
    """What is computed: the Krylov space of ``operator``, of which eigenvectors are kept as sketched by ``sketch``.

    For the sketched operator, ``operator`` is Phi H Phiᵀ and ``inner`` is H; otherwise both are H.
    """

    operator: LinearMap
    inner: LinearMap
    sketch: Sketch | Identity
    method: Method
    reason: str
    k: int
    which: Which
    steps: int
    room: int
    tolerance: float
    seed: int
    dtype: torch.dtype
    device: torch.device
    scratch: Path | None = None

    @property
    def wanted(self) -> int:
        """How many eigenvalues are asked for, of both signs together."""
        return min(self.k if self.which == "magnitude" else 2 * self.k, self.space.n)

    @property
    def space(self) -> Space:
        """The space that the Krylov vectors are of."""
        return self.operator.space

    def facts(self) -> dict[str, Any]:
        """Return what a run and the one that takes it up must have in common.

        How many eigenvalues are asked for, and how exact, is not part of it: a run may be taken further.
        """
        names = ("method", "seed", "dtype", "n", "sketch")
        values = (self.method, self.seed, str(self.dtype), self.inner.n, self.sketch.fingerprint)
        return {**dict(zip(names, values, strict=True)), **self._held(), **self.inner.facts()}

    def _held(self) -> dict[str, Any]:
        """Return what decides the course: the vectors held and which of them restarts keep, or those on disk."""
        if self.method != "sketched-basis":
            return {"room": self.room, "which": self.which}
        return {} if self.scratch is None else {"orthogonalized": True}

    def request(self) -> dict[str, Any]:
        """Return what is asked for."""
        return {"k": self.k, "which": self.which, "steps": self.steps, "tolerance": self.tolerance}


def make_plan(
    operator: LinearMap,
    k: int,
    which: Which,
    method: Literal["auto"] | Method,
    sketch: Sketch | int | None,
    steps: int | None,
    tolerance: float,
    memory: int,
    seed: int,
    scratch: str | Path | None = None,
) -> Plan:
    """Return the plan for ``spectrum``'s arguments.

    Raises:
        InputError: an argument is out of range, or the operator is not a self-adjoint map.
    """
    _check(operator, k, which, method, steps, tolerance, sketch)
    dtype, device = home(operator)
    most = steps or max(100, 10 * k if which == "magnitude" else 20 * k)
    plan = Plan(operator, operator, Identity(1), "full", "", k, which, most, most, tolerance, seed, dtype, device)
    plan = replace(plan, steps=min(most, operator.n))
    split = split_sketched(operator)
    if split is not None:
        return _of_sketched(plan, *split, method)
    fit = memory // (operator.shared().space.most * dtype.itemsize)
    method, reason = _choose(plan, fit, scratch) if method == "auto" else (method, "as asked")
    if method == "full":
        plan = _with_room(plan, fit, most if steps else _COPIES * most)
    plan = _finish(replace(plan, reason=reason), method, sketch)
    return plan if scratch is None else _with_scratch(plan, Path(scratch))


def split_sketched(operator: LinearMap) -> tuple[Sketch, LinearMap] | None:
    """Return (phi, H) of an operator that was written phi @ H @ phi.T, and None of others."""
    factors: tuple[LinearMap, ...] = getattr(operator, "factors", ())
    if len(factors) < 3 or not isinstance(factors[0], Sketch) or not operator.is_self_adjoint:
        return None
    return factors[0], reduce(matmul, factors[1:-1])


def _least_room(plan: Plan) -> int:
    """Return how many vectors restarts need, so that they cost few products more than a basis without bounds."""
    return min(2 * plan.wanted + 20, plan.operator.n)


def _with_room(plan: Plan, fit: int, steps: int) -> Plan:
    steps = min(steps, plan.operator.n)
    return replace(plan, steps=steps, room=min(max(fit, _least_room(plan)), steps))


def _with_scratch(plan: Plan, scratch: Path) -> Plan:
    if plan.method != "sketched-basis":
        return plan
    check_scratch(scratch, plan.steps, plan.space)
    return replace(plan, scratch=scratch)


def _choose(plan: Plan, fit: int, scratch: str | Path | None) -> tuple[Method, str]:
    n, least = plan.operator.n, _least_room(plan)
    if fit >= least:
        return "full", f"{min(fit, n):,} Krylov vectors of n = {n} fit in memory, and {least} are enough"
    why = f"{least} Krylov vectors of n = {n} would take {least * n * plan.dtype.itemsize / 2**30:.3g} GiB"
    if scratch is not None:
        return "sketched-basis", f"{why}; their sketches are kept instead, and a byte a number on disk"
    if plan.k >= _MANY:
        return "sketched-operator", f"{why}, and k = {plan.k} eigenvalues even more products"
    return "sketched-basis", f"{why}; their sketches are kept instead"


def _finish(plan: Plan, method: Method, sketch: Sketch | int | None) -> Plan:
    n = plan.operator.n
    if isinstance(sketch, Sketch) and sketch.n != n:
        raise InputError(f"{sketch!r} for an operator of n={n}", f"a sketch with n={n}", f"Type AFFD({n}, 4096)")
    if method == "sketched-operator":
        phi = sketch if isinstance(sketch, Sketch) else AFFD(n, min(sketch or _operator_d(plan), n), seed=plan.seed)
        return _of_sketched(replace(plan, operator=phi @ plan.operator @ phi.T), phi, plan.operator, method)
    kept = sketch if isinstance(sketch, Sketch) else _sketch_of_vectors(plan, sketch)
    d = kept.shape[0]
    if method == "sketched-basis" and d < min(plan.steps, n):
        raise InputError(
            f"sketches of d={d} for up to {plan.steps} Krylov vectors",
            "d of at least the number of steps: in fewer dimensions, copies of eigenvalues are not told from others",
            f"Leave the sketch out, or type steps={d}",
        )
    return replace(plan, operator=plan.operator.shared(), method=method, sketch=kept)


def _sketch_of_vectors(plan: Plan, d: int | None) -> Sketch | Identity:
    n = plan.operator.n
    d = d or max(_LEAST_D, 1 << (4 * plan.steps - 1).bit_length())
    if d >= n:
        return Identity(n)
    space = plan.operator.shared().space
    # One tensor of a shared vector after another: its whole may not fit.
    shapes = {str(place): share.shape for place, share in enumerate(space.shares)}
    return BlockSum(shapes, d, seed=plan.seed) if space.is_shared else AFFD(n, d, seed=plan.seed)


def _operator_d(plan: Plan) -> int:
    """Return a size at which sampling noise is 1 % and the Krylov space is far from filling R^d."""
    return max(1 << 15, 1 << (8 * plan.steps - 1).bit_length())


def _of_sketched(plan: Plan, phi: Sketch, inner: LinearMap, method: str) -> Plan:
    if method not in ("auto", "sketched-operator"):
        raise InputError(
            f"method={method!r} for {plan.operator!r}",
            "method='sketched-operator', since the operator is sketched already",
            f"Leave method out, or give {inner!r} itself",
        )
    if plan.k > phi.d:
        raise InputError(f"k={plan.k} eigenvalues of an operator sketched to d={phi.d}", "k ≤ d", "Raise d or lower k")
    return replace(
        plan,
        inner=inner,
        sketch=phi,
        method="sketched-operator",
        reason=plan.reason or f"the operator is sketched to d = {phi.d}",
        steps=min(plan.steps, phi.d),
        room=min(plan.steps, phi.d),
    )


def home(operator: LinearMap) -> tuple[torch.dtype, torch.device]:
    """Return precision and place of the vectors made for an operator: float32 unless it works in float64."""
    dtype = widened(operator.dtype)
    return dtype, torch.device("cpu") if operator.device is None else torch.device(operator.device)


def check_operator(operator: Any) -> None:
    """Refuse what is not a self-adjoint map.

    Raises:
        InputError: always then.
    """
    if not isinstance(operator, LinearMap):
        raise InputError(
            f"an operator of type {type(operator).__name__}",
            "a self-adjoint LinearMap",
            "Build one with gradsketch.hessian(model, task, data)",
        )
    if not operator.is_self_adjoint or operator.shape[0] != operator.shape[1]:
        raise InputError(
            f"{operator!r} of shape {operator.shape}, not known to be self-adjoint",
            "a map that is its own adjoint",
            "Use hessian, gauss_newton or fisher, or set is_self_adjoint = True on a map of your own",
        )


def _check(
    operator: LinearMap, k: int, which: str, method: str, steps: int | None, tolerance: float, sketch: Any
) -> None:
    check_operator(operator)
    if k < 1 or k > operator.n:
        raise InputError(f"k={k} eigenvalues of an operator of n={operator.n}", "1 ≤ k ≤ n", "Lower k")
    if which not in get_args(Which):
        raise InputError(f"which={which!r}", "'magnitude' or 'both'", "Leave it out for 'magnitude'")
    if method != "auto" and method not in get_args(Method):
        raise InputError(f"method={method!r}", f"'auto' or one of {get_args(Method)}", "Leave it out for 'auto'")
    if steps is not None and steps < k:
        raise InputError(f"steps={steps} for k={k} eigenvalues", "at least k steps", "Leave steps out")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance}", "a number between 0 and 1", "Type tolerance=1e-3")
    if isinstance(sketch, int) and sketch < 1:
        raise InputError(f"a sketch of d={sketch}", "at least one dimension", "Leave it out")
