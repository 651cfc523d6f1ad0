"""(A + λI)⁻¹ b by conjugate gradients, for curvature that is known by its products only."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError
from gradsketch.linear_map import LinearMap, widened
from gradsketch.random import Stream

__all__ = ["DampedInverse"]

_PROBES = 8


class DampedInverse(LinearMap):
    """(A + λI)⁻¹ for a positive semi-definite map A, λ being the fraction ``damping`` of its mean eigenvalue.

    The mean eigenvalue is estimated from eight random vectors. A solution is done when its residual is ``tolerance``
    of the right-hand side's length, or after ``iterations`` products, of which a warning tells; ``residual`` is the
    largest that was left.

    Source: J. Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> inverse = DampedInverse(gs.gauss_newton(model, task, data), damping=0.1)
        >>> inverse(torch.randn(3, 42)).shape
        torch.Size([3, 42])

    Raises:
        InputError: a damping that is not positive, or a map without curvature.
        NonFiniteError: a product is not finite.
    """

    is_self_adjoint = True

    def __init__(
        self, inner: LinearMap, damping: float, *, tolerance: float = 1e-2, iterations: int = 50, seed: int = 0
    ) -> None:
        if not damping > 0:
            raise InputError(f"damping={damping!r}", "a positive number", "Type damping=0.1")
        self.inner, self.shape, self.tolerance, self.iterations = inner, inner.shape, tolerance, iterations
        self.device, self.dtype = inner.device, inner.dtype
        self.residual, self.products = 0.0, _PROBES
        self.shift = damping * self._mean_eigenvalue(seed)

    def _mean_eigenvalue(self, seed: int) -> float:
        signs = Stream(seed, "damping").signs(0, _PROBES * self.n, device=self.device or "cpu").view(_PROBES, self.n)
        probes = signs.to(widened(self.dtype))
        mean = float((probes * self.inner(probes)).sum().double()) / probes.numel()
        if not mean > 0:
            raise InputError(
                f"{self.inner!r} with a mean eigenvalue of {mean:.3g}",
                "a map that is positive semi-definite and not zero",
                "Check that the loss depends on these parameters",
            )
        return mean

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Solve for every vector at once; one that is done waits for the others."""
        x = x.to(widened(x.dtype))
        solution, residual = torch.zeros_like(x), x.clone()
        direction, square = residual.clone(), residual.square().sum(1, keepdim=True)
        goal = square * self.tolerance**2
        for _ in range(self.iterations):
            if (square <= goal).all():
                break
            product = self.inner(direction) + self.shift * direction
            self.products += len(x)
            curvature = (direction * product).sum(1, keepdim=True)
            step = torch.where(square > goal, square / curvature, 0.0)
            solution += step * direction
            residual -= step * product
            before, square = square, residual.square().sum(1, keepdim=True)
            direction = residual + square / before.clamp_min(torch.finfo(x.dtype).tiny) * direction
        if not torch.isfinite(solution).all():
            raise NonFiniteError("a solution that is not finite", "finite products", "Compute in float32 or wider")
        ratio = float((square / goal.clamp_min(torch.finfo(x.dtype).tiny)).sqrt().max())
        self.residual = max(self.residual, ratio * self.tolerance)
        if ratio > 1:
            warnings.warn(
                f"conjugate gradients left {ratio * self.tolerance:.1e} of the right-hand side after {self.iterations} "
                f"products, where {self.tolerance:.0e} is wanted: a larger damping needs fewer products",
                GradsketchWarning,
                stacklevel=2,
            )
        return solution

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return self._apply(w)
