"""The user's model is left exactly as found: one keeper for each thing that work on a model changes.

A keeper remembers what it finds when it is made and puts it back at the end of its block, whatever happened inside:
``with Modes(model), Trainability(model): …``. Where work is not a block, ``put_back()`` ends it. Hooks need no keeper:
the handle that registering one returns is a context manager itself.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradsketch.errors import GradsketchWarning
from gradsketch.stand_ins import stand_ins
from gradsketch.walks import buffers_of, modules_of, parameters_of

__all__ = [
    "Buffers",
    "Gradients",
    "Modes",
    "RandomState",
    "Trainability",
    "Weights",
    "Written",
    "buffers_aside",
    "evaluating",
    "seeded",
    "uncompiled",
]


_Keeper = TypeVar("_Keeper", bound="Keeper")


class Keeper(ABC):
    """Remembers something and puts it back."""

    @abstractmethod
    def put_back(self) -> None:
        """Restore what was found; may be called again."""

    def __enter__(self: _Keeper) -> _Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.put_back()


class Modes(Keeper):
    """The mode, train or eval, of every submodule."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = {module: module.training for module in modules_of(model)}

    def put_back(self) -> None:
        # One by one: model.train(flag) would flip the submodules that were in the other mode.
        for module, mode in self._modes.items():
            module.training = mode


class Trainability(Keeper):
    """Which parameters require grad; also of parameters that are not, or not at present, in the model."""

    def __init__(self, model: nn.Module, besides: Iterable[Tensor] = ()) -> None:
        self._flags = {tensor: tensor.requires_grad for tensor in (*parameters_of(model), *besides)}

    def only(self, chosen: Iterable[Tensor]) -> None:
        """Let exactly these require grad."""
        wanted = {id(tensor) for tensor in chosen}
        self._set({tensor: id(tensor) in wanted for tensor in self._flags})

    def put_back(self) -> None:
        self._set(self._flags)

    def _set(self, flags: Mapping[Tensor, bool]) -> None:
        for tensor, flag in flags.items():
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)


