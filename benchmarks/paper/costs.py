"""Time and memory of sketched gradients and sketched Hessian-vector products, explicit and implicit, in one run.

Explicit: the gradient (or product) is formed, then sketched. Implicit: the gradient (or product) of
w ↦ L(theta0 + Phiᵀ w) at w = 0, by a Subspace, whose lift is done anew every time. Both give the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hvp_cost import gpt2, gradient, losses
from record import interleaved_rounds, peak_bytes
from torch import Tensor, nn

import gradsketch as gs
from benchmarks.paper.numbers import Interval, median, ratio
from benchmarks.paper.table import Results, Size, pick

__all__ = ["KINDS", "NEW", "Case", "case", "measured", "named"]

Job = Callable[[], Any]
# What the paper calls H, Q and FFT: the transform before the fold.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "FJL": ("FJL", {}),
    "FFD": ("FFD", {}),
    "AFFD H": ("AFFD", {"form": "paper"}),
    "AFFD Q": ("AFFD", {"form": "paper", "transform": "haar"}),
    "AFFD FFT": ("AFFD", {"form": "paper", "transform": "fft"}),
    "AFJL H": ("AFJL", {"form": "paper"}),
    "AFJL Q": ("AFJL", {"form": "paper", "transform": "haar"}),
    "AFJL FFT": ("AFJL", {"form": "paper", "transform": "fft"}),
    "QK": ("QK", {}),
    "AFFD": ("AFFD", {}),
    "AFJL": ("AFJL", {}),
    "SJLT": ("SJLT", {}),
    "BlockSum": ("BlockSum", {}),
}
NEW = ("AFFD", "AFJL", "SJLT", "BlockSum")


@dataclass(frozen=True)
class Case:
    """A model, a batch of which each half is a pass of its own, and a sketch size."""

    model: nn.Module
    batch: dict[str, Tensor]
    d: int

    @property
    def n(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def rows(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids} for ids in self.batch["input_ids"]]

    def sketch(self, kind: str) -> gs.Sketch:
        name, options = KINDS[kind]
        if name == "BlockSum":
            return gs.BlockSum(gs.Parameters(self.model), self.d)
        built: gs.Sketch = getattr(gs, name)(self.n, self.d, **options)
        return built


def case(size: Size) -> Case:
    """Return a GPT-2 of 6.9 M parameters and 2 × 128 tokens (quick: 1.06 M, 2 × 64); on a GPU GPT-2 small itself.

    Two sequences, because attribution sketches one example at a time: a large batch would hide what a sketch costs.
    """
    if size == "tiny":
        from spectrum_dimension import trained

        model, batch, _ = trained(1, 8)
        return Case(model, {"input_ids": batch["input_ids"][:2]}, 64)
    if size == "quick":
        model, batch = gpt2(False)
        return Case(model, {"input_ids": batch["input_ids"][:2]}, 1 << 12)
    from gradient_workloads import gpt2_small, w1

    work = gpt2_small() if torch.cuda.is_available() else w1()
    work.model.float().set_attn_implementation("eager")
    return Case(work.model, {"input_ids": work.batches(2)[0]["input_ids"]}, 1 << 16)


@cache
def measured(size: Size, what: str) -> Results:
    """Time ``what`` ("gradient" or "product") for every kind, both ways, in turn; peaks in vectors of n numbers.

    Tables of the same jobs share one measurement where they are run together.
    """
    here = case(size)
    kinds, rounds = ("QK",) if size == "tiny" else tuple(KINDS), pick(size, 1, 3, 3)
    jobs = {"gradient": gradient_jobs, "product": product_jobs}[what](here, kinds)
    seconds = interleaved_rounds(jobs, rounds)
    return {
        "n": here.n,
        "d": here.d,
        "tokens": list(here.batch["input_ids"].shape),
        "rounds": rounds,
        "seconds": seconds,
        "peak_vectors": {name: vectors(job, here.n) for name, job in jobs.items()},
    }


def gradient_jobs(here: Case, kinds: Sequence[str]) -> dict[str, Job]:
    jobs: dict[str, Job] = {"plain": lambda: gradient(here.model, [here.batch])}
    for kind in kinds:
        phi, space = here.sketch(kind), subspace(here, kind)
        jobs[f"{kind} explicit"] = lambda phi=phi: phi(gs.loss_gradient(here.model, losses, here.batch))
        jobs[f"{kind} implicit"] = lambda space=space: implicit_gradient(space, here.batch)
    return jobs


def subspace(here: Case, kind: str) -> gs.Subspace:
    model = copy.deepcopy(here.model)  # one Subspace at a time may have a model open
    return gs.Subspace(model, gs.Parameters(model), here.sketch(kind))


def implicit_gradient(space: gs.Subspace, batch: dict[str, Tensor]) -> Tensor:
    lifted_anew(space)
    (found,) = torch.autograd.grad(losses(space, batch).mean(), space.w)
    return found


def lifted_anew(space: gs.Subspace) -> None:
    """Have the next pass lift w again: a Subspace does so only where w has been written to."""
    with torch.no_grad():
        space.w.zero_()


def product_jobs(here: Case, kinds: Sequence[str]) -> dict[str, Job]:
    """Return products over two batches, so that no graph is kept from one product to the next."""
    half = len(here.rows) // 2
    v = torch.randn(here.d, generator=torch.Generator().manual_seed(0)).to(here.batch["input_ids"].device)
    halves = [{"input_ids": part} for part in here.batch["input_ids"].chunk(2)]
    H = gs.hessian(here.model, losses, here.rows, batch_size=half)
    x = here.sketch("AFFD").lift(v)
    jobs: dict[str, Job] = {"plain": lambda: gradient(here.model, halves), "whole": lambda: H(x)}
    for kind in kinds:
        phi, space = here.sketch(kind), subspace(here, kind)
        inner = gs.hessian(space, losses, here.rows, batch_size=half)
        jobs[f"{kind} explicit"] = lambda phi=phi: phi(H(phi.lift(v)))
        jobs[f"{kind} implicit"] = lambda space=space, inner=inner: implicit_product(space, inner, v)
    return jobs


def implicit_product(space: gs.Subspace, inner: gs.LinearMap, v: Tensor) -> Tensor:
    lifted_anew(space)
    found: Tensor = inner(v)
    return found


def vectors(job: Job, n: int) -> float | None:
    peak = peak_bytes(job)
    return None if peak is None else peak / 4 / n


def named(kind: str) -> str:
    """Return a kind as the page writes it: in bold where it is not the paper's."""
    return f"**{kind}**" if kind in NEW else kind


def milliseconds(results: Results, job: str) -> Interval:
    return median(results["seconds"][job], 1e3)


def times_plain(results: Results, job: str) -> Interval:
    return ratio(results["seconds"], job, "plain")
