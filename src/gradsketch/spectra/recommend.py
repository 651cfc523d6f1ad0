"""How large a sketched operator must be, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import eigh_tridiagonal

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap
from gradsketch.report.spectrum import recommendation_figure
from gradsketch.results import Result
from gradsketch.spectra.bias import least_d
from gradsketch.spectra.krylov import Forgetful
from gradsketch.spectra.lanczos import Lanczos, start_vector
from gradsketch.spectra.moments import moments
from gradsketch.spectra.plan import check_operator, home
from gradsketch.spectra.results import OUTLIER, Estimate
from gradsketch.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recommendation", "recommend_d"]


@dataclass(frozen=True, eq=False)
class Recommendation(Result):
    """A sketch size, what it was read off, and what that cost.

    ``largest`` is the largest eigenvalue by magnitude, ``trace`` the sum of all, ``squared_norm`` that of their
    squares. ``raw_bias`` is how far, relative to itself, the smallest eigenvalue wanted would be off without the
    correction. ``hvps`` counts products with the operator.
    """

    d: int
    largest: float
    trace: Estimate
    squared_norm: Estimate
    raw_bias: float
    hvps: int

    def summary(self) -> str:
        return f"d = {self.d:,}, where the uncorrected bias is {self.raw_bias:.2g} ({self.hvps} products)"

    def __str__(self) -> str:
        """Return what d was read off as a table for the terminal."""
        cells = [["largest eigenvalue", f"{self.largest:.4g}", ""]]
        named = {"trace": self.trace, "squared norm": self.squared_norm}
        cells += [[name, f"{e.value:.4g}", f"{e.standard_error:.2g}"] for name, e in named.items()]
        return "\n".join([*aligned(["", "value", "standard error"], cells), self.summary()])

    def _figure(self) -> Figure:
        return recommendation_figure(self)


def recommend_d(
    operator: LinearMap,
    *,
    share: float = OUTLIER,
    tolerance: float = 0.05,
    probes: int = 10,
    steps: int = 10,
    seed: int = 0,
) -> Recommendation:
    """Return the d at which eigenvalues above ``share`` of the largest are seen to ``tolerance`` in Phi H Phiᵀ.

    The largest comes from ``steps`` of Lanczos, tr H and ‖H‖_F² from ``probes`` products; d is the least power of two
    (at most n) with √(2/d) ≤ tolerance and twice the detection threshold below the smallest value wanted.

    Example:
        >>> eigenvalues = torch.cat([torch.tensor([100.0, 50.0]), torch.rand(998)])
        >>> net = torch.nn.Linear(1000, 1, bias=False)
        >>> def losses(model, batch):
        ...     return (model.weight[0].square() @ eigenvalues / 2).expand(len(batch))
        >>> H = gs.hessian(net, losses, torch.zeros(1, 1))
        >>> gs.recommend_d(H).d
        1000

    Raises:
        InputError: not a self-adjoint map, a number out of range, or an operator that maps everything to zero.
    """
    check_operator(operator)
    if not (0 < share <= 1 and 0 < tolerance < 1 and probes > 1 and steps > 0):
        raise InputError(
            f"share={share}, tolerance={tolerance}, probes={probes}, steps={steps}",
            "share and tolerance between 0 and 1, at least 2 probes and 1 step",
            "Leave them out",
        )
    dtype, device = home(operator)
    lanczos = Lanczos(operator, Forgetful(), start_vector(operator.space, seed, "start", dtype, device), seed)
    while len(lanczos) < steps and not lanczos.closed:
        lanczos.step()
    values, _ = eigh_tridiagonal(np.array(lanczos.alphas), np.array(lanczos.betas[:-1]))
    largest = float(np.abs(values).max())
    if largest == 0:
        raise InputError(f"{operator!r} maps everything to zero", "an operator with a spectrum", "Check the loss")
    trace, squared_norm = moments(operator, probes, seed, dtype, device)
    smallest = share * largest
    d = min(least_d(smallest, squared_norm.value, tolerance), operator.n)
    raw_bias = (trace.value + squared_norm.value / smallest) / (d * smallest)
    return Recommendation(d, largest, trace, squared_norm, raw_bias, len(lanczos) + probes)
