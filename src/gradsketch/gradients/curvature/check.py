"""Hold products against central differences of gradients, which need first derivatives only.

Symmetry is no proof: what a hand-written backward pass loses is often symmetric itself. A difference at one step is no
proof either, because of rounding, truncation and kinks. So a product counts as right where it agrees with a difference
at any step, and as wrong only where two steps agree with each other and not with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradsketch.gradients.curvature.differences import Scheme, schemes, steps_for
from gradsketch.gradients.curvature.failures import WrongDerivativeError
from gradsketch.gradients.curvature.gradient import add_gradients
from gradsketch.gradients.curvature.graph import causes, narrowest
from gradsketch.gradients.curvature.leaves import Leaves
from gradsketch.gradients.curvature.objective import Objective
from gradsketch.linear_map import widened
from gradsketch.random import Stream
from gradsketch.stand_ins import held, read_instead

__all__ = ["Check", "calibrated", "examined"]

# Largest error of a parameter's rows that rounding explains, by the weights' precision. Rows that are small beside the
# whole product are measured by a share of it, _SHARE, or rounding would count as an error of theirs.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-3}
_HALF_TOLERANCE = 0.2
_SHARE, _HALF_SHARE = 1e-3, 0.1
# A product shorter than this share of the gradient is zero: differences cannot see it.
_NOTHING = 1e-8
# Differences whose two steps agree as well as this need no better scheme.
_GOOD = 1e-6
# Agreement as close as this is rounding of float32; what is less close may be noise of the difference.
_CLOSE = 1e-5
# Products a direction is multiplied by to lean towards the leading eigenvectors, where steps truncate most.
_POWER_STEPS = 4


@dataclass(frozen=True)
class Check:
    """What an operator's products were found to be, on the first batch and those with other operations.

    ``error`` is the largest |Hv − D| / |D| along a random and a leading direction, D a central difference of gradients
    (where products are differences themselves: one with longer steps). It bounds rounding, truncation and kinks.
    ``note`` says what a user should know, and is empty where all is well.
    """

    mode: str
    error: float
    scheme: str
    conclusive: bool = True
    note: str = ""


@runtime_checkable
class Products(Protocol):
    """What is checked: products over one batch, exact and by differences."""

    objective: Objective
    mode: Any

    def values(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the parameters."""

    def multiply_exactly(self, x: Tensor, out: Tensor, dtype: torch.dtype | None = None) -> tuple[int, bool]:
        """Add products by differentiating twice."""

    def difference(self, vector: Tensor, scheme: Scheme) -> tuple[Tensor, int, bool]:
        """Return a product by central differences."""


def examined(products: Products, suspected: set[str]) -> tuple[Check, Scheme | None]:
    """Compare exact products with differences along a random and the leading direction.

    Returns the check, and the scheme whose differences agreed.

    Raises:
        WrongDerivativeError: the products are wrong; the message says by how much, where, and what may be the cause.
    """
    return _Examination(products, suspected).result()


def calibrated(products: Products) -> tuple[Scheme, Check]:
    """Return the scheme whose differences change least with the step, along a random and the leading direction."""
    compare = _Comparison(products)
    vector = compare.direction("check")
    scheme, error = _best(compare, vector)
    leading = compare.leading(vector, lambda v: products.difference(v, scheme)[0])
    worst = max(error, _visible(_change(compare, leading, scheme)))
    if worst > _GOOD:
        other, other_error = _best(compare, leading)
        other_worst = max(other_error, _visible(_change(compare, vector, other)))
        scheme, worst = (other, other_worst) if other_worst < worst else (scheme, worst)
    note = "" if worst <= _VISIBLE else _unsteady(worst)
    skew = 0.0 if note else _asymmetry(compare, scheme)
    if skew > max(_VISIBLE, _SKEW_OF_ERROR * worst):
        note = (
            f"differences are asymmetric by {skew:.1%}: {_NO_FUNCTION}. They see it move; mode='auto' holds it"
            " constant, as autograd does"
        )
    return scheme, Check("central-difference", max(worst, skew if note else 0.0), str(scheme), not note, note)


