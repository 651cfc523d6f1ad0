"""What the Hessian, the Gauss–Newton matrix and the Fisher share: batches, three ways to differentiate, fall-backs.

Reverse over reverse is the default. Its graphs are kept where there is one batch, or where those of all batches fit
into 512 MiB: a product then costs two gradients instead of three. Forward over reverse and central differences are the
other modes. Reverse over forward is left out, because PyTorch's fused normalisation layers get it wrong. An embedding's
``padding_idx`` row counts as frozen in reverse over reverse; the other two modes see its forward effect, so padding
must not reach the loss.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.curvature.check import Check, calibrated, examined
from gradsketch.gradients.curvature.differences import Scheme, at_least_float32
from gradsketch.gradients.curvature.failures import WrongDerivativeError, lacks_double_backward, non_finite, translated
from gradsketch.gradients.curvature.graph import counted_bytes, operations, suspects
from gradsketch.gradients.curvature.leaves import Leaves, split_as
from gradsketch.gradients.curvature.objective import LossesOf, Objective
from gradsketch.gradients.curvature.probe import check_deterministic, refuse_listed_batches
from gradsketch.gradients.curvature.state import content_of, sum_of_bits
from gradsketch.gradients.tasks import Batch
from gradsketch.linear_map import LinearMap, widened
from gradsketch.lockstep import Lockstep
from gradsketch.space import Space

__all__ = ["Curvature", "Mode", "Recorded", "SharedCurvature", "differentiable_attention"]

# Graphs of several batches are kept if all of them fit into this: products cost two thirds then.
_KEPT_BYTES = 1 << 29

Mode = Literal["auto", "grad-of-grad", "jvp-of-grad", "central-difference"]


@dataclass(frozen=True)
class Recorded:
    """First derivatives of one batch as a graph that can be differentiated again.

    ``edges`` are the roots of that graph, each with the place of its leaf; ``outputs`` whatever else a product needs.
    ``roots`` are those of the graph of the loss itself: what a backward pass takes for a constant is only there.
    """

    leaves: Leaves
    edges: list[tuple[int, GradientEdge]]
    examples: int
    reached: bool
    outputs: Any = None
    roots: tuple[Any, ...] = ()
    besides: frozenset[str] = frozenset()


class Curvature(LinearMap):
    """A self-adjoint map R^n → R^n: a sum over every example of every batch, divided by their number.

    A concrete curvature says how one batch's product is added to the leaves' target in each of three modes. A graph
    of first derivatives serves any number of vectors; the one of a single batch is kept until the model changes.
    The first product holds itself against central differences of gradients: ``check`` is what came of it.
    """

    is_self_adjoint = True

    def __init__(self, objective: Objective, mode: Mode, *, check: bool) -> None:
        with objective.ranks.together():
            if mode not in get_args(Mode):
                raise InputError(f"mode={mode!r}", f"one of {', '.join(get_args(Mode))}", "Leave it out for 'auto'")
        self.objective, self.mode, self._asked = objective, mode, mode
        self.shape = (objective.parameters.n, objective.parameters.n)
        first = objective.values[0]
        self.device, self.dtype = first.device, at_least_float32(first.new_empty(0)).dtype
        self.check: Check | None = None
        # Graphs by the place of their batches, each with the batch's content, and the state of everything else that
        # they were made from. _fits is None until it is known.
        self._kept: dict[int, tuple[Any, Recorded]] = {}
        self._kept_at: Any = None
        self._fits: bool | None = None
        self._checks = check
        self._examined: set[str] = set()  # operations of graphs whose products were held against differences
        self._seen_all = False
        self._scheme: Scheme | None = None
        self._why = ""  # products are differences though nobody asked for them
        with self.ranks.together():
            refuse_listed_batches(objective)
            one = objective.is_one_batch
            # What autograd keeps of shared parameters is counted by nobody.
            self._fits = one if one or self.objective.space.is_shared else None
            if check:
                with translated(objective.model):
                    self._check_determinism()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.objective!r})"

    @property
    def ranks(self) -> Lockstep:
        return self.objective.ranks

    def facts(self) -> dict[str, Any]:
        return {"curvature": type(self).__name__, "mode": self._asked, **self.objective.facts()}

    def error_along(self, vector: Float[Tensor, " n"]) -> float:
        """Return how far the product with a vector is off, as a length for a unit vector: |Hv − D| / |v|.

        D is a central difference of gradients over all the data, so rounding, truncation and kinks are seen. Where
        products are differences themselves, D are two: one with steps twice as long, whose truncation is larger, and
        one with steps half as long, whose rounding is. For a unit eigenvector this is what the products add to the
        error of its eigenvalue; of rounding it is one draw, right within a factor of two. Costs a product and 2 to 8
        gradients.
        """
        with self.ranks.together():
            return self.error_along_share(self.objective.space.cut(vector))

    def error_along_share(self, vector: Float[Tensor, " m"]) -> float:
        """Do the same for a vector of which this process holds its share."""
        with torch.inference_mode(False), torch.enable_grad(), translated(self.objective.model):
            vector = vector.detach() / self.objective.space.length(vector)
            product = self.product(vector[None])[0]
            if self._scheme is None:
                self._scheme, _ = calibrated(self._over_first_batch())
            own = self.mode == "central-difference"
            others = (self._scheme.doubled, self._scheme.halved) if own else (self._scheme,)
            return max(self._distance(product, vector, scheme) for scheme in others)

    def _distance(self, product: Tensor, vector: Tensor, scheme: Scheme) -> float:
        difference, examples, _ = self.difference(vector, scheme)
        return self.objective.space.length(product - difference / self.ranks.total(examples))

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
    def _add_difference(
        self, vector: Tensor, step: float, dtype: torch.dtype | None, out: Tensor, weight: float
    ) -> tuple[int, bool]:
        """Add ``weight`` times products with a unit vector by central differences; return examples, any reached."""

    def __call__(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        with self.ranks.together():
            return super().__call__(x)

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        space = self.objective.space
        if not space.is_shared:
            return self.product(x)
        with self.ranks.together():
            if not self.ranks.same(sum_of_bits(x)):
                raise InputError(
                    f"{self!r} was given other vectors on each rank",
                    "the same vectors on every rank",
                    "Make them from one seed, or broadcast them",
                )
            return torch.stack([space.whole(row) for row in self.product(space.cut(x))])

    def shared(self) -> LinearMap:
        return SharedCurvature(self) if self.objective.space.is_shared else self

    def product(self, x: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        """Return products with vectors of which this process holds its share, as shares."""
        with torch.inference_mode(False), torch.enable_grad(), translated(self.objective.model):
            x = x.detach().clone() if x.is_inference() else x.detach()
            out, examples, reached = self._multiply(x)
            self.objective.check_reached(reached)
            out.div_(self.ranks.total(examples))
            if self.ranks.any(not torch.isfinite(out).all()):
                self.objective.explain_non_finite()
                raise non_finite(self.objective.values, self.mode)
        return out

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return self._apply(w)

    def _check_determinism(self) -> None:
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
                stacklevel=5,
            )

    # --- three ways to multiply ---

    def _multiply(self, x: Tensor) -> tuple[Tensor, int, bool]:
        """Return the sum of products over all examples, their number, and whether any leaf was reached."""
        if self.mode != "central-difference":
            try:
                with self.ranks.together():
                    self._look_at_first_batch()  # before there is ``out``, for differences take vectors of their own
                    out = torch.zeros_like(x, dtype=widened(x.dtype))
                    return out, *self.multiply_exactly(x, out)
            except RuntimeError as error:
                self._kept.clear()
                self._give_up_double_backward(error)
        return self._multiply_by_differences(x)

    def multiply_exactly(self, x: Tensor, out: Tensor, dtype: torch.dtype | None = None) -> tuple[int, bool]:
        """Add products by differentiating twice at weights in ``dtype``; return examples, whether any was reached."""
        with differentiable_attention():
            if self.mode == "jvp-of-grad":
                return self._multiply_by_tangents(x, out, dtype)
            return self._multiply_by_graphs(x, out, dtype)

    def _multiply_by_graphs(self, x: Tensor, out: Tensor, dtype: torch.dtype | None) -> tuple[int, bool]:
        examples, reached, may_keep = 0, False, bool(self._fits) and dtype is None
        if may_keep and self._kept and self.ranks.any(self.objective.state() != self._kept_at):
            self._kept.clear()
        settled = True
        for place, batch in enumerate(self.objective.batches()):
            content = content_of(batch) if may_keep else None
            recorded = self._still_valid(place, content)
            leaves = Leaves(self.values(dtype)) if recorded is None else recorded.leaves
            with self.objective.at(leaves.tensors) as losses:
                recorded = self._recorded(leaves, losses, batch) if recorded is None else recorded
                unseen = self._unseen(recorded)
                keep = may_keep and not unseen
                count, any_reached = self._replay_all(recorded, x, out, keep=keep)
            examples, reached = examples + count, reached or any_reached
            if keep and place not in self._kept:
                self._kept[place], settled = (content, recorded), False
            del recorded, leaves  # frees the graph before the next one is built
            if unseen:
                self._examine(batch, unseen)
        if not settled:  # read afterwards, because a forward pass may count or note something
            self._kept_at = self.objective.state()
        self._seen_all = True
        return examples, reached

    def _still_valid(self, place: int, content: Any) -> Recorded | None:
        """Return the kept graph of a batch that is as it was, and free one of another content."""
        if content is None or place not in self._kept:
            return None
        if self.ranks.any(self._kept[place][0] != content):
            del self._kept[place]
            return None
        return self._kept[place][1]

    def _recorded(self, leaves: Leaves, losses: LossesOf, batch: Batch) -> Recorded:
        """Record a batch; the first one shows whether the graphs of all will fit into memory."""
        if self._fits is not None:
            return self._record(leaves, losses, batch)
        with counted_bytes() as found:
            recorded = self._record(leaves, losses, batch)
        self._fits = sum(found.values()) * len(self.objective.data) <= _KEPT_BYTES
        return recorded

    def _replay_all(self, recorded: Recorded, x: Tensor, out: Tensor, *, keep: bool) -> tuple[int, bool]:
        leaves = recorded.leaves
        for row, (vector, target) in enumerate(zip(x, out, strict=True)):
            with leaves.adding_to(target):
                self._replay(recorded, pieces(vector, leaves.tensors), retain=keep or row < len(x) - 1)
        return recorded.examples, recorded.reached

    def _multiply_by_tangents(self, x: Tensor, out: Tensor, dtype: torch.dtype | None) -> tuple[int, bool]:
        leaves, totals = Leaves(self.values(dtype)), (0, False)
        for vector, target in zip(x, out, strict=True):
            tangents = pieces(vector, leaves.tensors)
            with leaves.adding_to(target):
                parts = [self._push(leaves, tangents, batch) for batch in self.objective.batches()]
            totals = (sum(count for count, _ in parts), any(reached for _, reached in parts))
        if not self._seen_all:
            self._seen_all = True
            if self._checks and totals[1]:
                self._examine(next(self.objective.batches()), set())
        return totals

    def _multiply_by_differences(self, x: Tensor) -> tuple[Tensor, int, bool]:
        scheme, out, examples, reached = self._calibrated(), torch.zeros_like(x, dtype=widened(x.dtype)), 0, False
        for vector, target in zip(x, out, strict=True):
            norm = self.objective.space.length(vector) or 1.0
            product, examples, reached = self.difference(vector / norm, scheme)
            target.copy_(product.mul_(norm))
        return out, examples, reached

    def _calibrated(self) -> Scheme:
        """Return how differences are taken, decided and said at the first product."""
        if self._scheme is None:
            self._scheme, self.check = calibrated(self._over_first_batch())
            if self._why or self.check.note:
                why = f" ({self._why})" if self._why else ""
                warnings.warn(
                    f"{type(self.objective.model).__name__}: curvature products are central differences of gradients,"
                    f" {self._scheme}, {self.check.error:.0e} off at most where they were checked"
                    f"{why}{'; ' if self.check.note else ''}{self.check.note}.",
                    GradsketchWarning,
                    stacklevel=8,
                )
        return self._scheme

    def difference(self, vector: Tensor, scheme: Scheme) -> tuple[Tensor, int, bool]:
        """Return the sum of products with a unit vector by a scheme, examples, whether any was reached."""
        dtype = widened(scheme.dtype or self.objective.values[0].dtype)
        product, examples, reached = torch.zeros_like(vector, dtype=dtype), 0, False
        for step, weight in scheme.steps:
            examples, reached = self._add_difference(vector, step, scheme.dtype, product, weight)
        return product, examples, reached

    def values(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the selected parameters, in ``dtype`` where one is given."""
        return [value if dtype is None else value.to(dtype) for value in self.objective.values]

    def _shifted(self, vector: Tensor, step: float, dtype: torch.dtype | None) -> Leaves:
        """Return leaves at theta + step·vector, in float32 at least: half precision would round the step away."""
        values = [at_least_float32(value) for value in self.values(dtype)]
        directions = pieces(vector, values)
        return Leaves(torch.add(t, v, alpha=step) for t, v in zip(values, directions, strict=True))

    # --- held against differences ---

    def _unseen(self, recorded: Recorded) -> set[str]:
        """Return the operations of a graph that no examined batch had; of those that nobody has to check, none."""
        if self._seen_all or not recorded.reached:
            return set()
        nodes = [*recorded.roots, *(edge.node for _, edge in recorded.edges)]
        found = operations(nodes) | recorded.besides
        unseen = (found if self._checks else suspects(found)) - self._examined
        return unseen or found if self.ranks.any(bool(unseen)) else unseen

    def _look_at_first_batch(self) -> None:
        """Examine the first batch's graph, unless it has been or nothing in it needs it."""
        if self._seen_all or self._examined or not self._checks or self.mode == "jvp-of-grad":
            return
        with differentiable_attention():
            batch, leaves = next(self.objective.batches()), Leaves(self.values())
            with self.objective.at(leaves.tensors) as losses:
                recorded = self._recorded(leaves, losses, batch)
                unseen = self._unseen(recorded)
            del recorded, leaves
            if unseen:
                self._examine(batch, unseen)

    def _examine(self, batch: Batch, found: set[str]) -> None:
        """Hold products over one batch against differences, once for every kind of graph.

        Raises:
            WrongDerivativeError: they are wrong.
        """
        self._examined |= found
        check, scheme = examined(self._over(batch), suspects(found))
        if self.check is None or check.error > self.check.error:
            self.check, self._scheme = check, scheme or self._scheme
        if check.note:
            warnings.warn(f"{self!r}: {check.note}", GradsketchWarning, stacklevel=8)

    def _over(self, batch: Batch) -> Curvature:
        part = copy.copy(self)
        part.objective, part._kept, part._seen_all, part._fits = self.objective.only(batch), {}, True, True
        return part

    def _over_first_batch(self) -> Curvature:
        return self._over(next(self.objective.batches()))

    def _give_up_double_backward(self, error: RuntimeError) -> None:
        """Change to central differences where double backward is missing or wrong, and the mode may be chosen."""
        if not (isinstance(error, WrongDerivativeError) or lacks_double_backward(error)):
            raise error
        name = type(self.objective.model).__name__
        if self.mode != "auto":
            raise InputError(
                f"mode={self.mode!r} for {name}: {error}",
                "operations that can be differentiated this way",
                "Type mode='central-difference', or leave mode out",
            ) from error
        self.mode, self._why, self._scheme = "central-difference", str(error), None


