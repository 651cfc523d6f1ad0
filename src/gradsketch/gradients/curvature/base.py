"""What the Hessian, the Gauss–Newton matrix and the Fisher share: batches, three ways to differentiate, fall-backs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.curvature.leaves import Leaves, split_as
from gradsketch.gradients.curvature.objective import LossesOf, Objective
from gradsketch.gradients.curvature.probe import check_deterministic
from gradsketch.gradients.tasks import Batch
from gradsketch.linear_map import LinearMap, widened
from gradsketch.random import Stream

__all__ = ["Curvature", "Mode", "differentiable_attention"]

Mode = Literal["auto", "grad-of-grad", "jvp-of-grad", "central-difference"]


@dataclass(frozen=True)
class Recorded:
    """First derivatives of one batch as a graph that can be differentiated again.

    ``edges`` are the roots of that graph, each with the place of its leaf; ``outputs`` whatever else a product needs.
    """

    leaves: Leaves
    edges: list[tuple[int, GradientEdge]]
    examples: int
    reached: bool
    outputs: Any = None


class Curvature(LinearMap):
    """A self-adjoint map R^n → R^n: a sum over every example of every batch, divided by their number.

    A concrete curvature says how one batch's product is added to the leaves' target in each of three modes. A graph
    of first derivatives serves any number of vectors; the one of a single batch is kept until the model changes.
    """

    is_self_adjoint = True

    def __init__(self, objective: Objective, mode: Mode, *, check: bool) -> None:
        if mode not in get_args(Mode):
            raise InputError(f"mode={mode!r}", f"one of {', '.join(get_args(Mode))}", "Leave it out for 'auto'")
        self.objective, self.mode, self._asked = objective, mode, mode
        self.shape = (objective.parameters.n, objective.parameters.n)
        first = objective.values[0]
        self.device, self.dtype = first.device, _at_least_float32(first.new_empty(0)).dtype
        self._kept: tuple[Any, Recorded] | None = None
        self._trusted = False
        if check:
            self._check()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.objective!r})"

    def facts(self) -> dict[str, Any]:
        return {"curvature": type(self).__name__, "mode": self._asked, **self.objective.facts()}

    @abstractmethod
    def _record(self, leaves: Leaves, losses: LossesOf, batch: Batch) -> Recorded:
        """Evaluate a batch and record its first derivatives."""

    @abstractmethod
    def _replay(self, recorded: Recorded, vector: list[Tensor], *, retain: bool) -> None:
        """Add the product with a vector to the leaves' target."""

    @abstractmethod
    def _push(self, leaves: Leaves, tangents: list[Tensor], batch: Batch) -> tuple[int, bool]:
        """Add a batch's product by forward-mode tangents; return examples and whether any leaf was reached."""

    @abstractmethod
    def _difference(self, vector: list[Tensor], step: float, target: Float[Tensor, " n"]) -> tuple[int, bool]:
        """Add all batches' products by central differences; return examples and whether any leaf was reached."""

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone() if x.is_inference() else x.detach()
            out = torch.zeros_like(x, dtype=widened(x.dtype))
            examples, reached = self._multiply(x, out)
            self.objective.check_reached(reached)
            out.div_(examples)
            if not torch.isfinite(out).all():
                self.objective.explain_non_finite()
        return out

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return self._apply(w)

    def _check(self) -> None:
        if self.mode == "central-difference":
            check_deterministic(self.objective)
            return
        with differentiable_attention():
            attention = check_deterministic(self.objective)
        if attention:
            warnings.warn(
                "attention takes its math path during curvature products, since its fast kernels cannot be"
                " differentiated twice; mode='central-difference' keeps them.",
                GradsketchWarning,
                stacklevel=4,
            )

    def _multiply(self, x: Tensor, out: Tensor) -> tuple[int, bool]:
        if self.mode in ("auto", "grad-of-grad"):
            try:
                with differentiable_attention():
                    return self._multiply_by_graphs(x, out)
            except RuntimeError as error:
                self._kept = None
                self._give_up_double_backward(error)
                out.zero_()
        if self.mode == "jvp-of-grad":
            with differentiable_attention():
                return self._multiply_by_tangents(x, out)
        return self._multiply_by_differences(x, out)

    def _multiply_by_graphs(self, x: Tensor, out: Tensor) -> tuple[int, bool]:
        state = self.objective.state()
        if self._kept is not None and self._kept[0] != state:
            self._kept = None  # frees the old graph before a new one is made
        leaves = Leaves(self.objective.values) if self._kept is None else self._kept[1].leaves
        keep = len(self.objective.data) == 1
        with self.objective.at(leaves.tensors) as losses:
            if self._kept is not None:
                return self._replay_all(self._kept[1], x, out, keep=True)
            examples, reached = 0, False
            for batch in self.objective.batches():
                recorded = self._record(leaves, losses, batch)
                self._trust(recorded)
                self._kept = (state, recorded) if keep else None
                count, any_reached = self._replay_all(recorded, x, out, keep=keep)
                examples, reached = examples + count, reached or any_reached
                del recorded
        return examples, reached

    def _trust(self, recorded: Recorded) -> None:
        """Where a batch's graph holds hand-written operations, see once that they can be differentiated twice.

        PyTorch takes what an undifferentiable backward pass returns for a constant, without a word; the product is
        then no longer symmetric.

        Raises:
            RuntimeError: it is not.
        """
        if self._trusted or not recorded.reached:
            return
        custom = _custom_operation(recorded.edges)
        if custom is not None:
            n, values = self.shape[0], self.objective.values
            u, v = (Stream(0, "curvature", name).normals(0, n, device=values[0].device) for name in "uv")
            products = torch.zeros(2, n, device=u.device)
            self._replay_all(recorded, torch.stack([u, v]), products, keep=True)
            scale = torch.linalg.vector_norm(products[0])
            tolerance = max(0.01, 4 * max(torch.finfo(t.dtype).eps for t in values) ** 0.5)
            if (products[0] @ v - products[1] @ u).abs() > tolerance * scale:
                raise RuntimeError(f"{custom}: double backward {_NO_DOUBLE_BACKWARD[0]}")
        self._trusted = True

    def _replay_all(self, recorded: Recorded, x: Tensor, out: Tensor, *, keep: bool) -> tuple[int, bool]:
        leaves = recorded.leaves
        for row, (vector, target) in enumerate(zip(x, out, strict=True)):
            with leaves.adding_to(target):
                self._replay(recorded, _like(vector, leaves.tensors), retain=keep or row < len(x) - 1)
        return recorded.examples, recorded.reached

    def _multiply_by_tangents(self, x: Tensor, out: Tensor) -> tuple[int, bool]:
        leaves, totals = Leaves(self.objective.values), (0, False)
        for vector, target in zip(x, out, strict=True):
            tangents = _like(vector, leaves.tensors)
            with leaves.adding_to(target):
                parts = [self._push(leaves, tangents, batch) for batch in self.objective.batches()]
            totals = (sum(count for count, _ in parts), any(reached for _, reached in parts))
        return totals

    def _multiply_by_differences(self, x: Tensor, out: Tensor) -> tuple[int, bool]:
        totals = (0, False)
        for vector, target in zip(x, out, strict=True):
            step, pieces = self._step(vector)
            totals = self._difference(pieces, step, target)
        return totals

    def _step(self, vector: Tensor) -> tuple[float, list[Tensor]]:
        """Return a step that moves the weights by a fixed length along the vector, and the vector's pieces.

        The length is the cube root of the rounding unit, where truncation and rounding error of a central difference
        balance (Nocedal & Wright, Numerical Optimization, §8.1).
        """
        values = [_at_least_float32(v) for v in self.objective.values]
        unit = max(torch.finfo(v.dtype).eps for v in values)
        norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        return unit ** (1 / 3) / norm if norm > 0 else 1.0, _like(vector, values)

    def _shifted(self, vector: list[Tensor], step: float) -> Leaves:
        """Return leaves at theta + step·vector, in float32 at least: half precision would round the step away."""
        values = self.objective.values
        return Leaves(torch.add(_at_least_float32(t), v, alpha=step) for t, v in zip(values, vector, strict=True))

    def _give_up_double_backward(self, error: RuntimeError) -> None:
        """Change to central differences where a kernel has no double backward and the mode may be chosen."""
        if not any(phrase in str(error) for phrase in _NO_DOUBLE_BACKWARD):
            raise error
        if self.mode != "auto":
            raise InputError(
                f"{type(self.objective.model).__name__} has an operation that cannot be differentiated twice ({error})",
                "double backward, which mode='grad-of-grad' needs",
                "Type mode='central-difference', or leave mode out",
            ) from error
        warnings.warn(
            f"{type(self.objective.model).__name__} uses an operation without double backward; curvature products are"
            " central differences of gradients instead (about four digits). Load the model with eager attention and"
            " uncompiled for exact ones.",
            GradsketchWarning,
            stacklevel=2,
        )
        self.mode = "central-difference"


# What PyTorch says where a backward pass cannot itself be differentiated.
_NO_DOUBLE_BACKWARD = (
    "is not implemented",
    "does not currently support double backward",
    "trying to differentiate twice a function that was marked with @once_differentiable",
)


def _custom_operation(edges: Sequence[tuple[int, GradientEdge]]) -> str | None:
    """Return the name of a hand-written autograd function in a graph, or None."""
    seen: set[Any] = set()
    nodes: list[Any] = [edge.node for _, edge in edges]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return type(node).__name__
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return None


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Keep scaled-dot-product attention on the path whose backward can itself be differentiated."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _like(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into pieces with the shapes, devices and dtypes of the given tensors; views where they agree."""
    pieces = split_as(vector, like)
    return [piece.to(device=t.device, dtype=t.dtype) for piece, t in zip(pieces, like, strict=True)]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor
