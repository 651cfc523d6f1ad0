"""The Gauss–Newton matrix and the empirical Fisher: Jᵀ A J with another J and A each, as maps.

One map serves both: J of the model's output and A the loss's Hessian in it, or J of the losses and A = I. No
per-example gradient is formed. A comes from the task's own loss, evaluated on stored outputs a few examples at a time:
that takes little beside the model, so a closed form was not worth a second definition of the loss.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.curvature.base import Curvature, Mode, Recorded
from gradsketch.gradients.curvature.graph import operations
from gradsketch.gradients.curvature.leaves import Leaves, derivatives
from gradsketch.gradients.curvature.objective import LossesOf, Objective
from gradsketch.gradients.data import batch_slice, is_out_of_memory
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import Batch, TaskLike
from gradsketch.linear_map import LinearMap

__all__ = ["fisher", "gauss_newton"]

# Entries of the outputs whose loss is differentiated twice at once: several copies of them are alive then.
_HEAD_ENTRIES = 1 << 24


def gauss_newton(
    model: nn.Module,
    task: TaskLike,
    data: Any,
    parameters: Selection = None,
    *,
    mode: Mode = "auto",
    batch_size: int = 8,
    check: bool = True,
) -> LinearMap:
    """Return the generalised Gauss–Newton matrix of the mean loss, as a self-adjoint map on vectors ``[..., n]``.

    G = (1/N) Σ_i J_iᵀ A_i J_i over all N examples: J_i is the Jacobian of what the model returns for example i, A_i
    the Hessian of the example's loss with respect to that (Schraudolph, "Fast curvature matrix-vector products for
    second-order gradient descent", 2002). Positive semi-definite where the loss is convex in the outputs; for
    cross-entropy it is the expected Fisher information. Whatever the task computes from the model's output belongs
    to the loss. A_i comes from the task's own loss, a few examples at a time, so vocabularies may be large. It is zero,
    and a warning says so, where the model returns the finished loss: compute that from the logits.

    Arguments, modes, batches and errors are those of ``hessian``; the mode says how outputs are differentiated along
    a vector.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> squares = lambda model, batch: model(batch[0]).flatten(1).square().sum(1)
        >>> G = gs.gauss_newton(model, squares, (torch.eye(2),))
        >>> G(torch.tensor([1.0, 3.0]))
        tensor([1., 3.])

    Raises:
        InputError: as ``hessian``; also where the task does not call the model exactly once a batch, or its loss
            uses parameters by another way than the model's output.
        NonFiniteError: a loss or a product is not finite; the message names the batch.
    """
    objective = Objective(model, task, data, parameters, batch_size)
    return OuterProducts("GaussNewton", objective, mode, _ModelOutputs, check=check)


def fisher(
    model: nn.Module,
    task: TaskLike,
    data: Any,
    parameters: Selection = None,
    *,
    mode: Mode = "auto",
    batch_size: int = 8,
    check: bool = True,
) -> LinearMap:
    """Return the empirical Fisher matrix, as a self-adjoint map on vectors ``[..., n]``.

    F = (1/N) Σ_i g_i g_iᵀ, g_i the gradient of example i's loss with the data's own label: the uncentred second moment
    of the per-example gradients (for a language model, of whole sequences). It is not the expected Fisher information,
    whose labels are the model's; for cross-entropy that is ``gauss_newton``. No per-example gradient is formed: J and
    A of ``gauss_newton`` become the Jacobian of the losses themselves and the identity.

    Arguments, modes, batches and errors are those of ``hessian``.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> F = gs.fisher(model, task, data)
        >>> v = torch.randn(F.n)
        >>> bool(v @ F(v) >= 0)
        True

    Raises:
        InputError: as ``hessian``.
        NonFiniteError: a loss or a product is not finite; the message names the batch.
    """
    objective = Objective(model, task, data, parameters, batch_size)
    return OuterProducts("Fisher", objective, mode, _Losses, check=check)


class _Outputs(ABC):
    """What a batch's Jacobian is taken of: tensors that depend on the leaves, and the matrix between J and Jᵀ."""

    values: list[Tensor]
    examples: int
    loss_operations: frozenset[str] = frozenset()
    is_linear: bool = False  # A is zero, which a product with it shows

    @abstractmethod
    def __init__(self, objective: Objective, losses_of: LossesOf, batch: Batch) -> None:
        """Evaluate a batch."""

    @abstractmethod
    def again(self, losses_of: LossesOf) -> list[Tensor]:
        """Evaluate the same batch once more, at other parameters."""

    @abstractmethod
    def curve(self, directions: list[Tensor]) -> list[Tensor]:
        """Multiply directions in output space by A."""

    @abstractmethod
    def curve_by_differences(self, directions: list[Tensor], step: float) -> list[Tensor]:
        """Multiply directions in output space by A with first derivatives of the loss alone."""


