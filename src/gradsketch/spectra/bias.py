"""What sketching does to eigenvalues, and how to undo it.

For Phi with E[PhiᵀPhi] = I and rows that behave like independent ones, an isolated eigenvalue λ_i of H moves, as an
eigenvalue of Phi H Phiᵀ, to λ_i + (λ_i/d) Σ_{j≠i} λ_j / (λ_i − λ_j), up to noise of standard deviation |λ_i| √(2/d).
This is the spiked-covariance map of Bai & Yao (2012), to first order where [P] (arXiv 2402.03994) leaves it out.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from gradsketch.spectra.results import Estimate

__all__ = ["corrected", "detection_threshold", "least_d", "sampling_error"]

# Values this many times the detection threshold enter the correction one by one, the rest through tr and ‖H‖_F².
_RESOLVED = 1.5
# The right-hand side is evaluated at the corrected values; the third pass changes nothing that the noise would show.
_PASSES = 2


def detection_threshold(squared_norm: float, d: int) -> float:
    """Return the magnitude below which an eigenvalue of H leaves no outlier in Phi H Phiᵀ: λ² > ‖H‖_F² / d."""
    return math.sqrt(max(squared_norm, 0.0) / d)


def corrected(raw: Float[np.ndarray, " r"], d: int, trace: float, squared_norm: float) -> Float[np.ndarray, " r"]:
    """Return eigenvalues of H from the outer eigenvalues ``raw`` of Phi H Phiᵀ, strongest first.

    The sum over j splits into the values found, taken one by one with the gaps of the raw values (which repel each
    other and so never vanish), and the rest, |λ_j| ≪ |λ_i|, where it is tr_rest/λ_i + F_rest/λ_i². No value moves by
    more than half: beyond that there is nothing left to correct.
    """
    resolved = np.abs(raw) > _RESOLVED * detection_threshold(squared_norm, d)
    gaps = raw[:, None] - raw[None, :]
    np.fill_diagonal(gaps, np.inf)
    gaps[gaps == 0] = np.inf
    values = raw.copy()
    for _ in range(_PASSES):
        found = np.where(resolved, values, 0.0)
        # Each value is left out of its own sum, also where it is not resolved.
        own_trace = np.where(resolved, 0.0, values)
        trace_rest = trace - found.sum() - own_trace
        norm_rest = np.maximum(squared_norm - (found**2).sum() - own_trace**2, 0.0)
        shift = (values * (found[None, :] / gaps).sum(1) + trace_rest + norm_rest / values) / d
        values = raw - np.clip(shift, -np.abs(raw) / 2, np.abs(raw) / 2)
    return values


def sampling_error(
    values: Float[np.ndarray, " r"], d: int, trace: Estimate, squared_norm: Estimate
) -> Float[np.ndarray, " r"]:
    """Return the standard error of corrected eigenvalues: the sketch's own noise, and that of tr and ‖H‖_F²."""
    sketch = values**2 * 2 / d
    moments = (trace.standard_error / d) ** 2 + (squared_norm.standard_error / (d * values)) ** 2
    return np.sqrt(sketch + moments)


def least_d(smallest: float, squared_norm: float, tolerance: float) -> int:
    """Return the power of two from which an eigenvalue of magnitude ``smallest`` is seen to ``tolerance``.

    Two conditions: noise √(2/d) ≤ tolerance, and twice the detection threshold below the value.
    """
    needed = max(2 / tolerance**2, 4 * squared_norm / smallest**2)
    return 1 << math.ceil(math.log2(max(needed, 1)))
