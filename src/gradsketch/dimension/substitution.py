"""Let a model compute with other tensors in the place of its parameters, without touching the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradsketch.errors import InputError

__all__ = ["Substitution"]

_KEY = "_gradsketch_substitution"


class Substitution:
    """While it lasts, reading a chosen parameter from its module yields ``value(name)`` instead.

    Each module that owns a chosen parameter gets a subclass of its own class whose property answers the reading; the
    Parameter object stays where it was, so ``named_parameters``, ``state_dict`` and ``to`` keep seeing it. Unlike
    ``torch.func.functional_call`` this also holds for code that runs later, such as the recomputation of activation
    checkpointing. A parameter put in the place of the chosen one (as ``functional_call`` does) is obeyed.

    Raises:
        InputError: a tensor is not a parameter of the model, or the model has a substitution already.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
        names = {id(tensor): name for name, tensor in tensors.items()}
        self._owners: list[nn.Module] = []
        slots = {
            module: {a: _Slot(names[id(p)], p, value) for a, p in module._parameters.items() if id(p) in names}
            for module in model.modules()
        }
        _check(model, tensors, {slot.name for attributes in slots.values() for slot in attributes.values()})
        for module, attributes in slots.items():
            if attributes:
                module.__dict__[_KEY] = attributes
                cls: Any = type(module)
                module.__class__ = _substituting(cls, tuple(attributes))
                self._owners.append(module)

    def undo(self) -> None:
        """Give every module its own class back."""
        for module in self._owners:
            if module.__dict__.pop(_KEY, None) is not None:
                module.__class__ = type(module).__bases__[0]


class _Slot(NamedTuple):
    name: str
    parameter: Tensor | None
    value: Callable[[str], Tensor]


def _check(model: nn.Module, tensors: Mapping[str, Tensor], found: set[str]) -> None:
    if any(_KEY in module.__dict__ for module in model.modules()):
        raise InputError(
            f"a {type(model).__name__} that is open in another Subspace",
            "a model at rest",
            "Call close() or merge() on the first Subspace, or use it as a context manager",
        )
    if strangers := [name for name in tensors if name not in found]:
        raise InputError(
            f"Parameters with {strangers[0]!r}, a tensor that this {type(model).__name__} does not hold",
            "Parameters made from the same model",
            "Type Parameters(model, ...) with the model you pass here",
        )


@cache
def _substituting(cls: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {attribute: property(partial(_read, attribute=attribute)) for attribute in attributes}
    if issubclass(cls, nn.RNNBase):  # hands its kernels a list of Parameters made beforehand
        body["_flat_weights"] = property(_flat_weights, lambda self, value: self.__dict__.update(_flat_weights=value))
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), body | names)


def _read(module: nn.Module, attribute: str) -> Tensor | None:
    parameter = module._parameters[attribute]
    slot: _Slot = module.__dict__[_KEY][attribute]
    if parameter is not slot.parameter:
        return parameter
    try:
        return slot.value(slot.name)
    except AttributeError as error:  # would send Python to Module.__getattr__, which answers with the parameter
        raise RuntimeError(f"no value for the parameter {slot.name!r}") from error


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module.__dict__["_flat_weights_names"]]