class _Losses(_Outputs):
    """The losses themselves, and the identity."""

    def __init__(self, objective: Objective, losses_of: LossesOf, batch: Batch) -> None:
        self._batch = batch
        self.values = self.again(losses_of)
        self.examples = len(self.values[0])

    def again(self, losses_of: LossesOf) -> list[Tensor]:
        return [losses_of(self._batch)]

    def curve(self, directions: list[Tensor]) -> list[Tensor]:
        return directions

    def curve_by_differences(self, directions: list[Tensor], step: float) -> list[Tensor]:
        return directions


class _ModelOutputs(_Outputs):
    """Every floating-point tensor the model returns that the loss depends on, and the loss's Hessian in them."""

    _separable: bool | None

    def __init__(self, objective: Objective, losses_of: LossesOf, batch: Batch) -> None:
        self._objective, self._batch = objective, batch
        with _cut_behind(objective.model) as calls:
            losses = losses_of(batch)
        self.examples = len(losses)
        if len(calls) != 1 or losses.requires_grad:
            raise InputError(
                f"{objective.task!r} uses parameters of the model besides its output"
                if len(calls) == 1
                else f"{objective.task!r} called the model {len(calls)} times for one batch",
                "a loss computed from one call of the model",
                "Use hessian(...) or fisher(...), which take any loss",
            )
        tensors, self._structure = pytree.tree_flatten(calls[0])
        self._constant = [t.detach() if isinstance(t, Tensor) else t for t in tensors]
        self._losses, self._separable = _primal(losses).detach(), None
        self._places = [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.requires_grad]
        self._places = self._used()
        self.values = [tensors[i] for i in self._places]

    def again(self, losses_of: LossesOf) -> list[Tensor]:
        with _cut_behind(self._objective.model) as calls:
            losses_of(self._batch)
        tensors = pytree.tree_leaves(calls[0])
        return [tensors[i] for i in self._places]

    def curve(self, directions: list[Tensor]) -> list[Tensor]:
        return self._by_rows(self._curve_rows, directions)

    def curve_by_differences(self, directions: list[Tensor], step: float) -> list[Tensor]:
        length = math.sqrt(sum(float(d.double().square().sum()) for d in directions))
        if length == 0:
            return directions

        def differences(rows: slice, batch: Batch, directions: list[Tensor]) -> list[Tensor]:
            ahead, behind = (self._slopes(rows, batch, directions, h * step / length) for h in (1, -1))
            self.is_linear |= all(map(torch.equal, ahead, behind))
            return [(a - b) * (length / (2 * step)) for a, b in zip(ahead, behind, strict=True)]

        return self._by_rows(differences, directions)

    def _by_rows(
        self, work: Callable[[slice, Batch, list[Tensor]], list[Tensor]], directions: list[Tensor]
    ) -> list[Tensor]:
        """Do work on directions, a few examples at a time where outputs are large."""
        parts = self._parts(self._rows_at_once(directions))
        if len(parts) == 1 or not self._are_alike(parts):
            return work(slice(None), self._batch, directions)
        done = [work(rows, self._cut(rows), [d[rows] for d in directions]) for rows in parts]
        return [torch.cat(column) for column in zip(*done, strict=True)]

    def _parts(self, rows: int) -> list[slice]:
        return [slice(start, min(start + rows, self.examples)) for start in range(0, self.examples, rows)]

    def _cut(self, rows: slice) -> Batch:
        return batch_slice(self._batch, rows.start, rows.stop)

    def _are_alike(self, parts: Sequence[slice]) -> bool:
        """Whether examples have the losses in these parts that they have together; asked once a batch.

        Not so where a loss divides by the tokens of its batch, compares examples, or takes a table for one of them.
        """
        if self._separable is None:
            try:
                with torch.no_grad():
                    losses = torch.cat([self._losses_of(rows, self._cut(rows))[1] for rows in parts])
            except Exception as error:  # of the user's own loss, which never saw such a part of an output
                if is_out_of_memory(error):
                    raise
                self._separable = False
            else:
                self._separable = self._are_as_found(losses)
        return self._separable

    def _are_as_found(self, losses: Tensor) -> bool:
        """Whether losses are those of the model's own call, but for rounding."""
        near = torch.finfo(losses.dtype).eps ** 0.5
        same = losses.shape == self._losses.shape and losses.dtype == self._losses.dtype
        return same and torch.allclose(losses, self._losses, rtol=near, atol=near, equal_nan=True)

    def _slopes(self, rows: slice, batch: Batch, directions: list[Tensor], scale: float) -> list[Tensor]:
        heads, losses = self._losses_of(rows, batch, [d * scale for d in directions])
        grads = derivatives(losses.sum(), heads, allow_unused=True, materialize_grads=True)
        return [grad.detach() for grad in grads]

    def _used(self) -> list[int]:
        heads, losses = self._losses_of(slice(None), self._batch)
        if not self._are_as_found(losses):
            raise InputError(
                f"{self._objective.task!r}, whose losses are others where the model answers with the same output again",
                "a loss computed from the model's output, the batch and constants",
                "Leave out what tells the model from a stand-in of its class, or use hessian(...) or fisher(...)",
            )
        if not losses.requires_grad:  # no output does, or the loss uses none of them
            return []
        self.loss_operations = frozenset(operations([losses.grad_fn]))
        grads = derivatives(losses.sum(), heads, allow_unused=True)
        return [place for place, grad in zip(self._places, grads, strict=True) if grad is not None]

    def _rows_at_once(self, directions: list[Tensor]) -> int:
        """Return how many examples to take at once: all where outputs are small or not one row an example."""
        entries = sum(d.numel() for d in directions)
        by_row = all(d.ndim > 0 and d.shape[0] == self.examples for d in directions)
        return max(1, self.examples * _HEAD_ENTRIES // entries) if by_row and entries > 0 else max(1, self.examples)

    def _curve_rows(self, rows: slice, batch: Batch, directions: list[Tensor]) -> list[Tensor]:
        heads, losses = self._losses_of(rows, batch)
        grads = derivatives(losses.sum(), heads, create_graph=True)
        curved = [i for i, grad in enumerate(grads) if grad.requires_grad]
        if not curved:
            self.is_linear = True
            return [torch.zeros_like(direction) for direction in directions]
        roots, vectors = [grads[i] for i in curved], [directions[i] for i in curved]
        return list(derivatives(roots, heads, vectors, materialize_grads=True))

    def _losses_of(
        self, rows: slice, batch: Batch, shifts: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return fresh leaves for the outputs of some examples, moved by ``shifts``, and those examples' losses."""
        tree = [t[rows] if isinstance(t, Tensor) and t.ndim > 0 else t for t in self._constant]
        for index, place in enumerate(self._places):
            moved = tree[place].detach() if shifts is None else tree[place].detach() + shifts[index]
            tree[place] = moved.requires_grad_()
        answer = _answering(self._objective.model, pytree.tree_unflatten(tree, self._structure))
        return [tree[place] for place in self._places], self._objective.evaluated(answer, batch)


def _answering(model: nn.Module, output: Any) -> nn.Module:
    """Return what answers every call with an output computed before, and is the model in everything else."""
    own: Any = type(model)
    answer: nn.Module = object.__new__(_answering_class(own))
    vars(answer).update({name: value for name, value in vars(model).items() if name != "forward"}, **{_OUTPUT: output})
    return answer


_OUTPUT = "_gradsketch_output"


@cache
def _answering_class(cls: type[nn.Module]) -> type[nn.Module]:
    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_OUTPUT]

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {"forward": answer, "__call__": answer} | names)


