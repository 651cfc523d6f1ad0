"""The mean loss over a fixed set of batches, as a function of the selected parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.errors import InputError, NonFiniteError
from gradsketch.gradients.data import Batches, each_tensor, to_device
from gradsketch.gradients.fingerprints import data_facts, model_facts, modes_digest, task_facts
from gradsketch.gradients.parameters import Parameters
from gradsketch.gradients.tasks import Batch, Task, as_task

__all__ = ["LossFunction", "LossesOf", "Objective", "check_finite"]

LossFunction = Callable[[nn.Module, Batch], Float[Tensor, " b"]]
LossesOf = Callable[[Batch], Float[Tensor, " b"]]


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
        _check_owned(model, self.parameters)

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

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[LossesOf]:
        """Put ``values`` in the selected parameters' place until the block ends, and yield batch → losses [b].

        All other parameters are constants. Keep the block open until the backward pass is over: checkpointed layers
        are evaluated once more in it. Where a value is wider than its parameter, everything else the model computes
        with is widened with it.

        Raises:
            InputError: the task returns something else than one loss per example.
        """
        wider = next((v.dtype for v, (_, p) in zip(values, self.parameters, strict=True) if v.dtype != p.dtype), None)
        chosen = {id(p): v for (_, p), v in zip(self.parameters, values, strict=True)}
        guarded = wider is not None or any(module.training for module in self.model.modules())

        def parameter(tensor: Tensor) -> Tensor:
            return chosen[id(tensor)] if id(tensor) in chosen else _widened(tensor.detach(), wider)

        def buffer(tensor: Tensor) -> Tensor:
            return _widened(tensor.clone(), wider) if guarded else tensor

        def losses(batch: Batch) -> Float[Tensor, " b"]:
            batch = each_tensor(batch, lambda tensor: _widened(tensor, wider))
            return _one_per_example(self.task.losses(self.model, batch), self.task)

        with _swapped(self.model, parameter, buffer):
            yield losses

    def facts(self) -> dict[str, Any]:
        """Return what decides the loss and its derivatives: all weights and buffers, modes, task, data, parameters."""
        return {
            "model": model_facts(self.model),
            "modes": modes_digest(self.model),
            "task": task_facts(self.task),
            "data": data_facts(self.data),
            "parameters": self.parameters.fingerprint(),
        }

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
        with torch.no_grad(), self.at(self.values) as losses:
            for index, batch in enumerate(self.batches()):
                check_finite(losses(batch), index)


@contextmanager
def _swapped(
    model: nn.Module, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let other tensors take the place of a model's own until the block ends, ties included."""
    changes: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = []
    changes += [(module._parameters, parameter) for module in model.modules()]
    changes += [(module._buffers, buffer) for module in model.modules()]
    own = [(tensors, dict(tensors)) for tensors, _ in changes]
    new: dict[int, Tensor] = {}
    try:
        for tensors, change in changes:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = new[id(tensor)] if id(tensor) in new else new.setdefault(id(tensor), change(tensor))
        yield
    finally:
        for tensors, originals in own:
            tensors.clear()
            tensors.update(originals)


def _one_per_example(losses: Any, task: Task) -> Float[Tensor, " b"]:
    if isinstance(losses, Tensor) and losses.ndim == 1 and losses.is_floating_point():
        return losses
    came = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"type {type(losses).__name__}"
    raise InputError(
        f"losses of {came} from {task!r}",
        "one floating-point loss per example, shape [b]",
        "Average over every dim but the first; a loss function needs reduction='none'",
    )


def check_finite(losses: Float[Tensor, " b"], batch: int) -> None:
    """Refuse losses that are not finite.

    Raises:
        NonFiniteError: an example's loss is not; the message names it.
    """
    losses = losses.detach()
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad) > 0:
        example = int(bad[0])
        raise NonFiniteError(
            f"the loss of example {example} in batch {batch} is {float(losses[example])}",
            "finite losses",
            f"Look at that example, or leave it out; {len(bad)} of the {len(losses)} in its batch are not finite",
        )


def _check_owned(model: nn.Module, parameters: Parameters) -> None:
    own = {id(tensor) for tensor in model.parameters()}
    missing = [name for name, tensor in parameters if id(tensor) not in own]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(parameters)} parameters do not belong to the model, {missing[0]!r} first",
            "Parameters of this model",
            "Type Parameters(model); loading or moving a model may replace its tensors, so make them afterwards",
        )


def _widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    narrow = dtype is not None and tensor.is_floating_point() and tensor.itemsize < dtype.itemsize
    return tensor.to(dtype) if narrow else tensor