# What detaching does to gradients.
_NO_FUNCTION = (
    "the gradients belong to no function, for something that depends on the weights is detached or rounded on its way"
    " to the loss"
)
# Asymmetry that errors of differences explain, in units of these.
_SKEW_OF_ERROR = 10
# What a difference of zero counts as: inner rounding may have swallowed the step, so any other scheme is better.
_VANISHES = 1e9
# An error from which on a user is told.
_VISIBLE = 0.01


def _unsteady(change: float) -> str:
    return (
        f"central differences of gradients change by {change:.1%} with the length of their steps: the loss has kinks"
        " (ReLU, max, rounding) or computes in less precision than its weights have"
    )


def _asymmetry(compare: _Comparison, scheme: Scheme) -> float:
    """Return |D − Dᵀ| / |D| for differences D, from three random directions: <u, Dv> = <v, Du> where D is a Hessian."""
    directions = [compare.direction(name) for name in ("first", "second", "third")]
    found = [compare.products.difference(v, scheme)[0].double() for v in directions]
    pairs = ((0, 1), (0, 2), (1, 2))
    total = compare.space.ranks.sum
    wide = [v.double() for v in directions]
    gaps = [abs(total(float(wide[i] @ found[j] - wide[j] @ found[i]))) for i, j in pairs]
    if any(compare.vanishes(product) for product in found):
        return 0.0
    size = max(compare.space.length(product) for product in found)
    return max(gaps) * math.sqrt(compare.space.n) / size


def _best(compare: _Comparison, vector: Tensor) -> tuple[Scheme, float]:
    found: list[tuple[float, int, Scheme]] = []
    failure: RuntimeError | None = None
    for place, scheme in enumerate(compare.schemes):
        try:
            with compare.space.ranks.together():
                found.append((_change(compare, vector, scheme), place, scheme))
        except RuntimeError as error:  # a kernel or a layer that knows no float64
            failure = error
        following = compare.schemes[place + 1 : place + 2]
        good_enough = found and (found[-1][0] <= _GOOD or (following and following[0].dtype != scheme.dtype))
        if good_enough and math.isfinite(min(found)[0]):  # some models are finite in their own precision alone
            break
    if not found:
        assert failure is not None
        raise failure
    change, _, scheme = min(found)
    return scheme, _visible(change)


def _visible(change: float) -> float:
    return 0.0 if change == _VANISHES else change


def _change(compare: _Comparison, vector: Tensor, scheme: Scheme) -> float:
    """Return the relative change of a difference when its steps are doubled."""
    short, long = (compare.products.difference(vector, s)[0] for s in (scheme, scheme.doubled))
    change = compare.total(long, short)
    if compare.vanishes(short):
        return _VANISHES
    return change if math.isfinite(change) else math.inf