@contextmanager
def _cut_behind(model: nn.Module) -> Iterator[list[Any]]:
    """Collect what the model returns, and hand it on without its graph."""
    calls: list[Any] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(output)
        return pytree.tree_map_only(Tensor, lambda tensor: _primal(tensor).detach(), output)

    with model.register_forward_hook(cut):
        yield calls


def _primal(tensor: Tensor) -> Tensor:
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal


class OuterProducts(Curvature):
    """(1/N) Σ Jᵀ A J; built by ``gauss_newton`` and ``fisher``."""

    def __init__(self, name: str, objective: Objective, mode: Mode, outputs: type[_Outputs], *, check: bool) -> None:
        self.name, self._outputs = name, outputs
        self._told: set[str] = set()  # shared with copies over one batch
        super().__init__(objective, mode, check=check)

    def __repr__(self) -> str:
        return f"{self.name}({self.objective!r})"

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "curvature": self.name}

    def _record(self, leaves: Leaves, losses_of: LossesOf, batch: Batch) -> Recorded:
        outputs = self._outputs(self.objective, losses_of, batch)
        if not _reached(outputs):
            return Recorded(leaves, [], outputs.examples, False)
        # Jᵀw is linear in w, so its derivative with respect to w along v is J v.
        duals = [torch.zeros_like(value).requires_grad_() for value in outputs.values]
        grads = derivatives(outputs.values, leaves.tensors, duals, create_graph=True, allow_unused=True)
        edges = [(i, get_gradient_edge(g)) for i, g in enumerate(grads) if g is not None]
        roots = tuple(value.grad_fn for value in outputs.values)
        return Recorded(leaves, edges, outputs.examples, True, (outputs, duals), roots, outputs.loss_operations)

    def _replay(self, recorded: Recorded, vector: list[Tensor], *, retain: bool) -> None:
        if recorded.reached:
            outputs, duals = recorded.outputs
            edges, pieces = [edge for _, edge in recorded.edges], [vector[i] for i, _ in recorded.edges]
            directions = derivatives(edges, duals, pieces, retain_graph=retain, materialize_grads=True)
            recorded.leaves.backward(
                outputs.values, self._heard(outputs, outputs.curve(list(directions))), retain=retain
            )

    def _push(self, leaves: Leaves, tangents: list[Tensor], batch: Batch) -> tuple[int, bool]:
        with self.objective.at(leaves.tensors) as losses_of:
            outputs = self._outputs(self.objective, losses_of, batch)
        # Tangents need no graph: these duals are made of constants.
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.detach(), v) for t, v in zip(leaves.tensors, tangents, strict=True)]
            with self.objective.at(duals) as losses_of:
                unpacked = [forward_ad.unpack_dual(value) for value in outputs.again(losses_of)]
            directions = [torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked]
        if _reached(outputs):
            directions = [d.to(value.dtype) for d, value in zip(directions, outputs.values, strict=True)]
            self._pull(leaves, outputs, self._heard(outputs, outputs.curve(directions)))
        return outputs.examples, _reached(outputs)

    def _add_difference(
        self, vector: Tensor, step: float, dtype: torch.dtype | None, out: Tensor, weight: float
    ) -> tuple[int, bool]:
        ahead, behind = self._shifted(vector, step, dtype), self._shifted(vector, -step, dtype)
        leaves, examples, reached = self._shifted(vector, 0.0, dtype), 0, False
        for batch in self.objective.batches():
            wide = self.objective.widened(batch, leaves.tensors)
            with self.objective.at(leaves.tensors) as losses_of:
                outputs = self._outputs(self.objective, losses_of, wide)
            values = zip(self._values_at(ahead, outputs), self._values_at(behind, outputs), strict=True)
            directions = [(high - low) / (2 * step) for high, low in values]
            if _reached(outputs):
                with leaves.adding_to(out, weight):
                    curved = outputs.curve_by_differences(directions, step)
                    self._pull(leaves, outputs, self._heard(outputs, curved))
            examples, reached = examples + outputs.examples, reached or _reached(outputs)
        return examples, reached

    def _heard(self, outputs: _Outputs, curved: list[Tensor]) -> list[Tensor]:
        """Say once that products are zero where a model returns its own loss: one number an example, or a batch."""
        one_number = sum(value.numel() for value in outputs.values) <= outputs.examples
        if outputs.is_linear and one_number and not self._told:
            self._told.add("linear")
            warnings.warn(
                f"{self!r}: the loss is linear in what the model returns, so that its products are zero. Where the"
                " model makes the loss itself, as with labels=..., write it as a function of the logits",
                GradsketchWarning,
                stacklevel=8,
            )
        return curved

    def _values_at(self, leaves: Leaves, outputs: _Outputs) -> list[Tensor]:
        with torch.no_grad(), self.objective.at(leaves.tensors) as losses_of:
            return outputs.again(losses_of)

    def _pull(self, leaves: Leaves, outputs: _Outputs, curved: list[Tensor]) -> None:
        """Add Jᵀ times vectors in output space to the leaves' target."""
        with self.objective.at(leaves.tensors):  # checkpointed layers run again
            leaves.backward(outputs.values, [c.to(v.dtype) for c, v in zip(curved, outputs.values, strict=True)])


def _reached(outputs: _Outputs) -> bool:
    return any(value.requires_grad for value in outputs.values)
