"""What decides a number: the model's tensors and modes, the data's content, the task, and the code of a function.

State that outlives a process is taken up only where all of these agree (``durable.require_same``).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsketch.fsdp import at_rest, class_of, whole
from gradsketch.gradients.data import Batches
from gradsketch.gradients.parameters import bare
from gradsketch.gradients.tasks import Function, Task
from gradsketch.stand_ins import read_instead
from gradsketch.walks import modules_of

__all__ = [
    "canonical",
    "code_digest",
    "data_facts",
    "digest",
    "model_facts",
    "modes_digest",
    "settings_of",
    "task_facts",
]

_JSON_SCALARS = frozenset({bool, int, float, str, type(None)})


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return the model's class and a hash of all its weights and buffers, ties counted once.

    Of a model that is open in a Subspace the weights are those its modules read now, because these decide a number.
    """
    at_rest(model)
    hashed, instead = hashlib.sha256(), read_instead(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = (instead[name].now() if name in instead else whole(tensor.detach())).cpu().contiguous()
        hashed.update(f"{name}{value.dtype}{list(value.shape)}".encode())
        hashed.update(value.view(-1).view(torch.uint8).numpy().data)
    return {"class": class_of(model).__name__, "weights": hashed.hexdigest()[:16]}


def settings_of(model: nn.Module) -> dict[str, str]:
    """Return, for each Python attribute of the modules that is a number, a hash of its values in all of them.

    A temperature or a scale decides losses and stands in no tensor. Rates of dropout do not count, for they decide
    nothing in evaluation mode.
    """
    found: dict[str, list[Any]] = {}
    for place, module in enumerate(modules_of(bare(model))):
        kind = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and "drop" not in f"{name} {kind}".lower() and _is_number(value):
                found.setdefault(name, []).append([place, value])
    return {name: digest(values) for name, values in sorted(found.items())}


def _is_number(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    return bool(values) and all(type(each) in (int, float) for each in values)


def modes_digest(model: nn.Module) -> str:
    """Return "eval", "train", or a hash of which modules are in which mode."""
    modes = [module.training for module in model.modules()]
    if len(set(modes)) == 1:
        return "train" if modes[0] else "eval"
    return digest(modes)


def task_facts(task: Task) -> dict[str, Any]:
    """Return what decides a task's losses: its options, and the code of functions."""
    facts: dict[str, Any] = {"class": type(task).__name__, **task.options()}
    if isinstance(task, Function):
        facts["code"] = code_digest(task.function)
        if task.collates is not None:
            facts["collate"] = code_digest(task.collates)
    return facts


def data_facts(data: Batches) -> dict[str, Any]:
    """Return how much data there is, and a hash of its content.

    The size of the batches is left out where the task makes them: after running out of memory a run goes on with
    smaller ones. Data that is another at every reading, such as random crops, is known by its length alone.
    """
    count = {"examples": len(data.data)} if data.is_raw else {"batches": len(data)}
    first, again = (digest(next(_parts(data))) for _ in range(2))
    content = _hashed(piece for part in _parts(data) for piece in canonical(part))
    return {**count, "content": content if first == again else "another at every reading"}


def _parts(data: Batches) -> Iterator[Any]:
    return (data.data[i] for i in range(len(data.data))) if data.is_raw else iter(data)


def digest(value: Any) -> str:
    """Return a hash of a value's content."""
    return _hashed(canonical(value))


def code_digest(function: Any) -> str:
    """Return a hash of what a callable computes: its code, its defaults, and the values it closes over.

    Values are numbers, texts, tensors and functions. A list or a model that the function reads is not looked into,
    because such things change while a function works. Nor are global variables.
    """
    return _hashed(_code(function, set()))


def _hashed(parts: Iterator[bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:16]


def canonical(value: Any) -> Iterator[bytes]:
    """Yield bytes that two values share only if they are equal (tensors: equal in dtype, shape and bits)."""
    if isinstance(value, Mapping):
        yield b"{%d" % len(value)
        for key in sorted(value, key=str):
            yield from canonical(str(key))
            yield from canonical(value[key])
    elif isinstance(value, list | tuple):
        if value and _JSON_SCALARS.issuperset(map(type, value)):  # tokens: a call for each took 8 us
            yield _text(value)
            return
        yield b"[%d" % len(value)
        for item in value:
            yield from canonical(item)
    elif isinstance(value, set | frozenset):  # of texts, whose order changes from process to process
        yield b"s%d" % len(value)
        yield from canonical(sorted(value, key=repr))
    elif isinstance(value, bytes | bytearray | memoryview):
        yield b"y%d:" % len(value) + bytes(value)
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biufc":  # texts, times, objects
        yield f"a{value.dtype}{list(value.shape)}".encode()
        yield from canonical([str(item) for item in np.atleast_1d(value).ravel()])
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.atleast_1d(value))
        yield f"t{array.dtype}{list(array.shape)}".encode()
        yield array.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes"):  # images
        yield f"b{[getattr(value, fact, None) for fact in ('mode', 'size', 'typecode')]}".encode()
        yield value.tobytes()
    elif hasattr(value, "__dict__"):  # an object of the user's, whose text may be its address
        yield type(value).__qualname__.encode()
        yield from canonical(vars(value))
    else:
        yield _text(value)


def _text(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", errors="surrogatepass")
    return b"j%d:" % len(text) + text


def _code(value: Any, seen: set[int]) -> Iterator[bytes]:
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *(x for pair in sorted(value.keywords.items()) for x in pair)):
            yield from _code(part, seen)
    elif isinstance(value, MethodType):
        yield from _code(value.__func__, seen)
    elif isinstance(value, FunctionType):
        if id(value) not in seen:  # it may call itself
            seen.add(id(value))
            yield from _instructions(value.__code__)
            closed = inspect.getclosurevars(value).nonlocals.values()
            for part in (*closed, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                yield from _code(part, seen)
    elif isinstance(value, bool | int | float | str | Tensor):
        yield from canonical(value)
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__).encode()


def _instructions(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            # The order of a set of texts changes from process to process.
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()
