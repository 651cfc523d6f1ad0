"""Sketches, per-example gradients and curvature in JAX: pure functions over pytrees, with the numbers of torch.

Nothing else in gradsketch imports JAX. Install it with ``pip install "gradsketch[jax]"``.
"""

from __future__ import annotations

try:
    import jax  # noqa: F401
except ImportError as error:
    raise ImportError('gradsketch.jax needs JAX: pip install "gradsketch[jax]"') from error

from gradsketch.jax.block_sum import BlockSum, block_sum
from gradsketch.jax.curvature import Eigenvalues, hvp, spectrum
from gradsketch.jax.names import TorchName, flax_names
from gradsketch.jax.per_example import PerExample, per_example
from gradsketch.jax.sketches import Linear, MatrixSketch, affd, afjl, qk, srht

__all__ = [
    "BlockSum",
    "Eigenvalues",
    "Linear",
    "MatrixSketch",
    "PerExample",
    "TorchName",
    "affd",
    "afjl",
    "block_sum",
    "flax_names",
    "hvp",
    "per_example",
    "qk",
    "spectrum",
    "srht",
]
