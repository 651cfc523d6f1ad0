"""tr H and ‖H‖_F² from a handful of products, both from each."""

from __future__ import annotations

import time

import numpy as np
import torch

from gradsketch.linear_map import LinearMap
from gradsketch.random import Stream
from gradsketch.space import dot
from gradsketch.spectra.results import Estimate

__all__ = ["moments"]


def moments(
    operator: LinearMap, probes: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Estimate, Estimate]:
    """Return tr H and ‖H‖_F² with standard errors: E zᵀHz and E ‖Hz‖² over ``probes`` vectors z of random signs.

    Source: Hutchinson 1989; the standard errors are those of the sample mean.
    """
    start, stream = time.perf_counter(), Stream(seed, "spectrum", "moments")
    traces, norms = [], []
    for probe in range(probes):
        z = stream.child(str(probe)).signs(0, operator.n, dtype=dtype, device=device)
        product = operator(z)
        traces.append(dot(z, product))
        norms.append(dot(product, product))
    seconds = time.perf_counter() - start
    return _mean(traces, seconds), _mean(norms, seconds)


def _mean(sample: list[float], seconds: float) -> Estimate:
    count = len(sample)
    spread = float(np.std(sample, ddof=1)) if count > 1 else float("inf")
    return Estimate(float(np.mean(sample)), spread / count**0.5, count, count, seconds)
