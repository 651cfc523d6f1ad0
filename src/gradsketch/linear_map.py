"""Linear maps between vector spaces: apply, adjoint, and the algebra ``phi @ H @ phi.T``.

Vectors are the last dim and the batch leads: a map of shape (rows, columns) takes ``[..., columns]`` to
``[..., rows]``.

An empty batch is an error, not an empty result: nothing in the package makes one, and a caller's mostly comes from a
filter that let nothing through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, overload

import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from gradsketch.errors import InputError, NonFiniteError
from gradsketch.lockstep import Lockstep
from gradsketch.space import Space

__all__ = ["LinearMap", "widened"]


def widened(dtype: torch.dtype | None) -> torch.dtype:
    """Return the type that results and sums have: float64 for float64, float32 for everything narrower or unknown."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearMap(ABC):
    """A real linear map given by its action and its adjoint's action.

    A concrete map sets ``shape`` and writes the two underscored methods, which receive checked, contiguous batches
    ``[b, columns]`` and ``[b, rows]`` with b ≥ 1 and must not change them. Results are float32 for half-precision
    input and keep float32 and float64. Differentiable through its input.

    A map that owns data (a model's Hessian) also sets ``device`` and ``dtype``: where and in what precision vectors
    made for it should live. None means wherever the input is; a compound map answers for its parts.
    """

    shape: tuple[int, int]
    is_self_adjoint: bool = False
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    @abstractmethod
    def _apply(self, x: Float[Tensor, "b columns"]) -> Float[Tensor, "b rows"]:
        """Map a batch of vectors."""

    @abstractmethod
    def _apply_adjoint(self, w: Float[Tensor, "b rows"]) -> Float[Tensor, "b columns"]:
        """Map a batch of vectors by the adjoint."""

    def __call__(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """Apply the map to every vector of a batch.

        Raises:
            InputError: wrong last dim, no floating-point type, or no vector at all.
            NonFiniteError: x holds a NaN or an infinity, or the result overflows.
        """
        return _checked_apply(self, x, adjoint=False)

    @property
    def T(self) -> LinearMap:
        """The adjoint map; itself where the map is self-adjoint."""
        return self if self.is_self_adjoint else _Adjoint(self)

    @property
    def space(self) -> Space:
        """The space that the map's vectors are of."""
        return Space(self.n)

    @property
    def ranks(self) -> Lockstep:
        """The ranks that evaluate the map together: each product is a product on every one of them."""
        return Lockstep()

    def shared(self) -> LinearMap:
        """Return the same map for vectors of which each rank holds its share; itself where nothing is shared out."""
        return self

    def facts(self) -> dict[str, Any]:
        """Return what decides the map, as plain JSON values; a map that knows no more gives its shape."""
        return {"shape": list(self.shape)}

    @property
    def n(self) -> int:
        """Number of columns: the length of the vectors the map takes."""
        return self.shape[1]

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearMap) -> LinearMap: ...
    def __matmul__(self, other: Tensor | LinearMap) -> Tensor | LinearMap:
        """Compose with another map, or apply to vectors."""
        if isinstance(other, Tensor):
            return self(other)
        return _Product(self, other) if isinstance(other, LinearMap) else NotImplemented

    def __add__(self, other: LinearMap) -> LinearMap:
        return _Sum(self, other) if isinstance(other, LinearMap) else NotImplemented

    def __mul__(self, scale: float) -> LinearMap:
        return _Scaled(self, float(scale)) if isinstance(scale, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearMap:
        return self * -1.0

    def __sub__(self, other: LinearMap) -> LinearMap:
        return self + -other if isinstance(other, LinearMap) else NotImplemented

    def dense(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "rows columns"]:
        """Return the matrix, made by mapping the identity: for small maps and for tests."""
        rows, columns = self.shape
        if rows < columns:
            return self.T(torch.eye(rows, dtype=dtype, device=device)).contiguous()
        return self(torch.eye(columns, dtype=dtype, device=device)).T.contiguous()

    def to_scipy(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LinearOperator:
        """Return a SciPy ``LinearOperator`` that evaluates this map in ``dtype`` (by default the map's own)."""
        dtype = dtype or widened(self.dtype)

        def through(map_: LinearMap) -> Any:
            def matvec(v: Any) -> Any:
                vector = torch.as_tensor(v).to(device=device, dtype=dtype).reshape(-1)
                return map_(vector).detach().cpu().numpy()

            return matvec

        numpy_dtype = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
        return LinearOperator(self.shape, matvec=through(self), rmatvec=through(self.T), dtype=numpy_dtype)


def _checked_apply(map_: LinearMap, x: Tensor, *, adjoint: bool) -> Tensor:
    rows, columns = map_.shape[::-1] if adjoint else map_.shape
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = f"a tensor of dtype {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"{map_!r} was given {came}", "a floating-point torch tensor", "Call .float() on it first")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise InputError(
            f"{map_!r} was given a tensor of shape {list(x.shape)}",
            f"vectors of length {columns} in the last dim",
            f"Reshape it to [..., {columns}], or build the map with n={x.shape[-1] if x.ndim else 1}",
        )
    batch = x.shape[:-1]
    if batch.numel() == 0:
        raise InputError(
            f"{map_!r} was given an empty batch of shape {list(x.shape)}",
            "at least one vector",
            "Leave empty batches out, or find out what made this one empty",
        )
    out: Tensor = _Apply.apply(x.reshape(-1, columns).contiguous(), map_, adjoint, True)
    return out.view(*batch, rows)


def _non_finite(map_: LinearMap, x: Tensor) -> NonFiniteError:
    bad = (~torch.isfinite(x)).nonzero()
    if len(bad) == 0:
        return NonFiniteError(
            f"{map_!r} made a non-finite value from finite input of dtype {x.dtype}",
            "a result within the range of the dtype",
            "Scale the input down or pass it as float64",
        )
    vector, position = (int(i) for i in bad[0])
    return NonFiniteError(
        f"vector {vector} of the batch holds {float(x[vector, position])} at position {position}",
        "finite numbers only",
        "Find where the value came from with torch.isfinite(x).all(-1)",
    )


class _Apply(torch.autograd.Function):
    """Autograd and ``torch.func`` for a linear map: the derivative is the map, the vector-Jacobian product its adjoint.

    Values are checked on the way forward only: a training loop decides itself what an infinite gradient means.
    """

    @staticmethod
    def forward(x: Tensor, map_: LinearMap, adjoint: bool, check: bool) -> Tensor:
        out = map_._apply_adjoint(x) if adjoint else map_._apply(x)
        # A sum is finite only if every term is, and takes no memory; only a suspicion is looked at more closely.
        if check and not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
            raise _non_finite(map_, x)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, LinearMap, bool, bool], output: Tensor) -> None:
        x, ctx.map_, ctx.adjoint, _ = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _Apply.apply(grads[0].contiguous(), ctx.map_, not ctx.adjoint, False)
        return grad.to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        out: Tensor = _Apply.apply(tangents[0].contiguous(), ctx.map_, ctx.adjoint, False)
        return out

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, map_: LinearMap, adjoint: bool, check: bool
    ) -> tuple[Tensor, int]:
        batches = x.movedim(in_dims[0] or 0, 0)
        out = _Apply.apply(batches.reshape(-1, batches.shape[-1]).contiguous(), map_, adjoint, check)
        return out.view(*batches.shape[:-1], out.shape[-1]), 0


