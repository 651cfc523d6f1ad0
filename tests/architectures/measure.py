"""Whether the gradients of one architecture are right, and which of its parameters are slow."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gradsketch as gs
from architectures.zoo import Architecture
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.sketches.base import Sketch

__all__ = ["Measured", "Outcome", "measure", "unmeasured"]

Outcome = Literal["right", "refused", "wrong", "crashed", "broken"]
_WORST_FIRST: tuple[Outcome, ...] = "broken", "crashed", "wrong", "refused", "right"
# Llama and its kin compute their norms in float32 whatever the weights are.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


@dataclass(frozen=True)
class Measured:
    """What came out for one architecture.

    ``outcome`` is "right"; "refused" (a GradsketchError, in ``message``); "wrong"; "crashed" (any other error, the end
    of the process or of the time); or "broken", where plain torch cannot run the entry either. ``error`` is the largest
    relative error of a row's gradient against autograd on that row alone, ``worst`` the parameter that is furthest off.
    ``slow`` maps each slow parameter to the module and operation that made it slow, ``fast_share`` is the share of all
    entries that are not slow.
    """

    name: str
    outcome: Outcome
    error: float | None = None
    worst: str = ""
    message: str = ""
    parameters: int = 0
    fast_share: float = 0.0
    slow: Mapping[str, str] = ()  # type: ignore[assignment]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return every field, for JSON."""
        return {**asdict(self), "slow": dict(self.slow)}


def unmeasured(architecture: Architecture, outcome: Outcome, message: str) -> Measured:
    """Return what is known of an architecture whose process ended early."""
    return Measured(architecture.name, outcome, message=message, slow={})


def measure(architecture: Architecture) -> Measured:
    """Measure one architecture; with both implementations of experts where it has any."""
    start = time.perf_counter()
    try:
        found = [_run(architecture, architecture.dtype, "eager")]
        if _has_experts(architecture):
            found.append(_run(architecture, torch.float32, "grouped_mm"))
    except Exception as error:  # whatever plain torch raises: the entry is at fault, not the library
        return unmeasured(architecture, "broken", _told(error))
    worst = min(found, key=lambda m: _WORST_FIRST.index(m.outcome))
    slowest = min(found, key=lambda m: m.fast_share)
    return replace(
        worst, fast_share=slowest.fast_share, slow=slowest.slow, seconds=round(time.perf_counter() - start, 2)
    )


def _run(architecture: Architecture, dtype: torch.dtype, experts: str) -> Measured:
    model = architecture.build(dtype, experts)
    parameters = gs.Parameters(model)
    cases = list(_cases(model, architecture, dtype))
    sketcher = gs.GradientSketcher(model, architecture.task, _Everything(parameters.n), parameters=parameters)
    outcome: Outcome = "right"
    error, worst, message = 0.0, "", ""
    with warnings.catch_warnings(action="ignore"):
        try:
            for batch, exact in cases:
                got = sketcher(batch).values.detach().to(exact.dtype)
                if (this := _error(got, exact)) >= error:
                    error, worst = this, _furthest(parameters, got - exact)
        except gs.GradsketchError as refusal:
            outcome, message = "refused", str(refusal)
        except Exception as crash:
            outcome, message = "crashed", _told(crash)
    if outcome == "right" and not error <= TOLERANCE[dtype]:
        outcome = "wrong"
    slow = _slow(sketcher)
    entries = sum(parameters.shapes[name].numel() for name in slow)
    return Measured(
        architecture.name,
        outcome,
        None if message else error,
        worst if outcome == "wrong" else "",
        message,
        parameters.n,
        1 - entries / parameters.n,
        slow,
    )


def _cases(model: nn.Module, architecture: Architecture, dtype: torch.dtype) -> Iterator[tuple[gs.Batch, Tensor]]:
    """Yield batches with their rows' exact gradients: the first one teaches, then one of its rows, then another one."""
    first, second = architecture.inputs(dtype)
    exact = _alone(model, architecture.task, first)
    yield first, exact
    yield batch_slice(first, 1, 2), exact[1:2]
    yield second, _alone(model, architecture.task, second)


def _alone(model: nn.Module, task: gs.Task, batch: gs.Batch) -> Tensor:
    """Return the gradient of each row, run alone by plain autograd on a copy that nothing was run on."""
    rows = []
    for i in range(batch_length(batch)):
        fresh = copy.deepcopy(model)
        task.losses(fresh, batch_slice(batch, i, i + 1)).sum().backward()
        rows.append(torch.cat([_gradient(p).reshape(-1) for _, p in gs.Parameters(fresh)]))
    return torch.stack(rows)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _error(got: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of a row; a row that is zero is measured by the largest one."""
    norms = exact.norm(dim=1)
    return float(((got - exact).norm(dim=1) / norms.clamp_min(1e-9 * float(norms.max()))).max())


def _furthest(parameters: gs.Parameters, difference: Tensor) -> str:
    parts = parameters.unflatten(difference)
    return max(parts, key=lambda name: float(parts[name].norm()))


def _slow(sketcher: gs.GradientSketcher) -> dict[str, str]:
    slow = getattr(sketcher, "slow", None)
    return dict.fromkeys(sorted(sketcher._capture._slow), "unknown") if slow is None else dict(slow)


def _has_experts(architecture: Architecture) -> bool:
    return bool(architecture._class()._can_set_experts_implementation())


def _told(error: Exception) -> str:
    """Return type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Everything(Sketch):
    """The sketch that keeps everything."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n)

    def options(self) -> dict[str, str | int | float | bool]:
        return {}

    def _apply(self, x: Tensor) -> Tensor:
        return x.clone()

    _apply_adjoint = _apply
