"""What sketching does to eigenvalues, and how to undo it.

For Phi with E[PhiᵀPhi] = I and rows that behave like independent ones, an isolated eigenvalue λ_i of H moves, as an
eigenvalue of Phi H Phiᵀ, to λ_i + (λ_i/d) Σ_{j≠i} λ_j / (λ_i − λ_j), up to noise of standard deviation |λ_i| √(2/d).
This is the spiked-covariance map of Bai & Yao (2012), which [P] (arXiv 2402.03994) leaves out. It has an inverse only
where the moved value stands outside the bulk that the other eigenvalues form: λ² > ‖H‖_F²/d.

A value counts as found only outside the bulk. Everything in H that is not an outlier becomes a bulk of half-width
2‖H‖_F/√d, and its edge, corrected to first order, looks like an eigenvalue above the detection threshold. So values are
taken strongest first, each compared with the edge that those not yet taken form, widened by Tracy and Widom's d^(−2/3).
Repulsion between values closer than a quarter of their noise is not undone, because the gap itself is noise then.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float

from gradsketch.linear_map import LinearMap
from gradsketch.random import Stream
from gradsketch.spectra.results import Estimate

__all__ = ["corrected", "detection_threshold", "effective_d", "least_d", "sampling_error"]

# The right-hand side is evaluated at the corrected values; a fourth pass changes nothing that the noise would show.
_PASSES = 3
# Below this, what a product in float32 leaves of f is rounding.
_NO_NOISE = 1e-4
# Gaps well below this share of the raw values' own noise are noise themselves, and their repulsion is not undone.
_LEAST_GAP = 0.25


def effective_d(phi: LinearMap, seed: int) -> float:
    """Return how many independent rows would make as much noise as a sketch's d rows do.

    The cross terms of PhiᵀPhi, which move eigenvalues, have the mean square f/d, and ‖PhiPhiᵀ‖_F² = n + f n²/d.
    Independent rows have f = 1. Orthogonal ones have f = 1 − d/n, as in a sample without replacement, and at d = n
    they move nothing.
    One product with PhiPhiᵀ measures f for any kind of sketch.
    """
    d, n = phi.shape
    w = Stream(seed, "spectrum", "rows").signs(0, d, dtype=torch.float64, device=phi.device or "cpu")
    product = phi(phi.T(w))
    f = d * (float(product @ product) - n) / n**2
    return d / f if f > _NO_NOISE else math.inf


def detection_threshold(squared_norm: float, d: float) -> float:
    """Return the magnitude below which an eigenvalue of H leaves no outlier in Phi H Phiᵀ: λ² > ‖H‖_F² / d."""
    return math.sqrt(max(squared_norm, 0.0) / d)


def corrected(
    raw: Float[np.ndarray, " r"], d: float, trace: float, squared_norm: float
) -> tuple[Float[np.ndarray, " r"], Bool[np.ndarray, " r"]]:
    """Return eigenvalues of H from the outer eigenvalues ``raw`` of Phi H Phiᵀ, and which of them are seen at all.

    The sum over j splits into the values seen, taken one by one with the gaps of the raw values, and the rest,
    |λ_j| ≪ |λ_i|, where it is tr_rest/λ_i + F_rest/λ_i² and the map is inverted in closed form. No value moves by
    more than half of itself. One that is not seen may be any eigenvalue below the threshold.
    """
    seen = _seen(raw, d, trace, squared_norm)
    gaps = raw[:, None] - raw[None, :]
    least = _LEAST_GAP * np.abs(raw)[:, None] * math.sqrt(2 / d)
    inverse = gaps / np.maximum(gaps**2 + least**2, np.finfo(float).tiny)
    values = raw.copy()
    for _ in range(_PASSES):
        found = np.where(seen, values, 0.0)
        # Each value is left out of its own sum, also where it is not seen.
        own = np.where(seen, 0.0, values)
        trace_rest = trace - found.sum() - own
        norm_rest = np.maximum(squared_norm - (found**2).sum() - own**2, 0.0)
        values, _ = _without_bulk(raw - (values * (inverse @ found) + trace_rest) / d, norm_rest / d)
        values = np.sign(raw) * np.clip(np.sign(raw) * values, np.abs(raw) / 2, 1.5 * np.abs(raw))
    return values, seen


def _seen(raw: Float[np.ndarray, " r"], d: float, trace: float, squared_norm: float) -> Bool[np.ndarray, " r"]:
    """Return which values stand outside the bulk: strongest first, each against a bulk without those before it.

    The edge of the bulk is taken as 2 √(F_rest/d) (1 + d^(−2/3)), which its own largest value passes once in a
    hundred times (Tracy & Widom 1996).
    """
    edge = (1 + d ** (-2 / 3)) ** 2
    seen = np.zeros(len(raw), dtype=bool)
    for i in np.argsort(-np.abs(raw), kind="stable"):
        value, outside = _without_bulk(raw[i : i + 1] - trace / d, np.array([edge * squared_norm / d]))
        if outside[0] and value[0] * raw[i] > 0:
            seen[i] = True
            trace, squared_norm = trace - float(value[0]), max(squared_norm - float(value[0]) ** 2, 0.0)
    return seen


def _without_bulk(
    moved: Float[np.ndarray, " r"], variance: Float[np.ndarray, " r"]
) -> tuple[Float[np.ndarray, " r"], Bool[np.ndarray, " r"]]:
    """Return λ of moved = λ + variance/λ, and whether there is one; at the edge of the bulk it is moved/2."""
    inside = moved**2 - 4 * variance
    return (moved + np.sign(moved) * np.sqrt(np.maximum(inside, 0.0))) / 2, inside > 0


def sampling_error(
    values: Float[np.ndarray, " r"], d: float, trace: Estimate, squared_norm: Estimate
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