class _Adjoint(LinearMap):
    def __init__(self, inner: LinearMap) -> None:
        self.inner, self.shape = inner, inner.shape[::-1]
        self.device, self.dtype = inner.device, inner.dtype

    def __repr__(self) -> str:
        return f"{self.inner!r}.T"

    @property
    def ranks(self) -> Lockstep:
        return self.inner.ranks

    def facts(self) -> dict[str, Any]:
        return {"adjoint of": self.inner.facts()}

    @property
    def T(self) -> LinearMap:
        return self.inner

    def _apply(self, x: Tensor) -> Tensor:
        return self.inner._apply_adjoint(x)

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        return self.inner._apply(w)


def _in_step(*maps: LinearMap) -> Lockstep:
    return next((each.ranks for each in maps if each.ranks.several), Lockstep())


class _Product(LinearMap):
    """``left @ right``; self-adjoint when it reads A @ S @ A.T with S self-adjoint."""

    def __init__(self, left: LinearMap, right: LinearMap) -> None:
        if left.shape[1] != right.shape[0]:
            raise InputError(
                f"{left!r} of shape {left.shape} @ {right!r} of shape {right.shape}",
                "a left factor with as many columns as the right factor has rows",
                "Check n and d of the sketch against the operator's n",
            )
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[1])
        factors = left.factors if isinstance(left, _Product) else (left,)
        factors += right.factors if isinstance(right, _Product) else (right,)
        self.factors: tuple[LinearMap, ...] = factors
        self.device, self.dtype = _home(left, right)
        self.is_self_adjoint = all(_are_adjoint(a, b) for a, b in zip(factors, reversed(factors), strict=True))

    def __repr__(self) -> str:
        return " @ ".join(repr(f) for f in self.factors)

    @property
    def ranks(self) -> Lockstep:
        return _in_step(*self.factors)

    def facts(self) -> dict[str, Any]:
        return {"product of": [factor.facts() for factor in self.factors]}

    def _apply(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor._apply(x)
        return x

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        for factor in self.factors:
            w = factor._apply_adjoint(w)
        return w


def _are_adjoint(a: LinearMap, b: LinearMap) -> bool:
    if a is b:
        return a.is_self_adjoint
    return (isinstance(a, _Adjoint) and a.inner is b) or (isinstance(b, _Adjoint) and b.inner is a)


def _home(left: LinearMap, right: LinearMap) -> tuple[torch.device | None, torch.dtype | None]:
    return left.device if left.device is not None else right.device, left.dtype or right.dtype


class _Sum(LinearMap):
    def __init__(self, left: LinearMap, right: LinearMap) -> None:
        if left.shape != right.shape:
            raise InputError(
                f"{left!r} of shape {left.shape} + {right!r} of shape {right.shape}",
                "two maps of one shape",
                "Give both the same n and d",
            )
        self.left, self.right, self.shape = left, right, left.shape
        self.is_self_adjoint = left.is_self_adjoint and right.is_self_adjoint
        self.device, self.dtype = _home(left, right)

    def __repr__(self) -> str:
        return f"({self.left!r} + {self.right!r})"

    @property
    def ranks(self) -> Lockstep:
        return _in_step(self.left, self.right)

    def facts(self) -> dict[str, Any]:
        return {"sum of": [self.left.facts(), self.right.facts()]}

    def _apply(self, x: Tensor) -> Tensor:
        return self.left._apply(x) + self.right._apply(x)

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        return self.left._apply_adjoint(w) + self.right._apply_adjoint(w)


class _Scaled(LinearMap):
    def __init__(self, inner: LinearMap, scale: float) -> None:
        self.inner, self.scale, self.shape = inner, scale, inner.shape
        self.is_self_adjoint = inner.is_self_adjoint
        self.device, self.dtype = inner.device, inner.dtype

    def __repr__(self) -> str:
        return f"{self.scale:g} * {self.inner!r}"

    @property
    def space(self) -> Space:
        return self.inner.space

    @property
    def ranks(self) -> Lockstep:
        return self.inner.ranks

    def shared(self) -> LinearMap:
        return _Scaled(self.inner.shared(), self.scale)

    def facts(self) -> dict[str, Any]:
        return {**self.inner.facts(), "scale": self.scale * self.inner.facts().get("scale", 1.0)}

    def _apply(self, x: Tensor) -> Tensor:
        return self.inner._apply(x) * self.scale

    def _apply_adjoint(self, w: Tensor) -> Tensor:
        return self.inner._apply_adjoint(w) * self.scale
