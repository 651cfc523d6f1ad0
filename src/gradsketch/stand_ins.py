"""Other tensors in the place of a model's parameters and buffers, without a word written to the model's own.

Two reaches, one for a block of ours and one for code of the user's:

* ``stand_ins``: everybody sees the others. They stand where the model's own stood, so that modules read them,
  ``parameters()`` yields them and ``load_state_dict`` writes to them, until the block ends.
* ``Readings``: only a module that reads its parameter gets something else. Optimisers, ``state_dict`` and ``to`` keep
  seeing the model's own, for as long as the user likes.

They compose: a stand-in put over a reading is obeyed, and ``read_instead`` says what a module would read otherwise.
``torch.func.functional_call`` is neither, because it is over before the backward pass: layers with activation
checkpointing then run again at the model's own weights, without a word.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.walks import modules_of

__all__ = [
    "ALONE",
    "Reading",
    "Readings",
    "Source",
    "check_held",
    "held",
    "is_open",
    "made_again",
    "read_instead",
    "stand_ins",
    "stand_ins_within",
]

# Held while a model is not as its user sees it: another thread that works with it waits.
ALONE = threading.RLock()
_KEY = "_gradsketch_readings"


def held(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that stand in the model now, by every name that they have."""
    with ALONE:
        return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def check_held(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not the model's own.

    Raises:
        InputError: one is not; the message names it.
    """
    own = {id(tensor) for tensor in held(model).values()}
    strangers = [name for name, tensor in tensors.items() if id(tensor) not in own]
    if strangers:
        raise InputError(
            f"{len(strangers)} of {len(tensors)} parameters that {type(model).__name__} does not hold,"
            f" {strangers[0]!r} first",
            "Parameters made from this very model",
            "Type Parameters(model); loading or moving a model may replace its tensors, so make them afterwards",
        )


@contextmanager
def stand_ins(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let tensors take the place of the parameters and buffers of these names until the block ends.

    A tensor stands under every name of what it replaces, so ties stay ties. Blocks may be nested. Keep the block open
    until the backward pass is over. Whatever else their modules registered or removed meanwhile is undone at the end.

    Raises:
        InputError: the model has no parameter or buffer of that name.
    """
    with ALONE, stand_ins_within(model, tensors):
        yield


@contextmanager
def stand_ins_within(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Do the same inside a block that has the model to itself already, on whichever thread its layers run.

    Autograd runs them on threads of its own where a checkpointed layer is on a GPU, and those would wait for ever.
    """
    others = {id(_own(model, name)): tensor for name, tensor in tensors.items()}
    found = [_Found.of(module) for module in modules_of(model) if _holds(module, others)]
    try:
        for was in found:
            was.replace(others)
        yield
    finally:
        for was in found:
            was.put_back()


def _holds(module: nn.Module, tensors: Mapping[int, Tensor]) -> bool:
    return any(id(tensor) in tensors for tensor in (*module._parameters.values(), *module._buffers.values()))


def _own(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        own: Any = module._parameters.get(attribute, module._buffers.get(attribute))
    except AttributeError:
        own = None
    if own is None:
        raise InputError(
            f"a tensor to stand for {name!r}, which {type(model).__name__} does not have",
            "names of its parameters and buffers",
            "List them with [name for name, _ in model.named_parameters()]",
        )
    return own  # type: ignore[no-any-return]


class _Found(NamedTuple):
    """What stood in a module before others took its place."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    flat: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _Found:
        # A recurrent layer keeps a list of its weights, and makes it anew in the forward pass that finds others.
        kept = ("_flat_weights", "_flat_weight_refs") if isinstance(module, nn.RNNBase) else ()
        flat = {name: vars(module)[name] for name in kept if name in vars(module)}
        return cls(module, dict(module._parameters), dict(module._buffers), flat)

    def replace(self, others: Mapping[int, Tensor]) -> None:
        both: tuple[dict[str, Any], ...] = (self.module._parameters, self.module._buffers)
        for places in both:
            places.update({name: others[id(tensor)] for name, tensor in places.items() if id(tensor) in others})

    def put_back(self) -> None:
        for places, originals in ((self.module._parameters, self.parameters), (self.module._buffers, self.buffers)):
            places.clear()
            places.update(originals)  # type: ignore[arg-type]
        vars(self.module).update(self.flat)


class Source(NamedTuple):
    """Who answers when a module reads: a module whose own parameters the answers are computed from.

    ``refresh`` is called before ``read_instead`` asks for values, so that these are the present ones. A compiled module
    cannot follow how a value is made, and takes what stands ``ready``; its owner sees to that before each call.
    """

    owner: nn.Module
    value: Callable[[str], Tensor]
    ready: Callable[[str], Tensor]
    refresh: Callable[[], None]


class Reading(NamedTuple):
    """What one module reads in the place of one parameter."""

    name: str
    parameter: Tensor | None
    source: Source

    def now(self) -> Tensor:
        """Return the present value, as a constant."""
        with torch.no_grad():
            return self.source.value(self.name).detach()


class Readings:
    """While they last, a module that reads a chosen parameter gets ``source.value(name)`` instead.

    Each module that owns a chosen parameter gets a subclass of its own class whose property answers the reading; the
    Parameter object stays where it was, so ``named_parameters``, ``state_dict`` and ``to`` keep seeing it. This also
    holds for code that runs later, such as the recomputation of activation checkpointing. The answer is asked for at
    each reading, because a gradient can be taken from there as soon as it is complete.

    Raises:
        InputError: a tensor is not a parameter of the model, or the model has readings already.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], source: Source) -> None:
        _check_at_rest(model)
        check_held(model, tensors)
        names = {id(tensor): name for name, tensor in tensors.items()}
        self._owners: list[nn.Module] = []
        self._paused: list[tuple[nn.Module, type[nn.Module]]] = []
        for module in modules_of(model):
            own = {a: Reading(names[id(p)], p, source) for a, p in module._parameters.items() if id(p) in names}
            if own:
                vars(module)[_KEY] = own
                cls: Any = type(module)
                module.__class__ = _answering(cls, tuple(own))
                self._owners.append(module)

    def pause(self) -> None:
        """Let modules read their own parameters until ``resume``, for code that looks after those."""
        self.resume()
        for module in self._owners:
            cls = type(module)
            self._paused.append((module, cls))
            module.__class__ = cls.__bases__[0]

    def resume(self) -> None:
        """Let modules read what the source answers again."""
        while self._paused:
            module, cls = self._paused.pop()
            module.__class__ = cls

    def check_there(self, model: nn.Module) -> None:
        """Refuse a model from which a layer with a chosen parameter was taken: its own would be trained no more.

        Raises:
            InputError: it is one.
        """
        there = {id(module) for module in modules_of(model)}
        for module in self._owners:
            if id(module) not in there:
                raise _taken_out(next(iter(vars(module)[_KEY].values())), f"a {type(model).__name__} with its layer")

    def undo(self) -> None:
        """Give every module its own class back."""
        self.resume()
        for module in self._owners:
            if vars(module).pop(_KEY, None) is not None:
                module.__class__ = type(module).__bases__[0]


def read_instead(model: nn.Module) -> dict[str, Reading]:
    """Return what the model's modules now read in the place of its parameters, by name; nothing for a model at rest.

    A tensor that ``stand_ins`` has put there is in the model's own place and does not count.
    """
    if not is_open(model):
        return {}
    readings = {
        f"{path}.{attribute}" if path else attribute: reading
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, reading in vars(module).get(_KEY, {}).items()
        if module._parameters.get(attribute) is reading.parameter
    }
    for refresh in {id(r.source.owner): r.source.refresh for r in readings.values()}.values():
        refresh()
    return readings


def is_open(model: nn.Module) -> bool:
    """Whether modules read something else in the place of parameters."""
    return any(_KEY in vars(module) for module in modules_of(model))


def _check_at_rest(model: nn.Module) -> None:
    if is_open(model):
        raise InputError(
            f"a {type(model).__name__} that is open in another Subspace",
            "a model at rest",
            "Call close() or merge() on the first Subspace, or use it as a context manager",
        )


@cache
def _answering(cls: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {
        attribute: property(partial(_read, attribute=attribute), partial(_refuse_other, attribute=attribute))
        for attribute in attributes
    }
    body["register_parameter"] = _register
    if issubclass(cls, nn.RNNBase):  # hands its kernels a list of Parameters made beforehand
        body["_flat_weights"] = property(_flat_weights, lambda self, value: vars(self).update(_flat_weights=value))
    body["__reduce_ex__"] = lambda self, protocol: made_again(
        cls.__reduce_ex__(self, protocol), _answering, cls, attributes
    )
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), body | names)


def made_again(reduced: Any, make: Callable[..., type], *arguments: Any) -> Any:
    """Return what pickle and copy need of an object whose class is ``make(*arguments)``, found under no name."""
    made, _, *state = reduced
    return (_blank, (make, *arguments), *state) if made is copyreg.__newobj__ else reduced  # type: ignore[attr-defined]


def _blank(make: Callable[..., type], *arguments: Any) -> Any:
    cls: Any = make(*arguments)
    return cls.__new__(cls)


def _read(module: nn.Module, attribute: str) -> Tensor | None:
    reading: Reading = vars(module)[_KEY][attribute]
    if attribute not in module._parameters:
        raise _taken_out(reading, f"a {type(module).__name__}")
    parameter = module._parameters[attribute]
    if parameter is not reading.parameter:
        return parameter
    if torch.compiler.is_compiling():
        return reading.source.ready(reading.name)
    try:
        return reading.source.value(reading.name)
    except AttributeError as error:  # would send Python to Module.__getattr__, which answers with the parameter
        raise RuntimeError(f"no value for the parameter {reading.name!r}") from error


def _refuse_other(module: nn.Module, value: Any, attribute: str) -> None:
    """Refuse to put a tensor where a parameter was taken out, as weight norm and spectral norm do by hooks."""
    raise _taken_out(vars(module)[_KEY][attribute], f"a {type(module).__name__}")


def _register(module: nn.Module, name: str, value: Any) -> None:
    """Register a parameter, but nothing else in the place of a chosen one, nor that one elsewhere, as pruning does."""
    for attribute, reading in vars(module)[_KEY].items():
        replaced = name == attribute and value is not reading.parameter
        parts = {f"{attribute}_{part}" for part in ("orig", "g", "v")}  # of pruning, spectral norm and weight norm
        if replaced or (name != attribute and value is not None and (value is reading.parameter or name in parts)):
            # The norms take it out first.
            module._parameters.setdefault(attribute, cast(nn.Parameter, reading.parameter))
            raise _taken_out(reading, f"a {type(module).__name__}")
    nn.Module.register_parameter(module, name, value)


def _taken_out(reading: Reading, where: str) -> InputError:
    return InputError(
        f"{reading.name!r}, which was taken out of {where}, open in a Subspace",
        "the parameters that the Subspace was made over",
        "Call merge() or close() first; parametrize, prune or replace layers before a Subspace is made",
    )


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in vars(module)["_flat_weights_names"]]
