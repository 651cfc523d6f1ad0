"""Sketches of every example's gradient, from one forward and one backward pass of the batch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.parameters import Parameters
from gradsketch.gradients.per_example.contributions import Consumer, Contribution, Direct
from gradsketch.gradients.per_example.explicit import gradients_by_loop, gradients_by_vmap, implicit_sketches
from gradsketch.gradients.per_example.interception import Interception, reached
from gradsketch.gradients.per_example.layout import Layout, Layouts
from gradsketch.gradients.per_example.proof import prove_layouts
from gradsketch.gradients.per_example.rules import RULES, coupled
from gradsketch.gradients.tasks import Batch, Task, as_task
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.block_sum import BlockSum

__all__ = ["GradientSketcher", "Method", "SketchedGradients", "sketch_gradients"]

Method = Literal["auto", "outer", "vmap", "loop", "implicit"]
# Per-example gradients that are held at once where a sketch needs them formed.
_FORMED_BYTES = 1 << 29
_ALL = slice(None)


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
        model: any module; left as it was found, also after an error.
        task: a Task, or a function (model, batch) → losses [b] in which no example depends on another.
        sketch: a BlockSum over parameters of the model, or any sketch with n = ``parameters.n``.
        parameters: the selection; by default the BlockSum's own.
        method: "outer" captures every use of a parameter in one backward pass and refuses what it cannot; "auto" (the
            default) sends such parameters, named in a warning, through "vmap" or, where that fails, "loop". Those two
            form the gradients explicitly; "implicit" differentiates w ↦ L(theta0 + Phiᵀ w) at 0.
        on_non_finite: "raise" an error naming example and parameter, or "skip" the example and record it.

    Raises:
        InputError: parameters the model lacks, a sketch of another length, losses not of shape [b], BatchNorm in
            training mode, a method that cannot do this model.
        NonFiniteError: a loss or gradient is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task | Callable[[nn.Module, Batch], Tensor],
        sketch: Sketch,
        *,
        parameters: Parameters | None = None,
        method: Method = "auto",
        on_non_finite: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.task, self.sketch = as_task(task), sketch
        self.method, self.on_non_finite = method, on_non_finite
        self._tensors = _tensors_of(self.model, sketch, parameters)
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._slow: set[str] = set()
        self._layouts: dict[str, Layout] | None = None
        self._vmap_failed = False

    def __call__(self, batch: Batch) -> SketchedGradients:
        """Sketch one batch."""
        start = time.perf_counter()
        with _as_found(self.model, self._tensors):
            values, losses = self._sketch(batch)
            skipped = self._check_finite(batch, values, losses)
        return SketchedGradients(values, losses, skipped, time.perf_counter() - start)

    def _sketch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        b = batch_length(batch)
        if self.method == "implicit":
            rows = [s for _, s in implicit_sketches(self.model, self.task, batch, self._tensors, self.sketch)]
            return torch.cat(rows), self._losses(batch).detach()
        if isinstance(self.sketch, BlockSum):
            return self._into(batch, _Sketches(self.sketch))
        size = self.sketch.n * 4
        step = max(1, _FORMED_BYTES // size)
        parts = []
        for low in range(0, b, step):
            part = batch if step >= b else batch_slice(batch, low, min(low + step, b))
            formed, losses = self._into(part, _Formed(self._tensors))
            parts.append((self.sketch._apply(formed), losses))
        return torch.cat([v for v, _ in parts]), torch.cat([loss for _, loss in parts])

    def _into(self, batch: Batch, sink: _Sketches | _Formed) -> tuple[Tensor, Tensor]:
        sink.begin(batch_length(batch), next(iter(self._tensors.values())))
        if self.method in ("auto", "outer"):
            losses = self._capture(batch, sink.add)
            slow = {name: tensor for name, tensor in self._tensors.items() if name in self._slow}
        else:
            losses, slow = self._losses(batch).detach(), self._tensors
        for position, gradients in self._explicit(batch, slow):
            for name, gradient in gradients.items():
                sink.add(name, Direct(gradient), slice(position, position + len(gradient)))
        return sink.out, losses

    def _capture(self, batch: Batch, add: Consumer) -> Tensor:
        if self._layouts is None and batch_length(batch) > 1:
            self._layouts = prove_layouts(self._losses, batch, self._names)
        tap = Interception(RULES, self._names, Layouts(batch_length(batch), self._layouts or {}), add)
        with tap:
            losses = self._losses(batch)
            if losses.requires_grad:
                self._find_slow(losses)
                tap.slow = self._slow
                begin = [t for t in reached(losses) if id(t) not in self._names]
                if begin:
                    torch.autograd.grad(losses.sum(), begin, allow_unused=True)
        return losses.detach()

    def _find_slow(self, losses: Tensor) -> None:
        new = {self._names[id(t)] for t in reached(losses) if id(t) in self._names} - self._slow
        if not new:
            return
        listed = ", ".join(sorted(new)[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        if self.method == "outer":
            raise InputError(
                f"{listed}, used in a way that method='outer' does not know",
                "parameters of layers it knows",
                "Type method='auto', or exclude them",
            )
        warnings.warn(
            f"{listed}: used in a way that cannot be captured during backward, so their gradients are formed one "
            f"example after another (exact, slower); leave them out with Parameters(model, exclude=...)",
            GradsketchWarning,
            stacklevel=6,
        )
        self._slow |= new

    def _explicit(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        if not tensors:
            return
        if self.method != "loop" and not self._vmap_failed:
            try:
                yield from gradients_by_vmap(self.model, self.task, batch, tensors)
                return
            except Exception as error:
                if self.method == "vmap":
                    raise InputError(
                        f"a model that vmap cannot run ({type(error).__name__}: {str(error).splitlines()[0]})",
                        "operations that torch.func.vmap knows",
                        "Type method='auto' or method='loop'",
                    ) from error
                self._vmap_failed = True
        yield from gradients_by_loop(self.model, self.task, batch, tensors)

    def _losses(self, batch: Batch) -> Tensor:
        losses = self.task.losses(self.model, batch)
        if losses.shape != (batch_length(batch),):
            raise InputError(
                f"{self.task!r} returned losses of shape {list(losses.shape)} for {batch_length(batch)} examples",
                f"one loss an example, shape [{batch_length(batch)}]",
                "Use reduction='none' and sum over everything but the first dim",
            )
        return losses

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
        alone = batch_slice(batch, position, position + 1)
        _, gradients = next(gradients_by_loop(self.model, self.task, alone, self._tensors))
        return next((name for name, g in gradients.items() if not torch.isfinite(g).all()), "no single parameter")


def sketch_gradients(
    model: nn.Module,
    task: Task | Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    sketch: Sketch,
    *,
    parameters: Parameters | None = None,
    method: Method = "auto",
) -> Float[Tensor, "b d"]:
    """Return the sketch of every example's gradient: ``GradientSketcher`` for a single batch.

    Example:
        >>> import torch, gradsketch as gs
        >>> model = torch.nn.Linear(30, 20)
        >>> def losses(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        >>> batch = {"x": torch.randn(5, 30), "y": torch.arange(5)}
        >>> sketch_gradients(model, losses, batch, gs.BlockSum(gs.Parameters(model), 64)).shape
        torch.Size([5, 64])

    Raises:
        InputError: see ``GradientSketcher``.
        NonFiniteError: a loss or gradient is not finite.
    """
    return GradientSketcher(model, task, sketch, parameters=parameters, method=method)(batch).values


class _Sketches:
    """Adds contributions up into sketches."""

    def __init__(self, phi: BlockSum) -> None:
        self.phi = phi

    def begin(self, b: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.out = torch.zeros(b, self.phi.d, dtype=dtype, device=like.device)

    def add(self, name: str, contribution: Contribution, rows: slice = _ALL) -> None:
        contribution.sketch(self.phi, name, self.out[rows])


class _Formed:
    """Adds contributions up into flat gradients ``[b, n]``."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def begin(self, b: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        sizes = [shape.numel() for shape in self.shapes.values()]
        self.out = torch.zeros(b, sum(sizes), dtype=dtype, device=like.device)
        self.parts = dict(zip(self.shapes, self.out.split(sizes, dim=1), strict=True))

    def add(self, name: str, contribution: Contribution, rows: slice = _ALL) -> None:
        shape = self.shapes[name]
        first = shape[0] if len(shape) > 1 else 1
        self.parts[name][rows] += contribution.dense(first, shape.numel() // first).flatten(1)


def _tensors_of(model: nn.Module, sketch: Sketch, parameters: Parameters | None) -> dict[str, Tensor]:
    if parameters is not None:
        tensors = dict(parameters)
    elif isinstance(sketch, BlockSum):
        own = dict(model.named_parameters(remove_duplicate=False))
        tensors = {name: own[name] for name in sketch.names if name in own}
    else:
        raise InputError(
            f"{sketch!r} without parameters", "the selection it is over", "Pass parameters=Parameters(model)"
        )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if isinstance(sketch, BlockSum) and shapes != sketch.shapes:
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


@contextmanager
def _as_found(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Make exactly the chosen parameters require grad, run every submodule uncompiled, and put all back at the end."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise coupled("a BatchNorm in training mode")
    before = [(p, p.requires_grad) for p in {*model.parameters(), *tensors.values()}]
    chosen = {id(t) for t in tensors.values()}
    with ExitStack() as stack:
        stack.callback(lambda: [p.requires_grad_(flag) for p, flag in before])
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        yield