class _Comparison:
    """Directions, schemes and distances for one set of products."""

    def __init__(self, products: Products) -> None:
        self.products, objective = products, products.objective
        self.space = objective.space
        values = products.values()
        self.names, self._sizes = objective.parameters.names, [value.numel() for value in values]
        self.narrows = _narrows(objective, values)
        self.schemes = schemes(list(held(objective.model).values()), values[0].dtype)
        # The narrowest of the weights decides what rounding explains, those that an open Subspace moves among them.
        moved = [r.parameter for r in read_instead(objective.model).values() if r.parameter is not None]
        self.dtype = max((value.dtype for value in (*values, *moved)), key=lambda dtype: torch.finfo(dtype).eps)
        self._padding = _padding_rows(objective)
        slope = torch.zeros(sum(self._sizes), dtype=widened(self.dtype), device=values[0].device)
        add_gradients(objective, Leaves(values), slope)
        self.slope = self.space.length(slope)
        self.nothing = _NOTHING * self.slope

    def steps_along(self, product: Tensor) -> tuple[Scheme, ...]:
        """Return schemes to try first along a direction whose product is this, where float64 gains nothing."""
        if not self.narrows or self.vanishes(product):
            return ()
        return steps_for(self.slope / self.space.length(product))

    def direction(self, name: str) -> Tensor:
        """Return a random unit vector."""
        value = self.products.values()[0]
        stream = Stream(0, "curvature", name)
        dtype, device = widened(value.dtype), value.device
        return self._unit(self.space.drawn(partial(stream.normals, dtype=dtype, device=device)))

    def leading(self, vector: Tensor, product: Any) -> Tensor:
        """Return a unit vector that leans towards the leading eigenvectors: a few power steps."""
        for _ in range(_POWER_STEPS):
            following = product(vector).to(vector.dtype)
            length = self.space.length(following)
            if not math.isfinite(length) or length <= self.nothing:
                return vector
            vector = self._unit(following)
            del following
        return vector

    def is_finite(self, vector: Tensor) -> bool:
        """Whether a vector holds finite numbers only."""
        return self.space.ranks.all(bool(torch.isfinite(vector).all()))

    def vanishes(self, vector: Tensor) -> bool:
        """Whether a product is too short for differences to see."""
        return self.space.length(vector) <= self.nothing

    def total(self, came: Tensor, wanted: Tensor) -> float:
        """Return the relative error of a whole product."""
        length = self.space.length(wanted)
        error = math.hypot(*self._distances(came, wanted))
        return error / length if length > self.nothing else 0.0 if error <= self.nothing else math.inf

    def worst(self, came: Tensor, wanted: Tensor) -> tuple[float, str]:
        """Return the largest relative error of one parameter's rows, and the parameter."""
        errors = self._distances(came, wanted)
        if math.hypot(*errors) <= self.nothing:
            return 0.0, self.names[0]
        lengths = self.space.lengths(wanted.split(self._sizes))
        floor = self._share * math.hypot(*lengths)
        rows = zip(errors, lengths, self.names, strict=True)
        return max((_relative(error, length + floor), name) for error, length, name in rows)

    def _distances(self, came: Tensor, wanted: Tensor) -> list[float]:
        """Return the length of each parameter's difference, without a vector of length n."""
        pairs = zip(came.split(self._sizes), wanted.split(self._sizes), strict=True)
        return self.space.lengths(a - b for a, b in pairs)

    @property
    def _share(self) -> float:
        return _SHARE if self.dtype in _TOLERANCE else _HALF_SHARE

    @property
    def tolerance(self) -> float:
        """What rounding in the weights' own precision explains."""
        return _TOLERANCE.get(self.dtype, _HALF_TOLERANCE)

    def _unit(self, vector: Tensor) -> Tensor:
        """Make a vector one of length one that moves no frozen row, in place."""
        for place, entries in self._padding:
            vector.split(self._sizes)[place][entries] = 0.0
        return vector.div_(self.space.length(vector))


def _narrows(objective: Objective, values: list[Tensor]) -> bool:
    """Whether the loss computes in less than float64 though the weights are of it, as norms in float32 make it."""
    if values[0].dtype == torch.float64:
        return False
    # What the weights are matters to few models: one number stands for all, without a copy of the model.
    alike = [value.new_full((), 0.01, dtype=torch.float64).expand(value.shape) for value in values]
    found = _narrowest(objective, alike)
    found = found or _narrowest(objective, [value.double() for value in values])
    return objective.ranks.any(found != torch.float64)


def _narrowest(objective: Objective, values: list[Tensor]) -> torch.dtype | None:
    """Return the least exact dtype that the loss computes in at these weights, or None where it cannot."""
    try:
        with objective.ranks.together(), objective.at(Leaves(values).tensors) as losses_of:
            return narrowest([losses_of(next(objective.batches())).grad_fn])
    except Exception:  # a layer that knows no float64, too little memory, or the user's own check of the weights
        return None


