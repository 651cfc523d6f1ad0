"""What a spectrum computation gives back: eigenvalues with their errors, what they cost, and how they were found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import t as student
from torch import Tensor

from gradsketch.report.numbers import numbers_figure
from gradsketch.report.spectrum import spectrum_figure
from gradsketch.results import Result
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OUTLIER", "Eigenvalue", "Estimate", "Method", "Spectrum", "Which"]

Method = Literal["sketched-basis", "sketched-operator", "full"]
Which = Literal["magnitude", "both"]

# [P], §5.3: an eigenvalue above this share of the largest is an outlier.
OUTLIER = 0.2


@dataclass(frozen=True, eq=False)
class Estimate(Result):
    """An estimated number, the standard error of the estimate, and what it cost.

    ``samples`` independent numbers were averaged; ``products`` counts products with the operator.
    """

    value: float
    standard_error: float
    samples: int = 0
    products: int = 0
    seconds: float = 0.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval at ``level``, by Student's t distribution."""
        margin = self.standard_error * float(student.ppf((1 + level) / 2, max(self.samples - 1, 1)))
        return self.value - margin, self.value + margin

    def summary(self) -> str:
        return f"{self.value:.6g} ± {self.standard_error:.2g} ({self.products} products, {self.seconds:.1f} s)"

    def __str__(self) -> str:
        """Return the numbers under their names."""
        header = ["value", "standard error", "samples", "products", "seconds"]
        cells = [f"{self.value:.6g}", f"{self.standard_error:.2g}", str(self.samples), str(self.products)]
        return "\n".join(aligned(header, [[*cells, f"{self.seconds:.1f}"]]))

    def _figure(self) -> Figure:
        low, high = self.value - self.standard_error, self.value + self.standard_error
        return numbers_figure({"estimate": (self.value, low, high)}, "value ± standard error")


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue and how far to trust it; ``converged`` says whether it has settled.

    ``residual`` is ``‖H y − λ y‖ / |λ|`` for the unit vector y found. ``error`` is absolute: for the sketched operator
    one standard error, otherwise the norm of the residual, which bounds it; where no other eigenvalue is near it is
    about the square of that over their distance. ``raw`` is the sketched operator's own eigenvalue, before the
    correction. ``gradient_share`` is the squared cosine between eigenvector and gradient.
    """

    value: float
    residual: float
    error: float
    converged: bool
    raw: float | None = None
    gradient_share: float | None = None


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """The outer eigenvalues of a self-adjoint map, from both ends, descending.

    ``k`` eigenvalues were asked for, from the ends that ``which`` names; ``method`` says how they were found, and
    ``reason`` why so. One has settled where its residual is below ``tolerance``, or, of a sketched operator, where it
    exceeds ``threshold``. ``trace`` and ``squared_norm`` (of all eigenvalues' squares) are what the correction needed.
    ``eigenvalues`` holds up to k positive and k negative ones; ``values``, ``residuals``, ``errors`` and ``converged``
    are those that were asked for. ``sketches`` holds d numbers for each eigenvector, ``sketch`` the fingerprint of the
    map that made them; sketches with equal fingerprints can be compared. ``confidence`` is the chance that no
    eigenvalue more than 0.1 % beyond the last one asked for was missed, copies of repeated ones included; None where
    the route cannot count copies, so that a value stands for its eigenspace once. ``hvps`` counts products with the
    operator, ``settled_after`` those until all values asked for had settled, ``room`` the most Krylov vectors held,
    ``vectors_held`` vectors of length n held at once besides the operator's own, ``disk_bytes`` those of the vectors
    kept in a scratch folder, ``copies`` the eigenvalues found again and dropped, ``noise`` how far products are from
    those of a symmetric map, ``notes`` what a reader should know. ``alphas`` and ``betas`` are the tridiagonal matrix
    of the recurrence, and ``columns`` those of its eigenvectors that are given: ``eigenvectors`` needs them.
    """

    derived = ("r_neg", "outliers", "values")

    eigenvalues: tuple[Eigenvalue, ...]
    k: int
    which: Which
    method: Method
    reason: str
    n: int
    d: int
    tolerance: float
    seed: int
    steps: int
    hvps: int
    settled_after: int | None
    room: int
    seconds: float
    peak_bytes: int
    vectors_held: int
    copies: int
    confidence: float | None
    noise: float
    notes: tuple[str, ...]
    trace: Estimate | None
    squared_norm: Estimate | None
    threshold: float | None
    sketch: str
    alphas: tuple[float, ...] = field(repr=False)
    betas: tuple[float, ...] = field(repr=False)
    columns: tuple[int, ...] = field(repr=False)
    sketches: Float[Tensor, "r d"] = field(repr=False)
    disk_bytes: int = 0

    @property
    def positive(self) -> tuple[Eigenvalue, ...]:
        """The positive eigenvalues, largest first."""
        return tuple(e for e in self.eigenvalues if e.value > 0)

    @property
    def negative(self) -> tuple[Eigenvalue, ...]:
        """The negative eigenvalues, most negative first."""
        return tuple(e for e in reversed(self.eigenvalues) if e.value < 0)

    @property
    def asked(self) -> tuple[Eigenvalue, ...]:
        """What was asked for: the k largest by magnitude in that order, or all of both sides descending."""
        if self.which == "both":
            return self.eigenvalues
        return tuple(sorted(self.eigenvalues, key=lambda e: -abs(e.value))[: self.k])

    @property
    def values(self) -> Float[np.ndarray, " r"]:
        """The eigenvalues asked for."""
        return np.array([e.value for e in self.asked], dtype=np.float64)

    @property
    def residuals(self) -> Float[np.ndarray, " r"]:
        """Relative residuals of the eigenvalues asked for."""
        return np.array([e.residual for e in self.asked], dtype=np.float64)

    @property
    def errors(self) -> Float[np.ndarray, " r"]:
        """Absolute errors of the eigenvalues asked for: bounds, or standard errors of the sketched operator."""
        return np.array([e.error for e in self.asked], dtype=np.float64)

    @property
    def converged(self) -> Bool[np.ndarray, " r"]:
        """Which of the eigenvalues asked for have converged."""
        return np.array([e.converged for e in self.asked], dtype=bool)

    @property
    def r_neg(self) -> float:
        """R_NEG of [P]: the lowest negative over the largest positive eigenvalue, as a magnitude."""
        if not self.negative:
            return 0.0
        return -self.negative[0].value / self.positive[0].value if self.positive else math.inf

    @property
    def ratios(self) -> Float[np.ndarray, " r"]:
        """R_n of [P]: the n-th positive eigenvalue over the first, n = 1, 2, …"""
        values = np.array([e.value for e in self.positive], dtype=np.float64)
        return values / values[:1]

    @property
    def outliers(self) -> int:
        """How many positive eigenvalues exceed a fifth of the largest ([P]); k of them means at least k."""
        return int((self.ratios > OUTLIER).sum())

    @property
    def gradient_in_outliers(self) -> float | None:
        """Share of the gradient's squared norm inside the outliers' eigenspace, where a gradient was given.

        Lengths of eigenvectors that are known from sketches are off by some 1/√d, so that shares may sum to more than
        all; it is 1 then.
        """
        shares = [e.gradient_share for e in self.positive[: self.outliers]]
        return None if None in shares or not shares else min(1.0, float(sum(s for s in shares if s is not None)))

    def summary(self) -> str:
        top = f"largest {self.positive[0].value:.4g}, " if self.positive else ""
        settled = f"{sum(e.converged for e in self.eigenvalues)} of {len(self.eigenvalues)} eigenvalues settled"
        return f"{top}R_NEG {self.r_neg:.3f}, {self.outliers} outliers; {settled} in {self.hvps} products"

    def _figure(self) -> Figure:
        return spectrum_figure(self, OUTLIER)

    def __str__(self) -> str:
        """Return a table for the terminal."""
        share = any(e.gradient_share is not None for e in self.eigenvalues)
        head = f"{'eigenvalue':>14}  {'± error':>9}  {'residual':>9}  {'':9}" + ("  of gradient" if share else "")
        lines = [_line(e, share) for e in self.eigenvalues]
        r_neg = f"R_NEG {self.r_neg:.3f}, {self.outliers} outlier(s) above {OUTLIER:.0%} of the largest"
        cost = f"{self.hvps} products, {self.seconds:.1f} s, {self.vectors_held} vectors of n = {self.n} held"
        cost += f", {self.disk_bytes / 1e9:.3g} GB of them on disk" if self.disk_bytes else ""
        return "\n".join([head, *lines, r_neg, cost, f"{self.method}: {self.reason}", *self.notes])


def _line(e: Eigenvalue, share: bool) -> str:
    state = "" if e.converged else "unsettled"
    raw = "" if e.raw is None else f"  raw {e.raw:.6g}"
    tail = "" if not share or e.gradient_share is None else f"  {e.gradient_share:>11.2%}"
    return f"{e.value:>14.6g}  {e.error:>9.1e}  {e.residual:>9.1e}  {state:9}{tail}{raw}"
