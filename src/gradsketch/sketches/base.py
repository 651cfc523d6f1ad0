"""The contract every sketch keeps."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap, _checked_apply
from gradsketch.random import Stream

__all__ = ["Sketch"]


class Sketch(LinearMap):
    """A random linear map Phi: R^n → R^d with E[PhiᵀPhi] = I.

    Inner products, norms and traces are therefore unbiased and callers never rescale. A concrete sketch writes
    ``_apply``, ``_apply_adjoint`` and ``options`` (what besides n, d and seed decides the map), draws everything
    random from ``self.stream`` and calls this constructor first.

    Raises:
        InputError: n or d is not a positive integer, or d > n.
    """

    # Raised by one whenever a kind starts to map the same vector to other numbers.
    version: int = 1

    def __init__(self, n: int, d: int, *, seed: int = 0) -> None:
        for name, value in (("n", n), ("d", d)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}", "a positive integer", f"Type {type(self).__name__}(n, d, seed=0)")
        self.shape = (d, n)
        self.seed = seed
        self.stream = Stream(seed, type(self).__name__)

    @property
    def d(self) -> int:
        """Length of a sketch."""
        return self.shape[0]

    @abstractmethod
    def options(self) -> dict[str, str | int | float | bool]:
        """Return what besides n, d and seed decides the map."""

    def lift(self, w: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Apply the adjoint Phiᵀ: a direction in sketch space becomes one in parameter space.

        Raises:
            InputError: wrong last dim, no floating-point type.
            NonFiniteError: w holds a NaN or an infinity.
        """
        return _checked_apply(self, w, adjoint=True)

    def truncate(self, d: int) -> Sketch:
        """Return the d-dimensional sketch that can be read off a stored sketch of this size, where the kind nests.

        Raises:
            InputError: this kind has no nested sizes, or not this one.
        """
        raise InputError(
            f"truncate({d}) of {self!r}",
            "a kind whose sizes nest: Dense, AFFD, AFJL, SJLT, TiledSRHT, BlockSum",
            f"Build a new sketch with d={d}",
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the map; equal fingerprints mean comparable sketches."""
        facts = [type(self).__name__, self.version, self.n, self.d, self.seed, sorted(self.options().items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options().items())
        return f"{type(self).__name__}(n={self.n}, d={self.d}, seed={self.seed}{options})"
