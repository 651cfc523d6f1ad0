"""theta0 + Phiᵀ w as a differentiable function of w that holds n numbers, and n more while backward runs.

Three designs were weighed. Adding the lift of each change of w to the live weights drifts, and loses the bits of
theta0. ``functional_call`` is over before the recomputation of activation checkpointing runs, which then reads theta0
in silence. A parametrisation that adds theta0 and delta at each reading holds one n-vector more. So modules read from
one buffer theta0 + Phiᵀ w, and the Parameter objects stay where they are. Gradients are gathered by an identity node
made at each reading: autograd runs the nodes made last first, so each layer's gradient is copied and freed when it
comes. Hooks on the outputs of the lift all run at the end, and held 2n. The gradient's memory is kept from step to
step, because a CPU pays for fresh pages (benchmarks/subspace_cost.py); the lift's buffer is not, because old graphs may
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradsketch.dimension.checks import check_differentiable_again, check_not_transformed
from gradsketch.dimension.held_map import HeldMap
from gradsketch.errors import InputError
from gradsketch.fsdp import own_share
from gradsketch.gradients.gathering import Gathering
from gradsketch.linear_map import widened
from gradsketch.transforms.precision import full_precision

__all__ = ["Point", "Reserve", "is_differentiated"]


def is_differentiated(w: Tensor) -> bool:
    """Whether what is computed from w has a derivative with respect to it, in reverse or in forward mode."""
    return (torch.is_grad_enabled() and w.requires_grad) or forward_ad.unpack_dual(w).tangent is not None


@dataclass
class Point:
    """The values at one w: plain, and (once asked for) as functions of w for autograd.

    ``source`` is the tensor that w was read from, which need not be the Subspace's own: a stand-in has a graph apart.
    """

    source: Tensor
    version: int
    steps: int
    """Of all optimisers, when w was last compared by value."""
    w: Tensor
    found: dict[str, _State]
    """What the parameters were when this was made."""
    plain: dict[str, Tensor]
    constants: dict[str, Tensor]
    """What else modules gather, where ranks share out the model."""
    tracked: dict[str, Tensor] | None = None
    ready: dict[str, Tensor] | None = None
    """Either of the two, chosen beforehand for modules that are compiled."""
    gradient: _Gradient | None = None
    gatherings: dict[bool, Gathering] = field(default_factory=dict)
    """How modules read the plain and the tracked values that ranks share out."""

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def at(
        cls,
        w: Float[Tensor, " d"],
        parameters: Mapping[str, Tensor],
        theta0: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        phi: HeldMap,
        at_least: torch.dtype | None = None,
    ) -> Point:
        """Compute theta0 + Phiᵀ w, as far as it is held, in the buffer that the lift returns.

        Values have their parameters' dtypes, or ``at_least`` where that is wider.
        """
        if w.shape != (phi.sketch.d,):
            raise InputError(
                f"w of shape {list(w.shape)} for {phi.sketch!r}",
                f"[{phi.sketch.d}]",
                "Write to w in place, or load a state dict",
            )
        source, version, w = w, w._version, w.detach().clone()
        found = {name: _state(parameter) for name, parameter in parameters.items()}
        device = next(iter(theta0.values())).device  # w stays where it is when the model alone is moved
        with full_precision(device):
            delta = phi.lift(w.to(device, widened(w.dtype)))
        if _share_memory(delta, w):
            delta = delta.clone()
        plain = {}
        parts = delta.split([parameter.numel() for parameter in theta0.values()])
        for (name, parameter), flat in zip(theta0.items(), parts, strict=True):
            part = flat.view(parameter.shape)
            in_place = torch.promote_types(parameter.dtype, part.dtype) == part.dtype
            dtype = parameter.dtype if at_least is None else torch.promote_types(parameter.dtype, at_least)
            plain[name] = (part.add_(parameter) if in_place else part + parameter).to(dtype)
        return cls(source, version, _Steps.taken, w, found, plain, dict(constants))

    def is_made_from(self, w: Tensor) -> bool:
        """Whether this is the point of that very tensor, unless it was written to past its version counter.

        Fused optimisers write so. Therefore the values are compared once after each step of any optimiser.
        """
        same_kind = (self.w.dtype, self.w.device) == (w.dtype, w.device)
        same = self.source is w and self.version == w._version and same_kind
        return same and (self.steps == _Steps.taken or self.has_value_of(w))

    def has_value_of(self, w: Tensor) -> bool:
        """Whether w has the values that this is the point of."""
        self.steps = _Steps.taken
        return torch.equal(self.w, w)

    def starts_from(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the parameters still are what they were: not moved, cast, or loaded anew."""
        return all(self.found[name] == _state(parameter) for name, parameter in parameters.items())

    def track(self, w: Tensor, phi: HeldMap, reserve: Reserve, over: Callable[[], None]) -> None:
        """Make the values functions of w; ``over`` hears of the end of every backward pass."""
        self.gradient = _Gradient(self.plain, phi, reserve, over)
        with torch.inference_mode(False):
            values = _Lift.apply(w, list(self.plain.values()), self.gradient)
        self.tracked = dict(zip(self.plain, values, strict=True))

    def reading(self, name: str) -> Tensor:
        """Return a value as a function of w, for one use."""
        assert self.tracked is not None
        assert self.gradient is not None
        return self.gradient.tap(name, self.tracked[name])

    def rest(self) -> None:
        """Let go of what modules read last."""
        for gathering in self.gatherings.values():
            gathering.present.drop()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Vanish: a copied Subspace makes its own point, for tensors with a history cannot be copied."""
        return type(None), ()


class _Steps:
    """Counts the steps of every optimiser in this process."""

    taken = 0

    @classmethod
    def count(cls, *_: Any) -> None:
        """Hear of one."""
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


class Reserve:
    """Keeps the memory of one gradient from step to step, for a CPU pays for fresh pages."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " n"]:
        """Return a vector that holds anything."""
        kept, self._kept = self._kept, None
        if kept is not None and (len(kept), kept.dtype, kept.device) == (n, dtype, device):
            return kept
        return torch.empty(n, dtype=dtype, device=device)

    def give(self, vector: Float[Tensor, " n"]) -> None:
        """Keep a vector that nobody reads any more."""
        self._kept = vector

    def __reduce__(self) -> tuple[type[Reserve], tuple[()]]:
        """Copy no memory."""
        return Reserve, ()


