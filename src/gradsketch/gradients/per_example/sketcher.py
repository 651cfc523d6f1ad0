"""Sketches of every example's gradient, from one forward and one backward pass of the batch."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.errors import InputError, NonFiniteError
from gradsketch.fsdp import Ranks, at_rest, require_unshared
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.parameters import Selection, bare, selected
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.gradients.per_example.capture import Capture
from gradsketch.gradients.per_example.contributions import ByParameter, Consumer, Contribution
from gradsketch.gradients.per_example.differentiating import differentiating
from gradsketch.gradients.per_example.directions import Directions
from gradsketch.gradients.per_example.explicit import gradients_by_loop, implicit_sketches
from gradsketch.gradients.tasks import Batch, TaskLike, as_task
from gradsketch.linear_map import widened
from gradsketch.lockstep import Lockstep
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.sketches.preconditioned import Preconditioned
from gradsketch.stand_ins import ALONE
from gradsketch.transforms.precision import full_precision

__all__ = ["GradientSketcher", "Method", "SketchedGradients", "sketch_gradients"]

Method = Literal["auto", "outer", "vmap", "loop", "implicit"]
# Per-example gradients that are held at once where a sketch needs them formed.
_FORMED_BYTES = 1 << 29


@dataclass(frozen=True)
class SketchedGradients:
    """Sketches of one batch's per-example gradients.

    ``skipped`` maps the position of each example whose loss or gradient is not finite to the reason; its row in
    ``values`` is zero.
    """

    values: Float[Tensor, "b d"]
    losses: Float[Tensor, " b"]
    skipped: Mapping[int, str]
    seconds: float


class GradientSketcher:
    """Turns batches into sketches ``[b, d]`` of the gradients of each example's loss, in float32 or wider.

    With a ``BlockSum`` the gradients of linear layers, convolutions and embeddings are never formed and the ordinary
    weight gradients are not computed; any other sketch over the flat vector of ``parameters`` gets the gradients
    formed, as many at a time as fit half a gigabyte.

    Args:
        model: any module; left as it was found, also after an error. With dropout in training mode a sketch is that of
            one draw of the masks, which a warning says.
        task: a Task, or a function (model, batch) → losses [b] in which no example depends on another.
        sketch: a BlockSum over parameters of the model, or any sketch with n = ``parameters.n``.
        parameters: the selection, or globs of names; by default the BlockSum's own.
        precondition: factors, as ``kfac`` estimates them: the gradients are multiplied with the roots of their metric
            first, by their own factors, so that sketches of P g come at little more than sketches of g.
        method: "outer" captures every use of a parameter in one backward pass and refuses what it cannot; "auto" (the
            default) sends such parameters, named in a warning, through "vmap" or, where that fails, "loop". Those two
            form the gradients explicitly; "implicit" differentiates w ↦ L(theta0 + Phiᵀ w) at 0.
        on_non_finite: "raise" an error naming example and parameter, or "skip" the example and record it.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> sketcher = gs.GradientSketcher(model, task, gs.BlockSum(gs.Parameters(model), 32))
        >>> sketched = sketcher(task.collate(data))
        >>> sketched.values.shape, sketched.losses.shape
        (torch.Size([32, 32]), torch.Size([32]))

    Raises:
        InputError: parameters the model lacks, a sketch of another length, losses not of shape [b], BatchNorm in
            training mode, a method that cannot do this model.
        FingerprintError: ``precondition`` was made with other weights.
        NonFiniteError: a loss or gradient is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        task: TaskLike,
        sketch: Sketch | Preconditioned | Directions,
        *,
        parameters: Selection = None,
        precondition: Factors | None = None,
        method: Method = "auto",
        on_non_finite: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.model = bare(model)
        if precondition is not None and not Ranks(self.model).several:  # ranks would have to gather all weights
            precondition.require_of(self.model)
        self.task, self.sketch = as_task(task), sketch if precondition is None else precondition.before(sketch)
        if not isinstance(self.sketch, ByParameter):
            require_unshared(self.model, f"{self.sketch!r}, which wants whole gradients,", "Pass a BlockSum")
        self.method, self.on_non_finite = method, on_non_finite
        self._parameters, self._tensors = parameters, _tensors_of(self.model, self.sketch, parameters)
        self._capture = Capture(self.model, self.task, self._tensors, method)

    def __call__(self, batch: Batch) -> SketchedGradients:
        """Sketch one batch."""
        start = time.perf_counter()
        with self.ranks.team.together(), differentiating(self.model, self._tensors):
            values, losses = self._sketch(batch)
            losses = losses.to(values.device)  # a spread model's come from the device that holds its last layer
            skipped = self._check_finite(batch, values, losses)
        return SketchedGradients(values, losses, skipped, time.perf_counter() - start)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also a deep or a pickled one, is made anew over its own model, and proves itself anew."""
        return _made, (self.model, self.task, self.sketch, self._parameters, self.method, self.on_non_finite)

    @property
    def ranks(self) -> Ranks:
        """The ranks that hold parts of the model and go in step: each call is one call on every rank."""
        return self._capture.ranks

    def keep_up(self, batch: Batch) -> None:
        """Sketch a batch, for nothing, as often as other ranks call, until each of them keeps up too."""
        with differentiating(self.model, self._tensors):
            self._capture.keep_up(batch)

    @property
    def slow(self) -> Mapping[str, str]:
        """Parameters whose gradients are formed one example after another, each with the reason."""
        return self._capture.slow

    @property
    def audits(self) -> Audits:
        """How many batches were held against autograd's own gradients, and the largest relative error."""
        return self._capture.audits

    def _sketch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        b = batch_length(batch)
        if self.method == "implicit":
            self._capture.heed_hooks()
            rows = [s for _, s in implicit_sketches(self.model, self.task, batch, self._tensors, self.sketch)]
            return torch.cat(rows), self._capture.losses(batch).detach()
        if isinstance(self.sketch, ByParameter):
            return self._into(batch, _Sketches(self.sketch, self._tensors, self.ranks.team))
        size = self.sketch.n * 4
        step = max(1, _FORMED_BYTES // size)
        parts = []
        for low in range(0, b, step):
            part = batch if step >= b else batch_slice(batch, low, min(low + step, b))
            formed, losses = self._into(part, _Formed(self._tensors))
            parts.append((self.sketch._apply(formed), losses))
        return torch.cat([v for v, _ in parts]), torch.cat([loss for _, loss in parts])

    def _into(self, batch: Batch, sink: _Sketches | _Formed) -> tuple[Tensor, Tensor]:
        def begin() -> Consumer:
            sink.begin(batch_length(batch), next(iter(self._tensors.values())))
            return sink.add

        losses = self._capture(batch, begin, sink)
        values = sink.result()
        self._capture.hold(values)
        return values, losses

    def _check_finite(self, batch: Batch, values: Tensor, losses: Tensor) -> dict[int, str]:
        bad = ~(torch.isfinite(losses) & torch.isfinite(values.sum(1)))
        if not bad.any():
            return {}
        reasons = {int(i): f"its loss is {losses[i].item()}" for i in bad.nonzero()[:, 0]}
        for position, reason in reasons.items():
            if math.isfinite(losses[position].item()):
                reasons[position] = f"its gradient of {self._culprit(batch, position)} is not finite"
            elif self.on_non_finite == "raise":
                reasons[position] = f"{reason}, in the gradient of {self._culprit(batch, position)}"
            if self.on_non_finite == "raise":
                raise NonFiniteError(
                    f"example {position} of the batch: {reasons[position]}",
                    "finite losses and gradients",
                    "Look at this example, compute in float32, or pass on_non_finite='skip'",
                )
        values[bad] = 0
        return reasons

    def _culprit(self, batch: Batch, position: int) -> str:
        """Return the first parameter, in the order of the model, whose gradient is not finite for one example."""
        if self.ranks.several:
            return "a parameter"  # to look for it takes passes that the other ranks do not make
        alone = batch_slice(batch, position, position + 1)
        _, _, gradients = next(gradients_by_loop(self.model, self.task, alone, self._tensors))
        return next((name for name, g in gradients.items() if not torch.isfinite(g).all()), "no single parameter")


def sketch_gradients(
    model: nn.Module,
    task: TaskLike,
    batch: Batch,
    sketch: Sketch,
    *,
    parameters: Selection = None,
    precondition: Factors | None = None,
    method: Method = "auto",
) -> Float[Tensor, "b d"]:
    """Return the sketch of every example's gradient: ``GradientSketcher`` for a single batch.

    Example:
        >>> model = torch.nn.Linear(30, 20)
        >>> def losses(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        >>> batch = {"x": torch.randn(5, 30), "y": torch.arange(5)}
        >>> gs.sketch_gradients(model, losses, batch, gs.BlockSum(gs.Parameters(model), 64)).shape
        torch.Size([5, 64])

    Raises:
        InputError: see ``GradientSketcher``.
        NonFiniteError: a loss or gradient is not finite.
    """
    sketcher = GradientSketcher(model, task, sketch, parameters=parameters, precondition=precondition, method=method)
    return sketcher(batch).values


class _Sketches:
    """Adds contributions up into sketches; those of vectors, biases above all, together at the end.

    Each device of a model adds up what it holds. Of a team each rank sketches some of the parameters, large and small
    ones in turn, and what all have is added up.
    """

    def __init__(self, phi: ByParameter, tensors: Mapping[str, Tensor], team: Lockstep) -> None:
        self.phi, self.team = phi, team
        self.devices = {name: tensor.device for name, tensor in tensors.items()}
        by_size = sorted(tensors, key=lambda name: tensors[name].numel())
        self.own = frozenset(by_size[team.rank :: team.ranks])
        self.key = self._kind(), frozenset(self.devices.values())

    def _kind(self) -> Hashable:
        phi = self.phi
        if isinstance(phi, Directions):
            return Directions, phi.d
        sketch = phi.sketch if isinstance(phi, Preconditioned) else phi
        return type(phi), sketch.d, *sorted(sketch.options().items())

    def begin(self, b: int, like: Tensor) -> None:
        devices = dict.fromkeys([like.device, *self.devices.values()])
        self.outs = {at: torch.zeros(b, self.phi.d, dtype=widened(like.dtype), device=at) for at in devices}
        self.vectors: dict[torch.device, dict[str, Tensor]] = {at: {} for at in devices}

    def add(self, name: str, contribution: Contribution, rows: slice) -> None:
        if name not in self.own:
            return
        out, vectors = self.outs[self.devices[name]], self.vectors[self.devices[name]]
        formed = contribution.formed() if len(self.phi.shapes[name]) == 1 and rows == slice(None) else None
        if formed is None:
            contribution.sketch(self.phi, name, out[rows])
        else:
            vectors[name] = vectors[name] + formed if name in vectors else formed

    def result(self) -> Tensor:
        first, *others = self.outs.values()
        for at, out in self.outs.items():
            self.phi.add_vectors(out, self.vectors[at])
        for other in others:
            first += other.to(first.device)
        return self.team.sums(first.flatten()).view_as(first)

    def blank(self) -> Float[Tensor, " d"]:
        return torch.zeros(self.phi.d, dtype=torch.float64, device="cpu")

    def add_whole(self, row: Float[Tensor, " d"], name: str, gradient: Tensor) -> None:
        out = gradient.new_zeros(1, self.phi.d, dtype=widened(gradient.dtype))
        with full_precision(gradient.device):
            self.phi.add_gradient(out, name, gradient[None].to(out.dtype))
        row += out[0].cpu()


def _made(
    model: nn.Module,
    task: TaskLike,
    sketch: Sketch | Preconditioned | Directions,
    parameters: Selection,
    method: Method,
    on_non_finite: Literal["raise", "skip"],
) -> GradientSketcher:
    return GradientSketcher(model, task, sketch, parameters=parameters, method=method, on_non_finite=on_non_finite)


class _Formed:
    """Adds contributions up into flat gradients ``[b, n]``."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.key = "formed", frozenset(tensor.device for tensor in tensors.values())

    def begin(self, b: int, like: Tensor) -> None:
        dtype = widened(like.dtype)
        sizes = [shape.numel() for shape in self.shapes.values()]
        self.out = torch.zeros(b, sum(sizes), dtype=dtype, device=like.device)
        self.parts = dict(zip(self.shapes, self.out.split(sizes, dim=1), strict=True))

    def add(self, name: str, contribution: Contribution, rows: slice) -> None:
        shape = self.shapes[name]
        first = shape[0] if len(shape) > 1 else 1
        self.parts[name][rows] += contribution.dense(first, shape.numel() // first).flatten(1).to(self.out.device)

    def result(self) -> Tensor:
        return self.out

    def blank(self) -> Float[Tensor, " n"]:
        return torch.zeros(self.out.shape[1], dtype=self.out.dtype, device="cpu")

    def add_whole(self, row: Float[Tensor, " n"], name: str, gradient: Tensor) -> None:
        parts = row.split([shape.numel() for shape in self.shapes.values()])
        parts[list(self.shapes).index(name)].add_(gradient.flatten().cpu())


def _tensors_of(
    model: nn.Module, sketch: Sketch | Preconditioned | Directions, parameters: Selection
) -> dict[str, Tensor]:
    sketch = sketch.sketch if isinstance(sketch, Preconditioned) else sketch
    if parameters is not None:
        tensors = dict(selected(model, parameters))
    elif isinstance(sketch, BlockSum | Directions):
        with ALONE:
            at_rest(model)
            own = dict(model.named_parameters(remove_duplicate=False))
        tensors = {name: own[name] for name in sketch.shapes if name in own}
    else:
        raise InputError(
            f"{sketch!r} without parameters", "the selection it is over", "Pass parameters=Parameters(model)"
        )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if isinstance(sketch, BlockSum | Directions) and shapes != sketch.shapes:
        differ = next(n for n in {**sketch.shapes, **shapes} if shapes.get(n) != sketch.shapes.get(n))
        raise InputError(
            f"{differ!r} of shape {shapes.get(differ)} in the model and {sketch.shapes.get(differ)} in the sketch",
            "a sketch over parameters of this model",
            "Type BlockSum(Parameters(model), d)",
        )
    if sketch.n != sum(t.numel() for t in tensors.values()):
        raise InputError(
            f"{sketch!r} for parameters of length {sum(t.numel() for t in tensors.values())}",
            "a sketch with n = parameters.n",
            "Build it with n=parameters.n",
        )
    return tensors