class SharedCurvature(LinearMap):
    """A curvature as a map of vectors of which each rank holds its share."""

    is_self_adjoint = True

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature
        self.shape = (self.space.size, self.space.size)
        self.device, self.dtype = curvature.device, curvature.dtype

    def __repr__(self) -> str:
        return repr(self.curvature)

    @property
    def space(self) -> Space:
        return self.curvature.objective.space

    @property
    def ranks(self) -> Lockstep:
        return self.curvature.ranks

    @property
    def mode(self) -> Mode:
        """How products are made."""
        return self.curvature.mode

    def error_along(self, vector: Float[Tensor, " m"]) -> float:
        """Do what the curvature does, for a vector of which this process holds its share."""
        return self.curvature.error_along_share(vector)

    def __call__(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
        with self.space.ranks.together():
            return super().__call__(x)

    def facts(self) -> dict[str, Any]:
        return self.curvature.facts()

    def _apply(self, x: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        return self.curvature.product(x)

    def _apply_adjoint(self, w: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        return self.curvature.product(w)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Keep scaled-dot-product attention on the path whose backward can itself be differentiated."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into pieces with the shapes, devices and dtypes of the given tensors; views where they agree."""
    parts = split_as(vector, like)
    return [piece.to(device=t.device, dtype=t.dtype) for piece, t in zip(parts, like, strict=True)]
