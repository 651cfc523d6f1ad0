"""The kinds of score, each with its formula and units."""

from __future__ import annotations

from dataclasses import dataclass

from gradsketch.attribution.results import Score
from gradsketch.errors import InputError

__all__ = ["KINDS", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """How a score is made: from unit-length gradients or as they are, with or without (F + λI)⁻¹."""

    name: str
    unit_length: bool
    preconditioned: bool
    formula: str
    units: str

    def described(self, damping: float | None) -> Score:
        """Return what goes into results."""
        return Score(self.name, self.formula, self.units, damping if self.preconditioned else None, self.unit_length)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("dot", False, False, "qᵀx", "change of the query's loss per unit of learning rate, in nats"),
        Kind("cosine", True, False, "qᵀx / ‖q‖‖x‖", "cosine of the angle between the gradients, from -1 to 1"),
        # Koh and Liang 2017, equation 2, with the empirical Fisher matrix for the Hessian: F = XᵀX / N.
        Kind(
            "influence",
            False,
            True,
            "qᵀ(F + λI)⁻¹x / N, F = XᵀX / N",
            "estimated rise of the query's loss when the example is left out, in nats",
        ),
        # Park et al. 2023 (TRAK), equation 17, on unit-length gradients: by the push-through identity these are the
        # coefficients of a ridge regression of the query's gradient on those of all training examples.
        Kind(
            "ridge",
            True,
            True,
            "q̂ᵀ(F + λI)⁻¹x̂ / N, F = X̂ᵀX̂ / N, unit-length q̂, x̂",
            "the example's weight when the query's gradient is rebuilt from all training gradients",
        ),
    )
}


def kind_of(name: str) -> Kind:
    """Return the kind of score with this name.

    Raises:
        InputError: there is none.
    """
    if name not in KINDS:
        raise InputError(f"score={name!r}", f"one of {', '.join(KINDS)}", 'Pass score="ridge"')
    return KINDS[name]
