"""(F + λI)⁻¹ on whole gradients, with F as EK-FAC has it: what exact scores of a few rows are made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.gradients.factors.corrected import EigenMoments, Entries
from gradsketch.gradients.factors.eigenbases import ParameterSpectrum, own_or_mean
from gradsketch.gradients.factors.estimation import DAMPING, Estimation, Labels, Options, check_damping
from gradsketch.gradients.parameters import Selection
from gradsketch.gradients.tasks import TaskLike
from gradsketch.linear_map import LinearMap, widened
from gradsketch.transforms.precision import full_precision

__all__ = ["InverseFisher", "inverse_fisher"]


def inverse_fisher(
    model: nn.Module,
    task: TaskLike,
    data: Any,
    *,
    parameters: Selection = None,
    damping: float = DAMPING,
    labels: Labels = "sampled",
    seed: int = 0,
    batch_tokens: int = 4096,
    advance: Callable[[int], Any] = lambda count: None,
) -> InverseFisher:
    """Estimate (F + λI)⁻¹ by EK-FAC: a self-adjoint map on flat gradients ``[..., n]``.

    F ≈ (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ for each parameter, with the eigenbases U and V of K-FAC's two sides and Λ_ij =
    E (Uᵀ X V)_ij² over the data. λ is the fraction ``damping`` of the mean of Λ. Unlike the factors of :func:`ekfac`
    this keeps all of Λ, n numbers, so it acts on gradients that are formed, not on a layer's factors.

    The arguments are those of :func:`kfac`; ``advance`` hears of every example twice.

    Source: T. George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS
    2018; R. Grosse et al., "Studying Large Language Model Generalization with Influence Functions", 2023, section 3.1.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> inverse = gs.inverse_fisher(model, task, data)
        >>> inverse(gs.loss_gradient(model, task, data)).shape
        torch.Size([42])

    Raises:
        InputError, NonFiniteError: as ``kfac``.
    """
    options = Options(damping, labels, seed)
    estimation = Estimation(model, task, data, parameters, options, batch_tokens, advance)
    squares = estimation.squares(estimation.spectra(), Entries)
    with torch.no_grad():
        return InverseFisher(
            {name: estimation.tensors[name].shape for name in squares},
            {name: _spectrum(part, estimation.examples) for name, part in squares.items()},
            damping,
        )


@dataclass(frozen=True)
class _Matrix:
    """One matrix's part: bases of both sides (None: the entries themselves) and Λ."""

    rows: Tensor | None
    columns: Tensor | None
    values: Float[Tensor, "rows columns"]

    def divided(self, x: Float[Tensor, "b rows columns"], shift: float) -> Float[Tensor, "b rows columns"]:
        """Return U ((Uᵀ x V) / (Λ + λ)) Vᵀ."""
        turned = _right(_right(x, self.columns).mT, self.rows).mT / (self.values.to(x) + shift)
        return _right(_right(turned, _transposed(self.columns)).mT, _transposed(self.rows)).mT


class InverseFisher(LinearMap):
    """(F + λI)⁻¹ over named parameters: see :func:`inverse_fisher`."""

    is_self_adjoint = True

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], matrices: Mapping[str, Sequence[_Matrix]], damping: float
    ) -> None:
        self.shapes, self.damping = {name: tuple(shape) for name, shape in shapes.items()}, damping
        self._sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.shape = (sum(self._sizes), sum(self._sizes))
        self._matrices = matrices
        levels = {name: _mean([m.values for m in parts]) for name, parts in matrices.items()}
        mean = _mean([m.values for parts in matrices.values() for m in parts])
        self._shifts = {
            name: damping * own_or_mean(level, mean, matrices[name][0].values.dtype) for name, level in levels.items()
        }

    def damped(self, damping: float) -> InverseFisher:
        """Return the map with another λ, of the same estimate.

        Raises:
            InputError: a damping that is not positive.
        """
        check_damping(damping)
        return InverseFisher(self.shapes, self._matrices, damping)

    def _apply(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        x = x.to(widened(x.dtype))
        with full_precision(x.device):
            parts = zip(self.shapes, x.split(self._sizes, dim=1), strict=True)
            return torch.cat([self._divided(name, part) for name, part in parts], dim=1)

    def _apply_adjoint(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return self._apply(w)

    def _divided(self, name: str, flat: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        matrices, shift = self._matrices[name], self._shifts[name]
        stack = flat.unflatten(1, (len(matrices), *matrices[0].values.shape))
        return torch.stack([m.divided(stack[:, i], shift) for i, m in enumerate(matrices)], dim=1).flatten(1)


def _spectrum(moments: EigenMoments[Entries], examples: int) -> list[_Matrix]:
    return [_matrix(part.spectrum, part.sums, examples) for part in moments.matrices()]


def _matrix(spectrum: ParameterSpectrum, sums: Entries | None, examples: int) -> _Matrix:
    rows, columns = spectrum.matrices[0].rows, spectrum.matrices[0].columns
    values = (
        torch.zeros(len(rows.values), len(columns.values), dtype=torch.float32, device="cpu")
        if sums is None
        else sums.matrix / examples
    )
    dtype = values.dtype
    bases = [None if side.vectors is None else side.vectors.to(dtype) for side in (rows, columns)]
    return _Matrix(bases[0], bases[1], values)


def _mean(values: Sequence[Tensor]) -> float:
    return float(sum(v.double().sum() for v in values)) / max(1, sum(v.numel() for v in values))


def _right(x: Float[Tensor, "b m n"], basis: Tensor | None) -> Float[Tensor, "b m n"]:
    return x if basis is None else x @ basis.to(x)


def _transposed(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT
