"""What this process holds of theta, all of it or its share of a model that FSDP2 shares out, and what modules read.

Where ranks share out a model, each holds w, and of theta0 and the lift its share alone. While the Subspace is open,
FSDP2's hooks stand aside: what modules read is gathered unit by unit from shares of theta0 + Phiᵀ w, and gathered again
for the backward pass, which hands each rank its share of the sum of all ranks' gradients. Each rank sketches its share,
and the sum of these sketches is the gradient of w, in the same bits on every rank. Ranks say what they do next before
they do it (``lockstep.py``), so one that goes another way ends all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.autograd import forward_ad

from gradsketch.dimension.checks import check_held_whole
from gradsketch.dimension.held_map import HeldMap
from gradsketch.dimension.lifting import Point
from gradsketch.errors import InputError
from gradsketch.fsdp import at_rest, is_shard, units_of
from gradsketch.gradients.curvature.sharing import sharing_of
from gradsketch.gradients.curvature.state import sum_of_bits
from gradsketch.gradients.gathering import Gathering, hooks_aside
from gradsketch.gradients.parameters import Parameters
from gradsketch.lockstep import Lockstep
from gradsketch.sketches.base import Sketch
from gradsketch.space import Space

__all__ = ["Holding"]


class Holding:
    """The tensors that a Subspace moves, as far as this process holds them.

    Raises:
        InputError: ranks share out the model in a way that is not followed, or the sketch wants whole vectors.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, sketch: Sketch, ranks: Lockstep) -> None:
        self.ranks, self._model, self._parameters = ranks, model, parameters
        self._sharing = sharing_of(model, parameters, ranks)
        self.map = HeldMap(sketch, Space(parameters.n) if self._sharing is None else self._sharing.space)
        self._units = units_of(model)
        self._aside = ExitStack()
        if self._sharing is not None:
            _check_followed(model, sketch, ranks)

    @property
    def is_shared_out(self) -> bool:
        """Whether FSDP2 shares the model out, be it to one rank."""
        return self._sharing is not None

    @property
    def answered(self) -> Mapping[str, Tensor]:
        """The tensors in whose place modules read something else."""
        return dict(self._parameters) if self._sharing is None else self._sharing.read

    def present(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what is held of the tensors that move, and of others that modules read by gathering them."""
        if self._sharing is None:
            return dict(self._parameters), {}
        held = self._sharing.held()
        return {name: held.pop(name) for name in self._sharing.names}, held

    def value(self, point: Point, name: str, *, tracked: bool) -> Tensor:
        """Return what a module reads at a point: the whole of a tensor, as a function of w where it is tracked."""
        if self._sharing is not None:
            return self._gathering(point, tracked=tracked).read(name)
        return point.reading(name) if tracked else point.plain[name]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Run a forward pass: all ranks leave it in the same way, and autograd keeps shares."""
        if self._sharing is None:
            yield
        else:
            with self.ranks.together(), self._sharing.memory.saving():
                yield

    def rest(self) -> None:
        """Let go of what was gathered last for a backward pass, which is over."""
        if self._sharing is not None:
            self._sharing.memory.again.drop()

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the model's parameters."""
        if self._sharing is not None:
            self._sharing.write(values)
        else:
            for name, parameter in self._parameters:
                parameter.copy_(values[name])

    def open(self) -> None:
        """Keep FSDP2 from gathering until ``close``."""
        if self._sharing is not None:
            self._aside.enter_context(hooks_aside(self._model))

    def close(self) -> None:
        """Let FSDP2 gather again."""
        self.rest()
        self._aside.close()

    def check(self, subspace: nn.Module, w: Tensor) -> None:
        """Refuse a model that was shared out since, and derivatives that gathering does not have.

        Raises:
            InputError: it was, or w is the input of forward-mode differentiation.
        """
        if self._sharing is None:
            check_held_whole(subspace)
            return
        if [id(unit) for unit in units_of(subspace)] != [id(unit) for unit in self._units]:
            raise _shared_out_since()
        if forward_ad.unpack_dual(w).tangent is not None:
            raise InputError(
                "forward-mode differentiation of a Subspace over a model that FSDP2 shares out",
                "loss.backward()",
                "Call merge() or close() first, and differentiate the model: gs.hessian(model, ...)",
            )
        at_rest(self._model)  # modules would read what unshard() has put there

    def check_compiled(self) -> None:
        """Refuse a compiled module, which cannot follow how parameters are gathered.

        Raises:
            InputError: ranks share out the model.
        """
        if self._sharing is not None:
            raise _compiled()

    def check_same(self, w: Tensor) -> None:
        """Refuse ranks that are at different points.

        Raises:
            InputError: they are.
        """
        if self._sharing is not None and is_shard(w):  # FSDP2 looks for shards before the forward pass comes to us
            raise _shared_out_since()
        if self.ranks.several and not self.ranks.same(sum_of_bits(w.detach())):
            raise InputError(
                "a w that differs between ranks",
                "the same steps from the same start on every rank",
                "Give every rank's optimiser the same options and steps, and load the same state dict on each",
            )

    def _gathering(self, point: Point, *, tracked: bool) -> Gathering:
        assert self._sharing is not None
        if tracked not in point.gatherings:
            values = point.constants | (point.tracked or {} if tracked else point.plain)
            tap = point.gradient.tap if tracked and point.gradient is not None else None
            point.gatherings[tracked] = self._sharing.gathering(values, tap=tap)
        return point.gatherings[tracked]


def _shared_out_since() -> InputError:
    return InputError(
        "a model that fully_shard was called on while it was open in a Subspace",
        "a Subspace opened over a model that is shared out already",
        "Call close(), then fully_shard, then open a Subspace and load the state dict",
    )


def _check_followed(model: nn.Module, sketch: Sketch, ranks: Lockstep) -> None:
    if ranks.several and not sketch.takes_stretches:
        raise InputError(
            f"{sketch!r}, which acts on whole vectors, for a model that FSDP2 shares out",
            "a sketch that each rank can apply to its share",
            "Type gs.AFFD(parameters.n, d) or gs.BlockSum(parameters, d)",
        )
    if not ranks.same(int(sketch.fingerprint[:15], 16)):
        raise InputError("another sketch on each rank", "one sketch", "Pass the same kind, d and seed to every rank")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise _compiled()


def _compiled() -> InputError:
    return InputError(
        "a compiled model that FSDP2 shares out, in a Subspace",
        "modules as they were written, whose parameters are gathered as they are read",
        "Leave torch.compile out",
    )
