"""What a model has shown under a task, remembered so that sketchers that are made again need no new proofs."""

from __future__ import annotations

import functools
import random
import types
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradsketch.gradients.per_example.audit import Audits
from gradsketch.gradients.per_example.interception import Kind
from gradsketch.gradients.tasks import Task
from gradsketch.walks import modules_of

__all__ = ["Known", "flags_of", "recall"]

# Of one model, because tasks that capture something new each time would pile up.
_REMEMBERED = 64


@dataclass
class Known:
    """What was learnt of a model under a task."""

    slow: dict[str, str] = field(default_factory=dict)  # parameters on the exact path, and why
    exact: str = ""  # why the whole loss is on the exact path
    seen: set[Kind] = field(default_factory=set)  # kinds of calls that an audit has covered
    usual: dict[bool, set[str]] = field(default_factory=dict)  # calls in every audited batch, of one and of several
    independent: bool = False  # rows were the same alone as in company
    witnessed: set[Hashable] = field(default_factory=set)  # kinds of maps whose rows were held against whole gradients
    derivative: bool = False  # autograd's gradients of a split model were held against differences of losses
    apart: bool = False  # other kernels round so that other company proves too little
    audits: Audits = field(default_factory=Audits)
    draws: random.Random = field(default_factory=lambda: random.Random(0))

    def covered(self, kinds: set[Kind]) -> None:
        """Take up the kinds of calls of a batch whose audit was passed."""
        self.seen |= kinds
        for several in {kind[3] for kind in kinds}:
            calls = {kind[0] for kind in kinds}
            self.usual[several] = self.usual.get(several, calls) & calls

    def lacks(self, kinds: set[Kind]) -> bool:
        """Whether a batch is without a call that all audited batches had."""
        calls = {kind[0] for kind in kinds}
        return any(not self.usual.get(several, set()) <= calls for several in {kind[3] for kind in kinds})


# By model, then by what else decides: task, selection, method.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Any, Known]] = weakref.WeakKeyDictionary()


def recall(model: nn.Module, task: Task, *others: Any) -> Known:
    """Return what is known of a model under a task, given what else decides."""
    known = _KNOWN.setdefault(model, {})
    found = known.setdefault((_flags_of_model(model), _facts_of(task, _PLAIN, _Same), *others), Known())
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]
    return found


class _Same:
    """Equal to another of the same object, for as long as that lives; keeps nothing alive."""

    def __init__(self, value: Any) -> None:
        self._hash, self._get = id(value), _reference(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._get() is not None and self._get() is other._get()


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # as lists and dicts, which may change besides
        return lambda: None


_FLAGS = (bool, str, types.CodeType, types.NoneType)
_PLAIN = (*_FLAGS, int, float, torch.dtype, torch.device)


def flags_of(model: nn.Module, task: Task) -> Any:
    """Return what somebody may switch between two batches: flags of the model, and those that a task has captured.

    Numbers are left out, because tasks and modules count with them.
    """
    return _flags_of_model(model), _facts_of(task, _FLAGS, lambda _: None)


# Where a module keeps its hooks, by numbers that no other hook gets.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _flags_of_model(model: nn.Module) -> tuple[Any, ...]:
    """Return each module with its mode, flags and hooks, and what stands in the place of its forward method."""
    return tuple(
        (
            id(module),
            type(module),
            id(vars(module).get("forward")),
            *(number for hooks in _HOOKS for number in vars(module)[hooks]),
            *(value for value in vars(module).values() if type(value) in (bool, str)),
        )
        for module in modules_of(model)
    )


def _facts_of(value: Any, plain: tuple[type, ...], same: Callable[[Any], Any], depth: int = 5) -> Any:
    """Return what tells tasks apart that are made anew for each call: their code, and all that they have captured.

    An object of which no more is known is told by ``same``, and by those of its attributes that are plain values.
    """
    if isinstance(value, plain):
        return type(value), value
    parts = _parts(value)
    if parts is None or depth == 0:
        own = getattr(value, "__dict__", {})
        return same(value), *sorted((name, fact) for name, fact in own.items() if isinstance(fact, plain))
    return tuple(_facts_of(part, plain, same, depth - 1) for part in parts)


def _parts(value: Any) -> tuple[Any, ...] | None:
    """Return what makes up tasks, functions and tuples."""
    match value:
        case Task():
            return (type(value), *sorted(vars(value).items()))
        case types.FunctionType():
            captured = (_content(cell) for cell in value.__closure__ or ())
            return (value.__code__, value.__defaults__, *captured, *(value.__kwdefaults__ or {}).items())
        case types.MethodType():
            return (value.__func__, value.__self__)
        case functools.partial():
            return (value.func, value.args, *value.keywords.items())
        case tuple():
            return value
    return None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return cell
