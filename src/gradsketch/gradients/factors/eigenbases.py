"""The metric of a parameter in the eigenbases of its two sides, and from there to damped roots (A + λI)^(−1/2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradsketch.gradients.factors.moments import SideMoments
from gradsketch.linear_map import widened
from gradsketch.sketches.roots import Pair, Root, Stack

__all__ = ["MatrixSpectrum", "ParameterSpectrum", "SideSpectrum", "damped_roots", "own_or_mean", "spectrum_of"]


@dataclass(frozen=True)
class SideSpectrum:
    """Eigenvalues of F's trace over the other side; without ``vectors`` they belong to the entries themselves."""

    values: Float[Tensor, " n"]
    vectors: Float[Tensor, "n n"] | None

    def root(self, scale: float, share: float) -> Tensor:
        """Return (A + λI)^(−1/2), A scaled, with λ the share of its mean eigenvalue; a lone number is not damped."""
        values = self.values.clamp_min(0) * scale
        if len(values) == 1:
            return values[0] ** -0.5
        values = (values + share * values.mean()) ** -0.5
        return values if self.vectors is None else (self.vectors * values) @ self.vectors.mT


@dataclass(frozen=True)
class MatrixSpectrum:
    """F ≈ A ⊗ B / trace of a matrix; the trace is zero where there was no gradient."""

    rows: SideSpectrum
    columns: SideSpectrum
    trace: float

    @property
    def size(self) -> int:
        """Entries of the matrix."""
        return len(self.rows.values) * len(self.columns.values)

    def pair(self, damping: float, level: float) -> Pair:
        """Return the damped roots; λ_A λ_B is the fraction ``damping`` of the mean eigenvalue ``level``."""
        sides = (self.rows, self.columns)
        each = 1 / max(1, sum(len(side.values) > 1 for side in sides))
        share = (damping * level * self.size / self.trace) ** each
        return Pair(*(Root(side.root(self.trace**-0.5, share)) for side in sides))


@dataclass(frozen=True)
class ParameterSpectrum:
    """One matrix; or those of a stack, each of ``height`` rows."""

    matrices: tuple[MatrixSpectrum, ...]
    height: int | None = None


def spectrum_of(moments: SideMoments, examples: int) -> ParameterSpectrum:
    """Return eigenvalues and eigenvectors of both sides, from the moments of so many examples."""
    if not moments.parts:
        return ParameterSpectrum((_matrix_spectrum(moments, examples),))
    height = next(iter(moments.parts.values())).rows
    parts = (moments.part(index, height) for index in range(moments.rows))
    return ParameterSpectrum(tuple(_matrix_spectrum(part, examples) for part in parts), height)


def _matrix_spectrum(moments: SideMoments, examples: int) -> MatrixSpectrum:
    sides = moments.sides(examples)
    if sides is None:
        rows, columns = (
            SideSpectrum(torch.zeros(n, dtype=torch.float32, device="cpu"), None)
            for n in (moments.rows, moments.columns)
        )
        return MatrixSpectrum(rows, columns, 0.0)
    return MatrixSpectrum(_side_spectrum(sides.rows), _side_spectrum(sides.columns), sides.trace)


def _side_spectrum(side: Tensor) -> SideSpectrum:
    return SideSpectrum(*torch.linalg.eigh(side.double())) if side.ndim == 2 else SideSpectrum(side.double(), None)


def damped_roots(
    spectra: Mapping[str, ParameterSpectrum], damping: float, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Pair | Stack]:
    """Return P = F^(−1/2) of every parameter in its own dtype or a wider one, with F ≈ A ⊗ B / tr F.

    A side's λ is √damping times its mean eigenvalue, so that both together have the fraction ``damping`` of the mean
    eigenvalue of F; of a vector the only side has all of it. For a stack the mean is that of all its matrices, because
    an expert that few examples use must not outweigh the others.

    A parameter whose gradients are zero up to rounding, as those of keys' biases in attention are, or that no example
    uses, has no metric of its own: to divide by it would turn noise into signal. It is damped by the mean of all
    parameters, or scaled by it where there was no gradient at all.
    """
    mean = _level([matrix for spectrum in spectra.values() for matrix in spectrum.matrices])
    roots: dict[str, Pair | Stack] = {}
    for name, spectrum in spectra.items():
        dtype = dtypes[name]
        level = own_or_mean(_level(spectrum.matrices), mean, dtype)
        pairs = tuple(
            _in(widened(dtype), m.pair(damping, level) if m.trace > 0 else _scaled(level)) for m in spectrum.matrices
        )
        roots[name] = pairs[0] if spectrum.height is None else Stack(pairs, spectrum.height)
    return roots


def own_or_mean(level: float, mean: float, dtype: torch.dtype) -> float:
    """Return a parameter's mean eigenvalue, or that of all where its own is zero up to the rounding of gradients."""
    return level if level > mean * torch.finfo(dtype).eps ** 1.5 else mean


def _level(matrices: Sequence[MatrixSpectrum]) -> float:
    """Return the mean eigenvalue of F over some matrices."""
    return sum(matrix.trace for matrix in matrices) / sum(matrix.size for matrix in matrices)


def _scaled(level: float) -> Pair:
    return Pair(
        Root(torch.tensor((level or 1.0) ** -0.5, dtype=torch.float32, device="cpu").double()),
        Root(torch.tensor(1.0, dtype=torch.float32, device="cpu").double()),
    )


def _in(dtype: torch.dtype, pair: Pair) -> Pair:
    return Pair(Root(pair.rows.values.to(dtype)), Root(pair.columns.values.to(dtype)))
