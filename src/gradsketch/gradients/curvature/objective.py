"""The mean loss over a fixed set of batches, as a function of the selected parameters alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import Written, buffers_aside, uncompiled
from gradsketch.errors import InputError, NonFiniteError
from gradsketch.fsdp import at_rest, is_shard, require_unsplit, resting
from gradsketch.gradients.curvature.failures import reentrant
from gradsketch.gradients.curvature.graph import REENTRANT, operations
from gradsketch.gradients.curvature.sharing import in_step_over, sharing_of
from gradsketch.gradients.curvature.state import state_of
from gradsketch.gradients.data import Batches, each_tensor, to_device
from gradsketch.gradients.fingerprints import data_facts, model_facts, modes_digest, task_facts
from gradsketch.gradients.gathering import require_closed
from gradsketch.gradients.parameters import Selection, selected
from gradsketch.gradients.tasks import Batch, Task, TaskLike, as_task
from gradsketch.space import Space
from gradsketch.stand_ins import ALONE, Reading, check_held, held, read_instead, stand_ins

__all__ = ["LossesOf", "Objective", "check_finite"]

LossesOf = Callable[[Batch], Float[Tensor, " b"]]


class Spare(NamedTuple):
    """A batch that a rank goes over again to keep up with others."""

    batch: Batch


class Objective:
    """L(theta) = (1/N) Σ_i loss_i(theta), the sum over every example of every batch, N their number.

    Batches of unequal length therefore weigh by their examples. Losses are evaluated with other tensors in the
    parameters' place, so the model's own, their ``requires_grad``, ``.grad`` and hooks are never touched, frozen ones
    can be differentiated by, and layers that are checkpointed run again at the right values; nor are its buffers
    written to. Of a model that is open in a Subspace the parameters are taken as its modules read them.

    Raises:
        InputError: the data is empty or cannot be read twice; ``parameters`` are of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: TaskLike,
        data: Any,
        parameters: Selection = None,
        batch_size: int = 8,
    ) -> None:
        require_unsplit(model, "curvature")
        self.model, self.ranks = model, in_step_over(model)
        with self.ranks.together():
            require_closed(model, "curvature")
            self.task, self.parameters = as_task(task), selected(model, parameters)
            check_held(model, dict(self.parameters))
            self._sharing = sharing_of(model, self.parameters, self.ranks)
            self.space = Space(self.parameters.n) if self._sharing is None else self._sharing.space
            self.data = Batches(self.task, data, batch_size)
        self._only: list[Batch] | None = None
        self._looked = False
        names = {id(tensor): name for name, tensor in held(model).items()}
        self._names = [names[id(tensor)] for _, tensor in self.parameters]

    def __repr__(self) -> str:
        return f"{type(self.model).__name__}, {self.task!r}, n={self.parameters.n}"

    @property
    def values(self) -> list[Tensor]:
        """The selected parameters as the model reads them now; of those that ranks share out, this rank's shares."""
        if self._sharing is not None:
            return self._sharing.values
        with ALONE:
            own, instead = held(self.model), read_instead(self.model)
        return [instead[name].now() if name in instead else constant(own[name]) for name in self._names]

    def only(self, batch: Batch) -> Objective:
        """Return the sum over one batch alone."""
        part = copy.copy(self)
        part._only = [batch]
        return part

    @property
    def is_one_batch(self) -> bool:
        """Whether the sum is over one batch, on every rank."""
        return self.ranks.all(self._only is not None or len(self.data) == 1)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches on the model's device, as tensors that autograd can save.

        A rank that has fewer than others goes over its first one again, none of whose losses count.

        Raises:
            InputError: there are none.
        """
        device, mine, first = next(self.model.parameters()).device, iter(self.own_batches()), None
        while True:
            batch = next(mine, None)
            if not self.ranks.any(batch is not None):
                break
            first = batch if first is None else first
            if first is None:
                break
            ready = each_tensor(to_device(first if batch is None else batch, device), _saveable)
            yield Spare(ready) if batch is None else ready
        if first is None:
            raise InputError(
                "data that yields no batch",
                "the same batches at every pass",
                "Check the path or the filter; what can be read only once must be wrapped in list(...)",
            )

    def own_batches(self) -> Iterable[Batch]:
        """Return the batches of this rank, as the data gives them."""
        return self.data if self._only is None else self._only

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[LossesOf]:
        """Put ``values`` in the selected parameters' place until the block ends, and yield batch → losses [b].

        All other parameters are constants. Keep the block open until the backward pass is over: checkpointed layers
        are evaluated once more in it. Where a value is wider than its parameter, everything else the model computes
        with is widened with it.

        Raises:
            InputError: the task returns something else than one loss per example.
        """
        wider = self._wider(values)
        chosen = {} if self._sharing is not None else dict(zip(self._names, values, strict=True))
        # Compiled code has no double backward; what was compiled holds what it was made from.
        with (
            self.ranks.together(),
            ALONE,
            resting(self.model),
            Written(self.model),
            stand_ins(self.model, self._constants(wider) | chosen),
            buffers_aside(self.model),
            uncompiled(self.model),
            nullcontext() if self._sharing is None else self._sharing.at(values, wider),
        ):
            yield partial(self._losses, wider)

    def evaluated(self, model: nn.Module, batch: Batch) -> Any:
        """Return what the task makes of a model and a batch; of a batch gone over again, no loss."""
        if isinstance(batch, Spare):
            return self.task.losses(model, batch.batch)[:0]
        return self.task.losses(model, batch)

    def _losses(self, wider: torch.dtype | None, batch: Batch) -> Float[Tensor, " b"]:
        losses = _one_per_example(self.evaluated(self.model, _batch_in(batch, wider)), self.task)
        if not self._looked and losses.grad_fn is not None:
            self._looked = True
            # Where no leaf comes before such a layer, the rows of its parameters would be zero without a word.
            if REENTRANT in operations([losses.grad_fn]):
                raise reentrant(self.model)
            if self._sharing is not None:
                self._sharing.check_leaves(losses)
        return losses

    def widened(self, batch: Batch, values: Sequence[Tensor]) -> Batch:
        """Return the batch as the model needs it where ``values`` stand: widened if they are wider than its own."""
        return _batch_in(batch, self._wider(values))

    def _wider(self, values: Sequence[Tensor]) -> torch.dtype | None:
        present = zip(values, self.values, strict=True)
        return next((value.dtype for value, now in present if value.dtype != now.dtype), None)

    def facts(self) -> dict[str, Any]:
        """Return what decides the loss and its derivatives: all weights and buffers, modes, task, data, parameters."""
        return {
            "model": model_facts(self.model),
            "modes": modes_digest(self.model),
            "task": task_facts(self.task),
            "data": data_facts(self.data),
            "parameters": self.parameters.fingerprint(),
        }

    def _constants(self, wider: torch.dtype | None) -> dict[str, Tensor]:
        """Return what stands for the parameters that are not selected, and for buffers to be widened."""
        own, outside = held(self.model), self._read_from_outside()
        # A stand-in over what an open Subspace answers for would cut it off: the loss would not depend on w.
        inside = read_instead(self.model).keys() - outside.keys()
        chosen = {id(own[name]) for name in [*self._names, *inside]}
        constants = {}
        for name, tensor in own.items():
            # What needs no change stays: tensors of a kind of their own, such as quantised weights, lose it by detach.
            if is_shard(tensor) or id(tensor) in chosen:
                continue
            if name in outside or _must_change(tensor, wider):
                now = outside[name].now() if name in outside else constant(tensor)
                constants[name] = _widened(now, wider)
        return constants

    def _read_from_outside(self) -> dict[str, Reading]:
        """Return readings answered from outside the model: constants, as the model's own parameters do not make them.

        Those of a Subspace that is itself the model are functions of its w.
        """
        inside = set(self.model.modules())
        return {n: reading for n, reading in read_instead(self.model).items() if reading.source.owner not in inside}

    def state(self) -> tuple[Any, ...]:
        """Return what shows whether the model and the task still are as they were."""
        at_rest(self.model)
        return state_of(self.model, self.task, [reading.now() for reading in self._read_from_outside().values()])

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


def constant(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph, as a copy where it was made in inference mode: autograd saves no other."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _saveable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _must_change(tensor: Tensor, wider: torch.dtype | None) -> bool:
    return tensor.requires_grad or tensor.is_inference() or _is_narrow(tensor, wider)


def _batch_in(batch: Batch, dtype: torch.dtype | None) -> Batch:
    return batch if dtype is None else each_tensor(batch, lambda tensor: _widened(tensor, dtype))


def _is_narrow(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.is_floating_point() and tensor.itemsize < dtype.itemsize


def _widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if _is_narrow(tensor, dtype) else tensor