class Gradients(Keeper):
    """The ``.grad`` of every parameter, set aside meanwhile, because a loss may run a backward pass of its own."""

    def __init__(self, model: nn.Module) -> None:
        self._gradients = [(parameter, parameter.grad) for parameter in parameters_of(model)]
        for parameter, _ in self._gradients:
            parameter.grad = None

    def put_back(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient


class Weights(Keeper):
    """The values of the trainable parameters, as copies: for work that trains the model itself."""

    def __init__(self, model: nn.Module) -> None:
        self._values = [(p, p.detach().clone()) for p in parameters_of(model) if p.requires_grad]

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter, value in self._values:
            parameter.copy_(value)


class Buffers(Keeper):
    """The values of the buffers, as copies: for work that lasts, such as training, and that may move the model.

    A buffer that was replaced comes back itself, with the plain attributes of its module, which describe it (a rotary
    embedding notes for which length its frequencies hold). One that was moved or cast stays where it now is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._notes = [_Notes.of(module) for module in modules_of(model) if module._buffers]

    def changed(self) -> list[str]:
        """Return the names of buffers that no longer hold what they held."""
        now = dict(self._model.named_buffers())
        return [n for n, old in self._copies.items() if n in now and not _equal(old, now[n])]

    @torch.no_grad()
    def put_back(self) -> None:
        for note in self._notes:
            note.put_back()
        for name in self.changed():
            self._model.get_buffer(name).copy_(self._copies[name])


class Written(Keeper):
    """The parameters that a forward pass may write to: embeddings with ``max_norm``, prompts that project themselves.

    Tables that are known to be renormalised are copied, and of the others the smallest, 4 MiB in all, as are adapters;
    nobody knows beforehand which of them a forward pass writes to, and ``.data`` tells no version. A larger one that
    was written to is named in a warning.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {
            id(parameter): (name, parameter) for name, parameter in model.named_parameters() if _is_plain(parameter)
        }
        tables = [m._parameters.get("weight") for m in modules_of(model) if getattr(m, "max_norm", None) is not None]
        known = {id(table) for table in tables}
        own = sorted(named.values(), key=lambda item: (id(item[1]) not in known, _bytes(item[1])))
        sums = accumulate(0 if id(parameter) in known else _bytes(parameter) for _, parameter in own)
        small = sum(bytes_so_far <= _WRITTEN_BYTES for bytes_so_far in sums)
        with torch._C.DisableTorchFunction():
            self._copies = [(parameter, parameter.detach().clone()) for _, parameter in own[:small]]
        self._watched = [(name, parameter, _version(parameter)) for name, parameter in own[small:]]

    @torch.no_grad()
    def put_back(self) -> None:
        if self._copies:
            device = self._copies[0][1].device
            # One look at all of them, because each would stop a GPU.
            changed = torch.stack([(p != old).any().to(device) for p, old in self._copies]).tolist()
            for (parameter, old), differs in zip(self._copies, changed, strict=True):
                if differs:
                    parameter.copy_(old)
        written = [name for name, parameter, version in self._watched if _version(parameter) != version]
        self._watched = []
        if written:
            warnings.warn(
                f"the forward pass wrote to {', '.join(written)}, too large to be copied for each pass: not as found",
                GradsketchWarning,
                stacklevel=4,
            )


class RandomState(Keeper):
    """The state of the generators from which operations on these devices draw; by default the CPU's."""

    def __init__(self, *devices: torch.device) -> None:
        generators = [_generator(device) for device in devices or (torch.device("cpu"),)]
        self._states = [(generator, generator.get_state()) for generator in generators]

    def seed(self, seed: int) -> None:
        """Seed them all, until they are put back."""
        for generator, _ in self._states:
            generator.manual_seed(seed)

    def put_back(self) -> None:
        for generator, state in self._states:
            generator.set_state(state)


@contextmanager
def evaluating(model: nn.Module, *, of_gradients: bool = False) -> Iterator[None]:
    """Put the model into evaluation mode meanwhile; what forward passes write to buffers and parameters is undone.

    A block ``of_gradients`` leaves the parameters to each of its calls, so that it can see what else changed them.
    """
    with Modes(model), nullcontext() if of_gradients else Written(model), buffers_aside(model):
        model.eval()
        yield


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed the generators of these devices (the CPU's by default) meanwhile, and no other."""
    with RandomState(*devices) as state:
        state.seed(seed)
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run everything compiled as it was written: submodules, methods, and functions that a loss calls."""
    if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and importing it takes a second
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


# What copies of buffers may take, because models with quantised weights keep gigabytes in buffers. Copying and putting
# back takes one core 1 to 2 ms for 30 Llama layers (397 modules, 2 buffers), for 53 batch norms (159 buffers) and for
# twelve causal masks of 1 MiB. Comparing afterwards instead would stop a GPU once per buffer, and writing old values
# back would raise the version counter of buffers that a graph of the user's may have saved.
_ASIDE_BYTES = 1 << 26
# Of parameters less, because each call compares them too.
_WRITTEN_BYTES = 1 << 22


@contextmanager
def buffers_aside(model: nn.Module) -> Iterator[None]:
    """Let forward passes write to copies of the buffers; the model's own are back at the end, untouched.

    Nobody knows beforehand which buffers a forward pass writes to, so they are copied from the smallest up, 64 MiB in
    all. A larger one that was written to is named in a warning.
    """
    if not buffers_of(model):
        yield
        return
    own = sorted(model.named_buffers(), key=lambda item: _bytes(item[1]))
    sums = accumulate(_bytes(buffer) for _, buffer in own)
    small = sum(bytes_so_far <= _ASIDE_BYTES for bytes_so_far in sums)
    copied = {name: buffer.detach().clone() for name, buffer in own[:small]}
    watched = [(name, buffer, _version(buffer)) for name, buffer in own[small:]]
    with stand_ins(model, copied):
        notes = [_Notes.of(module) for module in modules_of(model) if module._buffers]
        try:
            yield
        finally:
            for note in notes:
                # A forward pass moves no module: a model cast to bfloat16 gets its frequencies back in float32.
                note.put_back_described(moved=True)
    written = [name for name, buffer, version in watched if _version(buffer) != version]
    if written:
        warnings.warn(
            f"the forward pass wrote to {', '.join(written)}, too large to be copied for each pass: not as found",
            GradsketchWarning,
            stacklevel=4,
        )


class _Notes(NamedTuple):
    """The buffers of one module, and its plain attributes, which may describe them."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _Notes:
        plain = {name: value for name, value in vars(module).items() if name != "training" and name[0] != "_"}
        return cls(module, dict(module._buffers), plain)

    def put_back_described(self, *, moved: bool = False) -> None:
        """Where a buffer was replaced, put back what describes it; ``moved`` counts what was merely moved or cast."""
        if self._replaced(moved=moved):
            vars(self.module).update(self.attributes)

    def put_back(self) -> None:
        """Put back replaced buffers, on the device and in the dtype of what replaced them, and what describes them."""
        self.put_back_described()
        for name, old in self._replaced().items():
            now = self.module._buffers.get(name)
            self.module._buffers[name] = old if now is None or old is None else old.to(now.device, now.dtype)

    def _replaced(self, *, moved: bool = False) -> dict[str, Tensor | None]:
        """Return buffers in whose place is now another, or none; one that was merely moved or cast counts if told."""
        now = self.module._buffers
        return {
            name: old
            for name, old in self.buffers.items()
            if now.get(name) is not old and (moved or not _is_moved(now.get(name), old))
        }


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are here and can be compared without asking other processes."""
    return type(tensor.detach()) is Tensor and not tensor.is_meta and not tensor.is_inference() and tensor.numel() > 0


def _is_moved(now: Tensor | None, old: Tensor | None) -> bool:
    if now is None or old is None:
        return False
    return now.shape == old.shape and (now.device, now.dtype) != (old.device, old.dtype)


def _equal(old: Tensor, now: Tensor) -> bool:
    return torch.equal(old.to(now.device), now)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
