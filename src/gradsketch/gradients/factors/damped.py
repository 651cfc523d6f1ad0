"""From second moments to roots: (A + λI)^(−1/2) on each side of a parameter, and what stands in where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradsketch.gradients.factors.moments import SideMoments, Sides
from gradsketch.linear_map import widened
from gradsketch.sketches.roots import Pair, Root, Stack

__all__ = ["damped_roots"]


def damped_roots(
    moments: Mapping[str, SideMoments], examples: int, damping: float, dtype: torch.dtype
) -> dict[str, Pair | Stack]:
    """Return P = F^(−1/2) of every parameter, with F ≈ A ⊗ B / tr F from the moments of so many examples.

    A side's λ is √damping times its mean eigenvalue, so that both together have the fraction ``damping`` of the mean
    eigenvalue of F; of a vector the only side has all of it. For a stack the mean is that of all its matrices, because
    an expert that few examples use must not outweigh the others.

    A parameter whose gradients are zero up to rounding, as those of keys' biases in attention are, or that no example
    uses, has no metric of its own: to divide by it would turn noise into signal. It is scaled as the mean parameter is.
    """
    matrices = {name: _matrices(part) for name, part in moments.items()}
    found = {name: [(m, m.sides(examples)) for m in listed] for name, listed in matrices.items()}
    mean = _level([pair for listed in found.values() for pair in listed])
    floor = mean * torch.finfo(dtype).eps ** 1.5
    roots: dict[str, Pair | Stack] = {}
    for name, listed in found.items():
        level = _level(listed)
        level = level if level > floor else mean
        pairs = tuple(_pair(m, sides, damping, level, floor, dtype) for m, sides in listed)
        roots[name] = Stack(pairs, listed[0][0].rows) if moments[name].parts else pairs[0]
    return roots


def _matrices(moments: SideMoments) -> list[SideMoments]:
    """Return the matrices that a parameter is made of: itself, or those of a stack."""
    if not moments.parts:
        return [moments]
    height = next(iter(moments.parts.values())).rows
    return [moments.part(index, height) for index in range(moments.rows)]


def _level(found: Sequence[tuple[SideMoments, Sides | None]]) -> float:
    """Return the mean eigenvalue of F over some matrices."""
    trace = sum(sides.trace for _, sides in found if sides is not None)
    return trace / sum(m.rows * m.columns for m, _ in found)


def _pair(
    matrix: SideMoments, sides: Sides | None, damping: float, level: float, floor: float, dtype: torch.dtype
) -> Pair:
    size = matrix.rows * matrix.columns
    if sides is None or sides.trace <= floor * size:
        return Pair(Root(_scalar((level or 1.0) ** -0.5, dtype)), Root(_scalar(1.0, dtype)))
    each = 1 / sum(side > 1 for side in (matrix.rows, matrix.columns)) if size > 1 else 1.0
    share = (damping * level * size / sides.trace) ** each
    scale = sides.trace**-0.5
    return Pair(*(Root(_inverse_root(side * scale, share).to(widened(dtype))) for side in (sides.rows, sides.columns)))


def _inverse_root(side: Tensor, share: float) -> Tensor:
    """Return (A + λI)^(−1/2) in float64, with λ the share of A's mean eigenvalue; a single number is not damped."""
    side = side.double()
    if side.ndim < 2:
        return (side + share * side.mean()) ** -0.5 if len(side) > 1 else side[0] ** -0.5
    values, vectors = torch.linalg.eigh(side)
    values = values.clamp_min(0)
    if len(values) > 1:
        values = values + share * values.mean()
    root: Tensor = (vectors * values**-0.5) @ vectors.mT
    return root


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=widened(dtype))