class _Lift(torch.autograd.Function):
    """The values at a point as functions of w: theta0 + Phiᵀ w, whose vector-Jacobian product is the sketch."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, values: list[Tensor], gradient: _Gradient) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.dtype, ctx.device = gradient, w.dtype, w.device
        ctx.kinds = [(value.shape, value.dtype) for value in values]
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.gradient.sketched(grads).to(ctx.device, ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        device = ctx.gradient.device
        with full_precision(device):
            delta = ctx.gradient.phi.lift(tangent.to(device, widened(tangent.dtype)))
        parts = delta.split([shape.numel() for shape, _ in ctx.kinds])
        return tuple(part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.kinds, strict=True))


class _Tap(torch.autograd.Function):
    """One reading of one value: hands its gradient over as soon as there is one, so that autograd may free it.

    Backward runs the nodes made last first, which is why a tap is made at the reading and not with the values.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str, gradient: _Gradient) -> Tensor:
        ctx.name, ctx.gradient = name, gradient
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is not None:
            check_not_transformed(grad)
        if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
            check_differentiable_again(shared=ctx.gradient.phi.is_shared)
            return grad, None, None
        if grad is not None:
            ctx.gradient.add(ctx.name, grad)
        return None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: None) -> Tensor | None:
        return None if tangent is None else tangent.view_as(tangent)


class _Gradient:
    """Gathers the gradient with respect to theta in one vector while backward runs, then sketches it.

    A step thus holds n numbers of gradient and not 2n. Holds no tensor of the graph: the graph holds it, and a cycle
    would keep n numbers alive until the next garbage collection.
    """

    def __init__(self, values: dict[str, Tensor], phi: HeldMap, reserve: Reserve, over: Callable[[], None]) -> None:
        self.phi, self.reserve, self.over = phi, reserve, over
        self.device = next(iter(values.values())).device
        self.dtype = max((value.dtype for value in values.values()), key=lambda dtype: torch.finfo(dtype).bits)
        ends = list(accumulate(value.numel() for value in values.values()))
        self.places = {name: slice(*ends) for name, ends in zip(values, pairwise([0, *ends]), strict=True)}
        # By backward pass: re-entrant checkpointing runs one inside another, and one that failed leaves its own behind.
        self.passes: dict[int, tuple[Tensor, set[str]]] = {}

    def tap(self, name: str, value: Tensor) -> Tensor:
        """Return a value for one use; as it is, if it does not move."""
        tapped: Tensor = _Tap.apply(value, name, self) if name in self.places else value
        return tapped

    def add(self, name: str, grad: Tensor) -> None:
        running = torch._C._current_graph_task_id()
        if running not in self.passes:
            self.passes[running] = self.reserve.take(self.phi.size, self.dtype, self.device), set()
        vector, seen = self.passes[running]
        place = vector[self.places[name]].view(grad.shape)
        grad = grad.to_dense() if grad.is_sparse else grad
        if name in seen:
            place.add_(grad)
        else:
            place.copy_(grad)
            seen.add(name)

    def sketched(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        self.over()
        whole = {name: grad for name, grad in zip(self.places, grads, strict=True) if grad is not None}
        if whole and torch.is_grad_enabled():
            return self._differentiably(grads)
        for name, grad in whole.items():  # compiled modules read without a tap
            self.add(name, grad)
        running = torch._C._current_graph_task_id()
        if running not in self.passes:
            return torch.zeros(self.phi.sketch.d, device=self.device, dtype=torch.float32)
        vector, seen = self.passes.pop(running)
        for name in self.places.keys() - seen:  # parameters that this loss does not use
            vector[self.places[name]].zero_()
        with full_precision(vector.device):
            # Unchecked, for infinities must reach the gradient scaler of mixed precision, which skips the step.
            sketched = self.phi.sketch_sum(vector.to(widened(vector.dtype)))
        if not _share_memory(sketched, vector):
            self.reserve.give(vector)
        return sketched

    def _differentiably(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        known = next(grad for grad in grads if grad is not None)
        parts = [
            known.new_zeros(place.stop - place.start) if grad is None else grad.reshape(-1)
            for place, grad in zip(self.places.values(), grads, strict=True)
        ]
        with full_precision(known.device):
            return self.phi.sketch(torch.cat([part.to(self.dtype) for part in parts]))


# What shows that a parameter was moved, cast, written to, or given another tensor's memory. What is written to a tensor
# that ranks share out is counted there, and not by what this rank holds of it.
_State = tuple[torch.device, torch.dtype, int, int, int]


def _state(parameter: Tensor) -> _State:
    own = own_share(parameter)
    return own.device, own.dtype, _version(parameter), _version(own), own.data_ptr()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
