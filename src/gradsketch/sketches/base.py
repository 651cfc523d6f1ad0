"""The contract every sketch keeps."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.linear_map import LinearMap, _checked_apply
from gradsketch.random import Stream

__all__ = ["Sketch"]

_Option = TypeVar("_Option", bound=str | int)


class Sketch(LinearMap):
    """A random linear map Phi: R^n → R^d with E[PhiᵀPhi] = I.

    Inner products, norms and traces are therefore unbiased and callers never rescale. A concrete sketch writes
    ``_apply``, ``_apply_adjoint`` and ``options`` (the keyword arguments besides n, d and seed that rebuild the map),
    draws everything random from ``self.stream`` and calls this constructor first. A kind whose
    constructor takes anything but those also writes ``arguments``.

    **Nested sizes.** A kind with ``nesting`` holds the sketch of size d in the sketch of size D > d of the same vector:

    * ``"prefix"``: the small sketch is √(D/d) times the first d numbers of the large one, and, the other way round,
      lifting numbers that end in D − d zeros with the large sketch is √(d/D) times lifting the first d with the small
      one. So a subspace can grow without losing what was trained.
    * ``"fold"``: d divides D, and the small sketch is the sum of the D/d contiguous blocks of length d of the large
      one. Its first d numbers alone are no sketch.

    ``truncate(d)`` builds the small sketch and ``truncate_sketch(s, d)`` converts stored sketches; they agree:
    ``phi.truncate(d)(x) == phi.truncate_sketch(phi(x), d)`` up to rounding. For this nothing random, nor any choice
    made for the user, may depend on d.

    Raises:
        InputError: n or d is not a positive integer, d > n, or n = 1 where the kind does not allow it.
    """

    # Raised by one whenever a kind starts to map the same vector to other numbers.
    version: ClassVar[int] = 1
    nesting: Literal["prefix", "fold"] | None = None
    least_n: ClassVar[int] = 2
    # Whether kind(n, d, seed=seed) makes one; False where shapes or another sketch are needed.
    from_sizes: ClassVar[bool] = True

    def __init__(self, n: int, d: int, *, seed: int = 0) -> None:
        for name, value in (("n", n), ("d", d)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}", "a positive integer", f"Type {name}=1024")
        if d > n:
            raise InputError(
                f"{type(self).__name__} with d={d} larger than n={n}",
                "a sketch no longer than the vector",
                f"Type d={n} or less, or keep the vectors as they are",
            )
        if n < self.least_n:
            raise InputError(
                f"{type(self).__name__} with n=1", "vectors of two numbers or more", "Keep the number as it is"
            )
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

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments that make this map again; plain values, or another sketch."""
        return {"n": self.n, "d": self.d, "seed": self.seed, **self.options()}

    def __reduce__(self) -> Any:
        # A map is pickled as its arguments, because what it has drawn can be drawn again and may be large.
        return partial(type(self), **self.arguments()), ()

    def lift(self, w: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Apply the adjoint Phiᵀ: a direction in sketch space becomes one in parameter space.

        Raises:
            InputError: wrong last dim, no floating-point type.
            NonFiniteError: w holds a NaN or an infinity.
        """
        return _checked_apply(self, w, adjoint=True)

    def sketch_(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        """Sketch vectors whose values are not needed afterwards: their memory may be used, and holds anything then.

        Saves the vector of working memory that forms acting on whole vectors need, where x is contiguous, float32 or
        float64, and n a power of two. Not differentiable.

        Raises:
            InputError: x is part of an autograd graph; or as for a call.
        """
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise InputError(
                f"{self!r}.sketch_ was given a tensor that requires grad",
                "vectors outside any graph",
                "Call the sketch itself, which is differentiable, or wrap the call in torch.no_grad()",
            )
        return _checked_apply(_Overwriting(self), x, adjoint=False)

    def _apply_overwriting(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Map a batch that may be overwritten."""
        return self._apply(x)

    @property
    def takes_stretches(self) -> bool:
        """Whether a stretch of a vector is sketched, and lifted, in memory of its own length."""
        return False

    def _apply_stretch(self, x: Float[Tensor, "b m"], start: int) -> Float[Tensor, "b d"]:
        """Map vectors that are x from entry ``start`` on, and zero elsewhere."""
        raise NotImplementedError

    def _apply_adjoint_stretch(self, w: Float[Tensor, "b d"], start: int, count: int) -> Float[Tensor, "b m"]:
        """Return ``count`` entries, from ``start`` on, of what the adjoint maps to."""
        raise NotImplementedError

    def truncate(self, d: int) -> Sketch:
        """Return the d-dimensional sketch that can be read off a stored sketch of this size, where the kind nests.

        Raises:
            InputError: this kind has no nested sizes, or not this one.
        """
        self._check_nested(d)
        return type(self)(**self.arguments() | {"d": d})

    def truncate_sketch(self, sketch: Float[Tensor, "... d"], d: int) -> Float[Tensor, "... d2"]:
        """Turn sketches made by this map into those its ``truncate(d)`` makes, without the vectors.

        Raises:
            InputError: this kind has no nested sizes, or not this one; or the last dim is not this sketch's d.
        """
        self._check_nested(d)
        if sketch.ndim == 0 or sketch.shape[-1] != self.d:
            raise InputError(
                f"a tensor of shape {list(sketch.shape)}",
                f"sketches of length {self.d} in the last dim",
                "Pass what this sketch returned",
            )
        if self.nesting == "fold":
            blocks: Tensor = sketch.unflatten(-1, (self.d // d, d))
            return blocks.sum(-2)
        return sketch[..., :d].mul((self.d / d) ** 0.5)

    def _check_nested(self, d: int) -> None:
        if self.nesting is None:
            raise InputError(
                f"truncate({d}) of {self!r}",
                "a kind whose sizes nest, such as AFFD",
                f"Build a new sketch with d={d}",
            )
        fits = isinstance(d, int) and 1 <= d <= self.d
        if not fits or (self.nesting == "fold" and self.d % d):
            wanted = f"a size from 1 to {self.d}" + (" that divides it" if self.nesting == "fold" else "")
            raise InputError(f"truncate({d!r}) of {self!r}", wanted, f"Type truncate({max(1, self.d // 2)})")

    def _choice(self, name: str, value: _Option, allowed: Sequence[_Option]) -> _Option:
        """Return an option's value, checked."""
        if value not in allowed:
            raise InputError(
                f"{type(self).__name__}({name}={value!r})",
                " or ".join(repr(a) for a in allowed),
                f"Type {name}={allowed[0]!r}, the default",
            )
        return value

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the map; equal fingerprints mean comparable sketches."""
        facts = [type(self).__name__, self.version, self.n, self.d, self.seed, sorted(self.options().items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        return {"sketch": self.fingerprint}

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options().items())
        return f"{type(self).__name__}(n={self.n}, d={self.d}, seed={self.seed}{options})"


class _Overwriting(LinearMap):
    """A sketch that may use its input as working memory."""

    def __init__(self, inner: Sketch) -> None:
        self.inner, self.shape = inner, inner.shape

    def __repr__(self) -> str:
        return repr(self.inner)

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return self.inner._apply_overwriting(x)

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self.inner._apply_adjoint(w)
