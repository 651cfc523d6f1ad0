"""A fold-nested sketch seen in a basis in which its first d numbers are the sketch of size d."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import InputError
from gradsketch.sketches.base import Sketch
from gradsketch.transforms.hadamard import hadamard_factors
from gradsketch.transforms.kronecker import kronecker_

__all__ = ["prefix_nested"]


def prefix_nested(sketch: Sketch) -> Sketch:
    """Return a sketch whose first d numbers can be trained alone: itself, or itself followed by H_D.

    The first d rows of H_D add up the blocks of length d, R_d H_D = √(d/D) · H_d · fold_d, so that after H_D a prefix
    is what folding was before.

    Raises:
        InputError: a sketch nested by folding whose size is no power of two.
    """
    return _Rotated(sketch) if sketch.nesting == "fold" else sketch


class _Rotated(Sketch):
    nesting = "prefix"

    def __init__(self, inner: Sketch) -> None:
        if inner.d & (inner.d - 1):
            raise InputError(f"{inner!r}", "a power of two for d", f"Type d={1 << (inner.d.bit_length() - 1)}")
        super().__init__(inner.n, inner.d, seed=inner.seed)
        self.inner = inner

    def options(self) -> dict[str, str | int | float | bool]:
        return {"inner": self.inner.fingerprint}

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        return _rotated(self.inner._apply(x))

    def _apply_adjoint(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self.inner._apply_adjoint(_rotated(w))


def _rotated(u: Tensor) -> Tensor:
    u = u.clone()
    kronecker_(u, hadamard_factors(u.shape[-1], u.dtype, u.device))
    return u
