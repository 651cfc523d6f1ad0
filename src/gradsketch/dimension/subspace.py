"""A model that trains in d random directions: theta = theta0 + Phiᵀ w."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.as_found import Buffers, Modes, Trainability
from gradsketch.dimension import saving
from gradsketch.dimension.checks import check_held_whole, check_not_transformed, device_of
from gradsketch.dimension.holding import Holding
from gradsketch.dimension.lifting import Point, Reserve, is_differentiated
from gradsketch.errors import InputError
from gradsketch.fsdp import is_sharded
from gradsketch.gradients.curvature.sharing import in_step_over
from gradsketch.gradients.parameters import Parameters, Selection, selected
from gradsketch.lockstep import Lockstep
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.recipe import made_from
from gradsketch.stand_ins import Readings, Source, check_held, made_again

__all__ = ["Subspace"]


class Subspace(nn.Module):
    """The model at theta0 + Phiᵀ w, with ``w`` ([d], zero at first) as its only trainable tensor.

    Li et al., "Measuring the intrinsic dimension of objective landscapes" (ICLR 2018), with the sketches of Schioppa
    (arXiv 2402.03994) as the map. Train it like any module; the gradient of ``w`` is Phi ∇L exactly. The parameters
    are never written to: the model reads theta0 + Phiᵀ w from one buffer of n numbers, made anew when ``w`` has
    changed. Until ``close()`` the model itself computes at theta0 + Phiᵀ w too, so ``model.generate`` and evaluation
    code work; its own ``state_dict`` still holds theta0. Its ``hessian`` is that at this point, and the ``hessian`` of
    the Subspace is Phi H Phiᵀ. Over a model that FSDP2 shares out, ranks go in step: each gives its own rows, w moves
    by the mean of their losses, and each holds its share of theta. Use it as a context manager, or ``close()`` it, and
    the model is as it was found (weights, buffers, modes, requires_grad), also after an exception.

    Args:
        model: any module; afterwards also reachable as ``.model``.
        parameters: those that move, a selection or globs of names, on one device; None for all that are trainable.
        sketch: any sketch with ``n == parameters.n``; BlockSum too. Over a shared model AFFD, AFJL, SJLT or BlockSum.

    Raises:
        InputError: sketch and parameters differ in n, parameters of another model, on several devices or of whole
            numbers (quantised); the model is open in another Subspace, is wrapped for several processes, or is shared
            out in another way than by ``fully_shard`` with its defaults.

    Example:
        >>> model = torch.nn.Linear(30, 2)
        >>> parameters = gs.Parameters(model)
        >>> with gs.Subspace(model, parameters, gs.AFFD(parameters.n, 8)) as subspace:
        ...     optimiser = torch.optim.Adam(subspace.parameters(), lr=1e-3)
        ...     loss = subspace(torch.ones(4, 30)).square().mean()
        ...     loss.backward()
        ...     optimiser.step()
    """

    model: nn.Module
    w: nn.Parameter
    _prefix: str

    def __init__(self, model: nn.Module, parameters: Selection, sketch: Sketch) -> None:
        ranks = in_step_over(model)
        with ranks.together():
            self._open(model, parameters, sketch, ranks)

    def _open(self, model: nn.Module, parameters: Selection, sketch: Sketch, ranks: Lockstep) -> None:
        parameters, shared = selected(model, parameters), is_sharded(model)
        check_held_whole(model, shared=shared)
        check_held(model, dict(parameters))
        device = device_of(parameters, sketch, shared=shared)
        holding = Holding(model, parameters, sketch, ranks)
        # Of a shared model it is made by all ranks, and a state dict may be asked for by one.
        theta0 = parameters.fingerprint(content=True) if shared else None
        super().__init__()
        found, buffers = (Modes(model), Trainability(model)), Buffers(model)
        wrapped: Any = type(model)
        readings = Readings(model, holding.answered, Source(self, self._value, self._ready, self._refresh))
        self.selection, self.sketch = parameters, sketch
        self.model = model
        wide = torch.float64 if any(t.dtype == torch.float64 for _, t in parameters) else torch.float32
        self.w = nn.Parameter(torch.zeros(sketch.d, dtype=wide, device=device))
        self._own_dtype = wide
        self._readings: Readings | None = readings
        self._found, self._found_buffers = found, buffers
        self._holding, self._block = holding, ExitStack()
        self._point: Point | None = None
        self._reserve = Reserve()
        self._theta0 = theta0
        model.requires_grad_(False)
        holding.open()
        self.training = model.training
        self._hooks = [m.register_forward_pre_hook(partial(_before_forward, self)) for m in _entrances(model)]
        saving.keep_state_small(self)
        self.__class__ = _with_signature(wrapped)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at theta0 + Phiᵀ w."""
        self._require_open()
        if torch.compiler.is_compiling():
            self._holding.check_compiled()
        with self._holding.passing():
            try:
                return self.model(*args, **kwargs)
            finally:
                if self._point is not None:
                    self._point.rest()

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
        with self._holding.ranks.together(), torch.no_grad():
            point = self._move()  # whatever was written to theta0, past its version counter too
            self._holding.write(point.plain)
        self._close()
        return self.model

    def close(self) -> None:
        """Leave the model as it was found; ``w`` and the state dict stay readable. Closing twice is fine."""
        if self._readings is not None:
            self._close()
            self._found_buffers.put_back()

    def _close(self) -> None:
        assert self._readings is not None
        for hook in self._hooks:
            hook.remove()
        self._readings.undo()
        self._holding.close()
        self._readings = self._point = None
        self._reserve = Reserve()
        for keeper in self._found:
            keeper.put_back()

    def __enter__(self) -> Subspace:
        if self._holding.ranks.several:  # what one rank raises inside ends the others
            self._block.enter_context(self._holding.ranks.together())
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()
        self._block.__exit__(*raised)

    # --- the point theta0 + Phiᵀ w ---

    def _require_open(self) -> None:
        if self._readings is None:
            raise InputError("a closed Subspace", "an open one", "Make a new Subspace and load this one's state_dict")

    def _value(self, name: str) -> Tensor:
        """Return what the model reads in the place of the parameter ``name``."""
        point = self._point
        if point is None or not point.is_made_from(self.w):
            del point  # or the old buffer would live on while the new one is made
            point = self._move()
        tracked = is_differentiated(self.w)
        if tracked:
            self._track(point)
        return self._holding.value(point, name, tracked=tracked)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Let FSDP2, which looks after its shards when they are loaded or moved, find them in their place."""
        self._pause()
        try:
            yield
        finally:
            self._resume()

    def _pause(self) -> None:
        if self._readings is not None and self._holding.is_shared_out:
            self._readings.pause()

    def _resume(self) -> None:
        if self._readings is not None:
            self._readings.resume()

    def _apply(self, fn: Any, recurse: bool = True) -> Subspace:
        with self._paused():
            super()._apply(fn, recurse)
        self._own_dtype = self.w.dtype
        return self

    def _track(self, point: Point) -> None:
        if point.tracked is None:
            point.track(self.w, self._holding.map, self._reserve, self._holding.rest)

    def _ready(self, name: str) -> Tensor:
        """Return the same for a compiled model, from what its last call found ready."""
        self._holding.check_compiled()
        assert self._point is not None
        assert self._point.ready is not None
        return self._point.ready[name]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make_ready(self) -> None:
        """Choose, before each call of the model, what compiled modules read."""
        self._resume()  # where loading a state dict has failed
        self._holding.check(self, self.w)  # it may have been sharded since
        check_not_transformed(self.w)
        self._refresh()
        point = self._point
        assert point is not None
        differentiated = is_differentiated(self.w)
        if differentiated:
            self._track(point)
        point.ready = point.tracked if differentiated else point.plain

    def _refresh(self) -> None:
        """Move to the present w and parameters.

        w is compared by value, because not every optimiser raises its version counter.
        """
        point = self._point
        kept = point is not None and point.is_made_from(self.w) and point.starts_from(self._holding.answered)
        moved = point is None or not (kept and point.has_value_of(self.w))
        del point  # or the old buffer would live on while the new one is made
        if self._holding.ranks.any(moved):
            self._move()

    def _move(self) -> Point:
        if self._readings is not None:
            self._readings.check_there(self.model)
        self._point = None  # frees the old buffer before the new one is made
        self._holding.check_same(self.w)
        holding = self._holding
        self._point = Point.at(self.w, holding.answered, *holding.present(), holding.map, self._at_least())
        return self._point

    def _at_least(self) -> torch.dtype | None:
        """Return the dtype of what stands for w in a wider one: whoever put it there has widened all else.

        Differences of gradients would else move w by steps that the weights' rounding swallows.
        """
        if isinstance(self.w, nn.Parameter):
            self._own_dtype = self.w.dtype
        wider = torch.promote_types(self._own_dtype, self.w.dtype) != self._own_dtype
        return self.w.dtype if wider and not self._holding.is_shared_out else None

    # --- saving ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a few kilobytes to a folder: how the sketch is made, and the state dict."""
        ranks = self._holding.ranks
        with ranks.together():
            if ranks.rank == 0:
                saving.write(self, Path(folder))

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path, sketch: Sketch | None = None) -> Subspace:
        """Open a Subspace saved by ``save_pretrained`` on the same base model, on any machine.

        Args:
            model: the base model, with the weights it had then.
            folder: where it was saved.
            sketch: the sketch, where its kind is not registered.

        Raises:
            InputError: nothing was saved there, or the sketch is of a kind that is not registered.
            FingerprintError: another base model, or another sketch.
        """
        with in_step_over(model).together():
            config, state = saving.read(Path(folder), next(model.parameters()).device)
        parameters = Parameters(model, config["parameters"], frozen=True)
        subspace = cls(model, parameters, made_from(config["sketch"]) if sketch is None else sketch)
        try:
            with subspace._holding.ranks.together():
                subspace.load_state_dict(state)
        except BaseException:
            subspace.close()
            raise
        return subspace

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the sketch, of the parameters' names and shapes, and of theta0 itself."""
        if self._theta0 is None:
            self._theta0 = self.selection.fingerprint(content=True)
        return {"sketch": self.sketch.fingerprint, "parameters": self.selection.fingerprint(), "theta0": self._theta0}

    @property
    def changed_buffers(self) -> list[str]:
        """The model's buffers that training changed: statistics of batch normalisation, for instance."""
        return self._found_buffers.changed()

    def get_extra_state(self) -> Tensor:
        """Return the fingerprints, for the state dict."""
        return saving.as_tensor(self.fingerprints)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the fingerprints were compared before anything was loaded."""


@cache
def _with_signature(wrapped: type[nn.Module]) -> type[Subspace]:
    """Return a Subspace whose ``forward`` shows the wrapped model's signature, which Trainers look at."""

    def forward(self: Subspace, *args: Any, **kwargs: Any) -> Any:
        return Subspace.forward(self, *args, **kwargs)

    forward.__doc__ = Subspace.forward.__doc__
    forward.__signature__ = inspect.signature(wrapped.forward)  # type: ignore[attr-defined]

    def reduced(self: Subspace, protocol: Any) -> Any:
        return made_again(Subspace.__reduce_ex__(self, protocol), _with_signature, wrapped)

    names = {name: getattr(Subspace, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type("Subspace", (Subspace,), {"forward": forward, "__reduce_ex__": reduced} | names)


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Return the model, and the modules inside that are compiled and may be called alone."""
    return [m for m in model.modules() if m is model or hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]


def _before_forward(subspace: Subspace, *_: Any) -> None:
    subspace._make_ready()
