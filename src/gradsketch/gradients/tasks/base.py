"""What a model is asked to do: from raw examples to batches, and from a batch to per-example losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import default_collate

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.encoded import Encoded, encode_one
from gradsketch.gradients.tasks.logits import class_predictions
from gradsketch.gradients.tasks.pieces import Piece

__all__ = ["Batch", "Function", "LossFunction", "Task", "TaskLike", "as_task"]

# A dict of tensors (the usual case), a tuple of tensors, or whatever the task's own ``losses`` takes. In every tensor
# the first dim counts examples.
Batch = Any

# (model, batch) → losses [b], in which no example depends on another.
LossFunction = Callable[[nn.Module, Batch], Float[Tensor, " b"]]


class Task(ABC):
    """Maps (model, batch) to per-example losses, and examples to batches.

    A task of your own needs ``losses`` only. Where examples are costly to read, write ``encode`` as well: every pass
    then reads each example once and hands the ``Encoded`` row to ``collate`` and ``length``.
    """

    _encodes: ClassVar[bool] = False
    # Fields of a batch that stay whole where a row loses its padding; None where a loss may count padding.
    not_padded: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A class that writes ``collate`` or ``length`` and inherits ``encode`` expects raw examples in them.
        if {"encode", "collate", "length"} & vars(cls).keys():
            cls._encodes = "encode" in vars(cls)
        # A class that writes another loss inherits no split of the old one.
        if "losses" in vars(cls) and "token_losses" not in vars(cls):
            cls.token_losses = Task.token_losses  # type: ignore[method-assign]
        # Nor what its labels are drawn from.
        if "losses" in vars(cls) and "sampled" not in vars(cls):
            cls.sampled = Task.sampled  # type: ignore[method-assign]
        # Nor the promise that padding never counts.
        if "losses" in vars(cls) and "not_padded" not in vars(cls):
            cls.not_padded = None

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        """Return one loss per example, in float32 or wider; an example's loss depends on no other example."""

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "*r c"], Int[Tensor, " *r"]]:
        """Return logits and, in the places where they are predicted, the labels; one of −100 does not count.

        By default those of a classifier, of one label a row or one a token.

        Raises:
            InputError: a batch without labels, or labels that the model has no logits for.
        """
        return class_predictions(model, batch)

    def token_losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b t"] | None:
        """Return what predicting each token of ``input_ids`` adds to its example's loss (0: it does not count).

        None, the default, where a loss is no sum over predicted tokens.
        """
        return None

    def sampled(self, model: nn.Module, batch: Batch, draw: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with labels that the model itself says: ``draw`` takes logits [..., c] to classes [...].

        Raises:
            InputError: the task cannot, which is the default.
        """
        raise InputError(
            f"labels drawn from the model for {self!r}",
            "a task whose loss is the log-probability of labels, such as CausalLM or Classification",
            'Take the labels of the data (labels="empirical", precondition="empirical-kfac", exact="empirical-ekfac"),'
            " or write sampled(model, batch, draw) for your task",
        )

    def pieces(self, example: Any) -> list[Piece] | None:
        """Return the text of each token of an example, in the order of its batch: those of ``input_ids``, then targets.

        None, the default, where that is not known.
        """
        return None

    def encode(self, example: Any) -> Encoded:
        """Read one example into a row that ``collate`` can stack; by default only its cost of one is known."""
        return Encoded(length=1)

    def read(self, example: Any) -> Any:
        """Return the example as ``collate`` and ``length`` of this class take it: encoded once, or as it is."""
        if not self._encodes or isinstance(example, Encoded):
            return example
        return encode_one(self.encode, example)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Make one batch of examples, encoded or not; by default as a DataLoader does of tensors, tuples and dicts."""
        return default_collate(list(examples))

    @property
    def stacks(self) -> bool:
        """Whether a batch is its examples' tensors stacked as they come, without padding or any other code."""
        return type(self).collate is Task.collate

    def length(self, example: Any) -> int:
        """Return the cost of an example in tokens (1 where all cost the same), for batching by length."""
        return (example if isinstance(example, Encoded) else self.encode(example)).length

    def check(self, model: nn.Module, row: Encoded) -> None:  # noqa: B027 (most tasks can use any row)
        """Refuse an encoded row that the model cannot use; a build asks for every row before it starts.

        Raises:
            InputError: it cannot.
        """

    def options(self) -> dict[str, str | int | float | bool]:
        """Return what decides the losses, for fingerprints."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"


class Function(Task):
    """Any function (model, batch) → losses [b] as a task.

    Args:
        function: the losses of a batch.
        collate: a list of examples → a batch, for examples that are not tensors, arrays and numbers, such as images
            and audio.

    Example:
        >>> squares = gs.Function(lambda model, batch: (model(batch[0]) - batch[1]).square().sum(-1))
        >>> squares.losses(torch.nn.Linear(3, 1), (torch.zeros(2, 3), torch.zeros(2, 1))).shape
        torch.Size([2])

    Raises:
        InputError: the function returns anything but one floating-point loss an example, or examples cannot be stacked.
    """

    def __init__(self, function: LossFunction, collate: Callable[[list[Any]], Batch] | None = None) -> None:
        self.function, self.collates = function, collate

    def collate(self, examples: Sequence[Any]) -> Batch:
        if self.collates is not None:
            return self.collates(list(examples))
        try:
            return super().collate(examples)
        except TypeError as error:
            raise InputError(
                f"examples that cannot be stacked ({str(error).rpartition('; ')[2]})",
                "tensors, arrays and numbers, or a function that makes a batch of examples",
                "Pass it: gs.Function(loss, collate=...)",
            ) from error

    @property
    def stacks(self) -> bool:
        return type(self).collate is Function.collate and self.collates is None

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        losses = self.function(model, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.is_floating_point():
            came = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                f"the loss function returned {came}",
                "one floating-point loss an example, a tensor of shape [b]",
                'Do not average over the batch: cross_entropy(..., reduction="none")',
            )
        return losses

    def options(self) -> dict[str, str | int | float | bool]:
        return {"function": getattr(self.function, "__qualname__", type(self.function).__name__)}


# What every ``task`` argument takes.
TaskLike = Task | LossFunction


def as_task(task: TaskLike) -> Task:
    """Return the task itself, or the function as a task."""
    return task if isinstance(task, Task) else Function(task)
