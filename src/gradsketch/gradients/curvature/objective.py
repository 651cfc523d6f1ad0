"""The mean loss over a fixed set of batches, as a function of the selected parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from gradsketch.errors import InputError, NonFiniteError
from gradsketch.gradients.data import Batches, to_device
from gradsketch.gradients.parameters import Parameters
from gradsketch.gradients.tasks import Batch, Task, as_task

__all__ = ["LossFunction", "Objective"]

LossFunction = Callable[[nn.Module, Batch], Float[Tensor, " b"]]


class Objective:
    """L(theta) = (1/N) Σ_i loss_i(theta), the sum over every example of every batch, N their number.

    Batches of unequal length therefore weigh by their examples. Losses are evaluated with other tensors in the
    parameters' place, so the model's own, their ``requires_grad`` and their ``.grad`` are never touched; nor are its
    buffers while a module is in train mode.

    Raises:
        InputError: the data is empty or cannot be read twice; ``parameters`` are of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task | LossFunction,
        data: Any,
        parameters: Parameters | None = None,
        batch_size: int = 8,
    ) -> None:
        self.model, self.task = model, as_task(task)
        self.parameters = Parameters(model) if parameters is None else parameters
        self.data = Batches(self.task, data, batch_size)
        self._bound = _Bound(model, self.task)
        self._names = _names_in(self._bound, self.parameters)

    def __repr__(self) -> str:
        return f"{type(self.model).__name__}, {self.task!r}, n={self.parameters.n}"

    @property
    def values(self) -> list[Tensor]:
        """The selected parameters as they are now."""
        return [tensor.detach() for _, tensor in self.parameters]

    def batches(self) -> Iterator[Batch]:
        """Yield the batches on the model's device.

        Raises:
            InputError: there are none.
        """
        device, empty = next(self.model.parameters()).device, True
        for batch in self.data:
            empty = False
            yield to_device(batch, device)
        if empty:
            raise InputError(
                "data that yields no batch",
                "the same batches at every pass",
                "Check the path or the filter; what can be read only once must be wrapped in list(...)",
            )

    def losses(self, values: Sequence[Tensor], batch: Batch) -> Float[Tensor, " b"]:
        """Return the loss of each example of a batch with ``values`` in the selected parameters' place.

        Where a value is wider than its parameter, everything else the model computes with is widened with it.

        Raises:
            InputError: the task returns something else than one loss per example.
        """
        wider = next((v.dtype for v, (_, p) in zip(values, self.parameters, strict=True) if v.dtype != p.dtype), None)
        everything = {name: _widen(tensor.detach(), wider) for name, tensor in self._bound.named_parameters()}
        everything |= dict(zip(self._names, values, strict=True))
        if wider is not None or any(module.training for module in self.model.modules()):
            everything |= {name: _widen(tensor.clone(), wider) for name, tensor in self._bound.named_buffers()}
        losses = functional_call(self._bound, everything, (_widen(batch, wider),))
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.is_floating_point():
            shape = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"type {type(losses).__name__}"
            raise InputError(
                f"losses of {shape} from {self.task!r}",
                "one floating-point loss per example, shape [b]",
                "Average over every dim but the first; a loss function needs reduction='none'",
            )
        return losses

    def state(self) -> tuple[Any, ...]:
        """Return what shows whether the model still is as it was: memory, in-place changes, train or eval."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        modes = tuple(module.training for module in self.model.modules())
        return tuple((t.data_ptr(), t._version) for t in tensors), modes

    def check_reached(self, reached: bool) -> None:
        """Refuse a loss that no selected parameter has a part in.

        Raises:
            InputError: not reached.
        """
        if not reached:
            names = self.parameters.names
            raise InputError(
                f"a loss that depends on none of the {len(names)} selected parameters, {names[0]!r} first",
                "a loss computed from the model's parameters with gradients on",
                "Look for .detach(), .item() or torch.no_grad() between the model and the loss, or for a wrong glob",
            )

    def explain_non_finite(self) -> None:
        """Name the first example whose loss is not finite.

        Raises:
            NonFiniteError: there is one.
        """
        with torch.no_grad():
            for index, batch in enumerate(self.batches()):
                check_finite(self.losses(self.values, batch), index)


class _Bound(nn.Module):
    """A model with its task: what ``functional_call`` can swap parameters in and call."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> Float[Tensor, " b"]:
        return self.task.losses(self.model, batch)


def check_finite(losses: Float[Tensor, " b"], batch: int) -> None:
    """Refuse losses that are not finite.

    Raises:
        NonFiniteError: an example's loss is not; the message names it.
    """
    bad = (~torch.isfinite(losses.detach())).nonzero()
    if len(bad) > 0:
        example = int(bad[0])
        raise NonFiniteError(
            f"the loss of example {example} in batch {batch} is {float(losses[example])}",
            "finite losses",
            f"Look at that example, or leave it out; {len(bad)} of the {len(losses)} in its batch are not finite",
        )


def _names_in(bound: _Bound, parameters: Parameters) -> list[str]:
    """Return the bound model's name of each selected parameter, found by identity."""
    names: dict[int, str] = {id(tensor): name for name, tensor in bound.named_parameters()}
    missing = [name for name, tensor in parameters if id(tensor) not in names]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(parameters)} parameters do not belong to the model, {missing[0]!r} first",
            "Parameters of this model",
            "Type Parameters(model); loading or moving a model may replace its tensors, so make them afterwards",
        )
    return [names[id(tensor)] for _, tensor in parameters]


def _widen(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.itemsize < dtype.itemsize else value
    if isinstance(value, Mapping):
        return {key: _widen(v, dtype) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_widen(v, dtype) for v in value)
    return value