def _relative(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf


def _padding_rows(objective: Objective) -> list[tuple[int, slice]]:
    """Return where rows lie that embeddings freeze: their gradient is zero, though a step along them moves the output.

    Each as the place of the parameter and the entries of it that this process holds.
    """
    places = {id(tensor): place for place, (_, tensor) in enumerate(objective.parameters)}
    return [
        (places[id(weight)], objective.space.row(places[id(weight)], weight.shape, module.padding_idx))
        for module in objective.model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
        for weight in [module._parameters["weight"]]
        if weight is not None and id(weight) in places
    ]


class _Tried(NamedTuple):
    scheme: Scheme
    total: float
    error: float
    name: str
    difference: Tensor | None  # where it may be proof


class _Examination:
    """Exact products against differences, direction by direction."""

    def __init__(self, products: Products, suspected: set[str]) -> None:
        self.products, self.suspected = products, suspected
        self.compare = _Comparison(products)
        self.agreed: Scheme | None = None
        self._contradicted = False  # a product was near its difference, and not so in float64

    def result(self) -> tuple[Check, Scheme | None]:
        vector = self.compare.direction("check")
        check = self._along(vector, "a random direction")
        if check.conclusive:
            vector = self.compare.leading(vector, self._product)
            other = self._along(vector, "the leading direction")
            check = other if not other.conclusive or other.error > check.error else check
        return check, self.agreed

    def _product(self, vector: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.zeros(1, len(vector), dtype=dtype or widened(vector.dtype), device=vector.device)
        self.products.multiply_exactly(vector[None], out, dtype)
        return out[0]

    def _along(self, vector: Tensor, where: str) -> Check:
        product, compare = self._product(vector), self.compare
        if not compare.is_finite(product):  # the product itself says so
            return self._check(math.inf, None, conclusive=False)
        tried, agreed = self._tried(vector, product, compare.steps_along(product))
        if not agreed and not self._is_close(tried):
            more, agreed = self._tried(vector, product, compare.schemes)
            tried += more
        if not agreed:
            return self._judge(vector, product, tried, where)
        total, self.agreed = min(agreed)
        return self._rounding(total, self.agreed)

    def _tried(
        self, vector: Tensor, product: Tensor, own: tuple[Scheme, ...]
    ) -> tuple[list[_Tried], list[tuple[float, Scheme]]]:
        """Return the schemes that do not agree with a product, and distance and scheme of those that do."""
        tried: list[_Tried] = []
        agreed: list[tuple[float, Scheme]] = []
        compare = self.compare
        for scheme, difference in self._differences(vector, own):
            error, name = compare.worst(product, difference)
            total = compare.total(product, difference)
            if self._agrees(vector, difference, near=error <= compare.tolerance):
                agreed.append((total, scheme))
            elif not agreed:
                kept = difference.to(vector.dtype) if self._may_prove(scheme) else None
                tried.append(_Tried(scheme, total, error, name, kept))
            if agreed and (compare.narrows or min(agreed)[0] <= _CLOSE or agreed[-1][1] != scheme or len(agreed) > 1):
                break  # the next scheme was looked at because it may have less noise
            del difference
        return tried, agreed

    def _is_close(self, tried: list[_Tried]) -> bool:
        """Whether a product is as near a difference as rounding explains, though small rows of it are not."""
        nearest = min((one.total for one in tried), default=math.inf)
        return not self.suspected and nearest <= self.compare.tolerance

    def _differences(self, vector: Tensor, own: tuple[Scheme, ...]) -> Iterator[tuple[Scheme, Tensor]]:
        """Yield differences by every scheme the model can do, the one that agreed last first."""
        for scheme in own if self.agreed not in own else (self.agreed, *(s for s in own if s != self.agreed)):
            try:
                with self.compare.space.ranks.together():
                    difference = self.products.difference(vector, scheme)[0]
            except RuntimeError:  # a kernel or a layer that knows no float64, or too little memory for it
                continue
            if self.compare.is_finite(difference):
                yield scheme, difference
            del difference  # a vector of length n

    def _agrees(self, vector: Tensor, difference: Tensor, *, near: bool) -> bool:
        """Whether a product that is near its difference, or not, is as it should be but for rounding.

        The same product at the weights in float64 tells: where it agrees with the difference, rounding made the error
        and no operation. It is asked for where rounding could hide what is wrong, or is all that is.
        """
        half = self.compare.dtype not in _TOLERANCE
        if near and not half and not self.suspected:
            return True
        if near and half and self.compare.narrows and difference.dtype == torch.float32:
            wide = self._product(vector, difference.dtype)
            return self.compare.worst(wide, difference)[0] <= _TOLERANCE[torch.float32]
        if self.compare.dtype == torch.float64 or difference.dtype != torch.float64 or self._contradicted:
            return near and not self._contradicted
        try:
            with self.compare.space.ranks.together():
                wide = self._product(vector, torch.float64)
        except RuntimeError:
            return near
        agrees = self.compare.worst(wide, difference)[0] <= _TOLERANCE[torch.float32]
        self._contradicted = not agrees and near
        return agrees

    def _rounding(self, error: float, scheme: Scheme) -> Check:
        if error <= max(_VISIBLE, _TOLERANCE.get(self.compare.dtype, _HALF_TOLERANCE)):
            return self._check(error, scheme)
        note = f"rounding makes products {error:.1%} off; load the model in a wider type than {self.compare.dtype}"
        return self._check(error, scheme, note=note)

    def _check(self, error: float, scheme: Scheme | None, *, conclusive: bool = True, note: str = "") -> Check:
        return Check(self.products.mode, error, str(scheme or "none"), conclusive, note)

    def _judge(self, vector: Tensor, product: Tensor, tried: list[_Tried], where: str) -> Check:
        """Say what a product is that agrees with no difference.

        Raises:
            WrongDerivativeError: it is wrong.
        """
        if not tried:
            note = "products could not be held against differences of gradients, which the model cannot compute"
            return self._check(math.inf, None, conclusive=False, note=note)
        steady = self._steady(tried)
        if steady is None:
            nearest = min(tried, key=lambda one: one.total)
            change = nearest.total
            # Small rows are lost in the noise of all differences; a layer of a float64 model may compute in float32.
            inner = not self.suspected and nearest.error <= _TOLERANCE[torch.float32]
            if change <= self.compare.tolerance or inner:
                self.agreed = nearest.scheme
                return self._check(change, nearest.scheme)
            return self._check(change, None, conclusive=False, note=f"not checked, because {_unsteady(change)}")
        one, difference = steady
        if not self._is_symmetric(vector, product, one.scheme, difference):
            note = f"{_NO_FUNCTION}. Products hold it constant, as autograd does"
            return self._check(one.total, one.scheme, conclusive=False, note=note)
        raise WrongDerivativeError(
            f"differentiating twice is {max(one.total, 1e-4):.2%} off along {where}, most in {one.name!r}"
            f"{causes(self.suspected)}"
        )

    def _may_prove(self, scheme: Scheme) -> bool:
        """Whether two differences that agree prove a product wrong.

        Long steps cross so many kinks that they agree on their average, which is no Hessian; so they are believed only
        where the graph holds an operation that is suspected anyway.
        """
        return scheme.step < 1e-5 or bool(self.suspected)

    def _steady(self, tried: list[_Tried]) -> tuple[_Tried, Tensor] | None:
        """Return a difference that another step confirms, far from the product."""
        for place, one in enumerate(tried):
            for other in tried[:place]:
                if one.difference is None or other.difference is None or self.compare.vanishes(one.difference):
                    continue  # inner rounding swallows short steps: that proves nothing
                change = self.compare.worst(other.difference, one.difference)[0]
                if 4 * change < min(one.error, other.error):
                    return one, one.difference
        return None

    def _is_symmetric(self, vector: Tensor, product: Tensor, scheme: Scheme, difference: Tensor) -> bool:
        """Whether differences are those of a gradient: <u, Dv> = <v, Du>; what is detached makes them differ."""
        off = self.compare.space.length(product.double() - difference)
        for name in ("first", "second", "third"):
            u = self.compare.direction(name)
            turned = self.products.difference(u, scheme)[0]
            gap = float(u.double() @ difference.double() - vector.double() @ turned.double())
            if abs(self.compare.space.ranks.sum(gap)) > 0.1 * off / self.compare.space.n**0.5:
                return False
        return True
