"""A model that trains in d random directions: theta = theta0 + Phiᵀ w."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.dimension.substitution import Substitution
from gradsketch.errors import FingerprintError, InputError
from gradsketch.gradients.parameters import Parameters
from gradsketch.sketches.base import Sketch

__all__ = ["Subspace"]


class Subspace(nn.Module):
    """The model at theta0 + Phiᵀ w, with ``w`` ([d], zero at first) as its only trainable tensor.

    Li et al., "Measuring the intrinsic dimension of objective landscapes" (ICLR 2018), with the sketches of Schioppa
    (arXiv 2402.03994) as the map. Train it like any module; the gradient of ``w`` is Phi ∇L exactly. The parameters
    are never written to: the model reads theta0 + Phiᵀ w from one buffer of n numbers, made anew when ``w`` has
    changed. Until ``close()`` the model itself computes at theta0 + Phiᵀ w too, so ``model.generate`` and evaluation
    code work; its own ``state_dict`` still holds theta0. Use it as a context manager, or ``close()`` it, and the model
    is as it was found (weights, buffers, modes, requires_grad), also after an exception.

    Args:
        model: any module; afterwards also reachable as ``.model``.
        parameters: the parameters that move; all others stay frozen. On one device.
        sketch: any sketch with ``n == parameters.n``; BlockSum too.

    Raises:
        InputError: sketch and parameters differ in n, parameters of another model or on several devices, or the model
            is open in another Subspace.

    Example:
        >>> model = torch.nn.Linear(30, 2)
        >>> parameters = Parameters(model)
        >>> with Subspace(model, parameters, AFFD(parameters.n, 8)) as subspace:
        ...     optimiser = torch.optim.Adam(subspace.parameters(), lr=1e-3)
        ...     loss = subspace(torch.ones(4, 30)).square().mean()
        ...     loss.backward()
        ...     optimiser.step()
    """

    model: nn.Module
    w: nn.Parameter
    _prefix: str

    def __init__(self, model: nn.Module, parameters: Parameters, sketch: Sketch) -> None:
        device = _checked(parameters, sketch)
        super().__init__()
        substitution = Substitution(model, dict(parameters), self._value)
        self.selection, self.sketch = parameters, sketch
        self.model = model
        wide = torch.float64 if any(t.dtype == torch.float64 for _, t in parameters) else torch.float32
        self.w = nn.Parameter(torch.zeros(sketch.d, dtype=wide, device=device))
        self._substitution: Substitution | None = substitution
        self._found = _Found.of(model)
        self._point: _Point | None = None
        self._base: str | None = None
        model.requires_grad_(False)
        self.training = model.training
        self._refresh_hook = model.register_forward_pre_hook(partial(_refresh, self))
        self.register_state_dict_post_hook(_leave_base_out)
        self.register_load_state_dict_pre_hook(_check_fingerprint)
        self.register_load_state_dict_post_hook(_expect_no_base)
        wrapped: Any = type(model)
        self.__class__ = _with_signature(wrapped)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at theta0 + Phiᵀ w."""
        self._require_open()
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What a Subspace lacks (config, generate, device, ...) its model may have.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "w"):
                raise
            return getattr(super().__getattr__("model"), name)

    def __repr__(self) -> str:
        return f"Subspace({type(self.model).__name__}, {self.selection!r}, {self.sketch!r})"

    def merge(self) -> nn.Module:
        """Write theta0 + Phiᵀ w into the model's parameters, close, and return the model. Buffers stay as trained."""
        self._require_open()
        self._refresh()
        assert self._point is not None
        with torch.no_grad():
            for name, parameter in self.selection:
                parameter.copy_(self._point.plain[name])
        self._found.buffers.clear()
        self.close()
        return self.model

    def close(self) -> None:
        """Leave the model as it was found; ``w`` and the state dict stay readable. Closing twice is fine."""
        if self._substitution is None:
            return
        self._refresh_hook.remove()
        self._substitution.undo()
        self._substitution = self._point = None
        self._found.restore(self.model)

    def __enter__(self) -> Subspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the point theta0 + Phiᵀ w ---

    def _require_open(self) -> None:
        if self._substitution is None:
            raise InputError("a closed Subspace", "an open one", "Make a new Subspace and load this one's state_dict")

    def _value(self, name: str) -> Tensor:
        """Return what the model reads in the place of the parameter ``name``."""
        point = self._point
        if point is None or point.version != self.w._version:
            point = self._move()
        if not (torch.is_grad_enabled() and self.w.requires_grad):
            return point.plain[name]
        if point.tracked is None:
            point.track(self.w, self.sketch)
        return point.reading(name)

    def _refresh(self) -> None:
        """Move to the present w. Compared by value, because not every optimiser raises its version counter."""
        point = self._point
        if point is None or point.w.device != self.w.device or not torch.equal(point.w, self.w):
            self._move()

    def _move(self) -> _Point:
        self._point = None  # frees the old buffer before the new one is made
        with torch.inference_mode(False), torch.no_grad(), _full_precision(self.w.device):
            w = self.w.detach().clone()
            delta = self.sketch._apply_adjoint(_wide(w)[None])[0]
            if delta.untyped_storage().data_ptr() == w.untyped_storage().data_ptr():
                delta = delta.clone()
            plain = {}
            for (name, parameter), part in zip(self.selection, self.selection.unflatten(delta).values(), strict=True):
                plain[name] = (part.add_(parameter) if _widens(parameter, part) else part + parameter).to(parameter)
        self._point = _Point(self.w._version, w, plain)
        return self._point

    # --- saving ---

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the sketch, of the parameters' names and shapes, and of theta0 itself."""
        if self._base is None:
            self._base = self.selection.fingerprint(content=True)
        return {"sketch": self.sketch.fingerprint, "parameters": self.selection.fingerprint(), "theta0": self._base}

    def get_extra_state(self) -> Tensor:
        """Return the fingerprints as bytes in a tensor, which every file format of state dicts can hold."""
        return torch.tensor(list(json.dumps(self.fingerprints).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the fingerprints were compared before anything was loaded."""


@dataclass
class _Point:
    """The values at one w: plain, and (once asked for) as functions of w for autograd."""

    version: int
    w: Tensor
    plain: dict[str, Tensor]
    tracked: dict[str, Tensor] | None = None
    gradient: _Gradient | None = None

    def track(self, w: Tensor, sketch: Sketch) -> None:
        self.gradient = _Gradient(self.plain, sketch)
        with torch.inference_mode(False):
            values = _Lift.apply(w, list(self.plain.values()), self.gradient)
        self.tracked = dict(zip(self.plain, values, strict=True))

    def reading(self, name: str) -> Tensor:
        assert self.tracked is not None
        value: Tensor = _Tap.apply(self.tracked[name], name, self.gradient)
        return value

    def __deepcopy__(self, memo: Any) -> None:
        """Vanish: a copied Subspace makes its own point, for tensors with a history cannot be copied."""


@dataclass
class _Found:
    """What of a model a Subspace or its training changes besides reading: to be put back."""

    modes: dict[nn.Module, bool]
    trainable: dict[nn.Parameter, bool]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> _Found:
        return cls(
            {module: module.training for module in model.modules()},
            {parameter: parameter.requires_grad for parameter in model.parameters()},
            {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        )

    def restore(self, model: nn.Module) -> None:
        for module, mode in self.modes.items():
            module.training = mode
        for parameter, trainable in self.trainable.items():
            parameter.requires_grad_(trainable)
        for name in self.changed(model):
            model.get_buffer(name).copy_(self.buffers[name])

    def changed(self, model: nn.Module) -> list[str]:
        """Return the buffers that no longer hold what they held (statistics of batch normalisation, for instance)."""
        now = dict(model.named_buffers())
        return [n for n, old in self.buffers.items() if n in now and not torch.equal(old.to(now[n].device), now[n])]


class _Lift(torch.autograd.Function):
    """The values at a point as functions of w: theta0 + Phiᵀ w, whose vector-Jacobian product is the sketch."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, values: list[Tensor], gradient: _Gradient) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.dtype = gradient, w.dtype
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.gradient.sketched(grads).to(ctx.dtype), None, None


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
        if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
            return grad, None, None
        if grad is not None:
            ctx.gradient.add(ctx.name, grad)
        return None, None, None


class _Gradient:
    """Gathers the gradient with respect to theta in one vector while backward runs, then sketches it.

    A step thus holds n numbers of gradient and not 2n. Holds no tensor of the graph: the graph holds it, and a cycle
    would keep n numbers alive until the next garbage collection.
    """

    def __init__(self, values: dict[str, Tensor], sketch: Sketch) -> None:
        self.sketch = sketch
        self.device = next(iter(values.values())).device
        self.dtype = max((value.dtype for value in values.values()), key=lambda dtype: torch.finfo(dtype).bits)
        ends = list(accumulate(value.numel() for value in values.values()))
        self.places = {name: slice(*ends) for name, ends in zip(values, pairwise([0, *ends]), strict=True)}
        # By backward pass: re-entrant checkpointing runs one inside another, and one that failed leaves its own behind.
        self.passes: dict[int, tuple[Tensor, set[str]]] = {}

    def add(self, name: str, grad: Tensor) -> None:
        running = torch._C._current_graph_task_id()
        if running not in self.passes:
            self.passes[running] = torch.empty(self.sketch.n, dtype=self.dtype, device=self.device), set()
        vector, seen = self.passes[running]
        place = vector[self.places[name]].view(grad.shape)
        grad = grad.to_dense() if grad.is_sparse else grad
        if name in seen:
            place.add_(grad)
        else:
            place.copy_(grad)
            seen.add(name)

    def sketched(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        if any(grad is not None for grad in grads):
            return self._differentiably(grads)
        running = torch._C._current_graph_task_id()
        if running not in self.passes:
            return torch.zeros(self.sketch.d, device=self.device)
        vector, seen = self.passes.pop(running)
        for name in self.places.keys() - seen:  # parameters that this loss does not use
            vector[self.places[name]].zero_()
        with _full_precision(vector.device):
            # Unchecked, for infinities must reach the gradient scaler of mixed precision, which skips the step.
            return self.sketch._apply(_wide(vector)[None])[0]

    def _differentiably(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        known = next(grad for grad in grads if grad is not None)
        parts = [
            known.new_zeros(place.stop - place.start) if grad is None else grad.reshape(-1)
            for place, grad in zip(self.places.values(), grads, strict=True)
        ]
        with _full_precision(known.device):
            return self.sketch(torch.cat([part.to(self.dtype) for part in parts]))


def _checked(parameters: Parameters, sketch: Sketch) -> torch.device:
    if sketch.n != parameters.n:
        raise InputError(
            f"{sketch!r} for {parameters!r}",
            f"a sketch with n={parameters.n}",
            f"Type {type(sketch).__name__}(parameters.n, {sketch.d})",
        )
    devices = sorted({str(t.device) for _, t in parameters})
    if len(devices) > 1:
        raise InputError(
            f"parameters on {', '.join(devices)}", "parameters on one device", "Move the model with model.to(device)"
        )
    return torch.device(devices[0])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _widens(parameter: Tensor, part: Tensor) -> bool:
    """Whether adding the parameter into ``part`` in place loses nothing."""
    return torch.promote_types(parameter.dtype, part.dtype) == part.dtype


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        yield


@cache
def _with_signature(wrapped: type[nn.Module]) -> type[Subspace]:
    """Return a Subspace whose ``forward`` shows the wrapped model's signature, which Trainers look at."""

    def forward(self: Subspace, *args: Any, **kwargs: Any) -> Any:
        return Subspace.forward(self, *args, **kwargs)

    forward.__doc__ = Subspace.forward.__doc__
    forward.__signature__ = inspect.signature(wrapped.forward)  # type: ignore[attr-defined]
    names = {name: getattr(Subspace, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type("Subspace", (Subspace,), {"forward": forward} | names)


def _refresh(subspace: Subspace, *_: Any) -> None:
    subspace._refresh()


def _leave_base_out(subspace: Subspace, state: dict[str, Any], prefix: str, _: Any) -> None:
    base = f"{prefix}model."
    kept = {base + name for name in subspace._found.changed(subspace.model)}
    for key in [key for key in state if key.startswith(base) and key not in kept]:
        del state[key]


def _check_fingerprint(subspace: Subspace, state: dict[str, Any], prefix: str, *_: Any) -> None:
    subspace._prefix = f"{prefix}model."
    saved = state.get(f"{prefix}_extra_state")
    if saved is None:
        return
    theirs, ours = json.loads(bytes(saved.tolist()).decode()), subspace.fingerprints
    if different := [key for key in ours if theirs.get(key) != ours[key]]:
        raise FingerprintError(
            f"a state dict made with {' and '.join(f'{k} {theirs.get(k)}' for k in different)}",
            f"{' and '.join(f'{k} {ours[k]}' for k in different)}, that of this Subspace",
            "Load it with the same base weights, parameters, sketch kind, d and seed",
        )


def _expect_no_base(subspace: Subspace, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(subspace._prefix)]
