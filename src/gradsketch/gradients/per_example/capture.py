"""Every contribution to a batch's per-example gradients: captured in one backward pass, or formed where that fails."""

from __future__ import annotations

import functools
import random
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.data import batch_length, batch_slice, is_out_of_memory
from gradsketch.gradients.per_example.audit import Audit, Audits, tolerance
from gradsketch.gradients.per_example.contributions import Consumer, Direct
from gradsketch.gradients.per_example.differentiating import reentrant
from gradsketch.gradients.per_example.explicit import accumulated, gradients_by_loop, gradients_by_vmap
from gradsketch.gradients.per_example.interception import (
    DifferentiatedError,
    Interception,
    coarser,
    nodes_outside_rules,
)
from gradsketch.gradients.per_example.owners import spread_weights
from gradsketch.gradients.per_example.provenance import Provenance
from gradsketch.gradients.per_example.rules import RULES, TRANSPARENT
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.stand_ins import read_instead

__all__ = ["SCHEDULE", "Capture", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Which batches are audited: the first, those with a new kind of call, and of the rest a random ``share``."""

    share: float = 0.01


SCHEDULE = Schedule()
# Of one model, because tasks that capture something new each time would pile up.
_REMEMBERED = 64
_UNRECORDED = "a use where no gradient is recorded"
_HOOKED = "a hook on the parameter"
_INDEPENDENT = (
    "a loss in which no example depends on its batch mates",
    "Call model.eval() where dropout or BatchNorm is the cause, or write the loss per example",
)


@dataclass
class _Known:
    """What was learnt of a model under a task."""

    slow: dict[str, str] = field(default_factory=dict)  # parameters on the exact path, and why
    exact: str = ""  # why the whole loss is on the exact path
    seen: set[tuple[str, bool, bool]] = field(default_factory=set)  # kinds of calls that an audit has covered
    independent: bool = False  # a row was the same alone as in company
    audits: Audits = field(default_factory=Audits)
    may_differ: bool = False  # torch's encoder layers choose a faster kernel where nothing is intercepted
    draws: random.Random = field(default_factory=lambda: random.Random(0))


# By model, then by what else decides: task, selection, method. Sketchers that are made again need no new proofs.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


class _TryAgainError(Exception):
    """An attempt taught something that makes the next attempt right."""


class _ThisBatchError(Exception):
    """One batch needs the exact path, which says nothing of others."""


class Capture:
    """Hands every contribution to the per-example gradients of chosen parameters to a consumer, batch after batch.

    Remembers what earlier batches taught: which parameters need the exact path, and what was audited. Call it inside
    ``differentiating``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        tensors: Mapping[str, Tensor],
        method: Literal["auto", "outer", "vmap", "loop", "implicit"] = "auto",
    ) -> None:
        self.model, self.task, self.method = model, task, method
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        _refuse_unsupported(self.tensors)
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        self._known = _known(model, task, self._names, method)
        self._known.may_differ = any(
            isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) and not m.training
            for m in model.modules()
        )
        self._told: set[str] = set()  # slow parameters and other things that were warned of
        self._chance = False
        self._dtype = functools.reduce(coarser, (t.dtype for t in tensors.values()), torch.float64)

    @property
    def slow(self) -> Mapping[str, str]:
        """Parameters whose gradients are formed one example after another, and why."""
        return dict.fromkeys(self.tensors, self._known.exact) if self._known.exact else dict(self._known.slow)

    @property
    def audits(self) -> Audits:
        """How often the captured gradients were held against autograd's own."""
        return self._known.audits

    def __call__(self, batch: Batch, begin: Callable[[], Consumer]) -> Float[Tensor, " b"]:
        """Hand over the contributions of one batch and return its losses.

        ``begin`` returns a consumer for a new attempt; what earlier ones were given counts no more.

        Raises:
            InputError: an example depends on its batch mates, or gradients that cannot be had.
        """
        _refuse_replaced(self.model, self.tensors)
        self.heed_hooks()
        if self._known.exact and self.method == "auto":
            self._warn_of_exact()
        elif self._known.slow:
            self._warn_of_slow(self._known.slow)
        if self.method in ("auto", "outer"):
            for _ in range(len(self.tensors) + 3):
                if self._known.exact:
                    break
                try:
                    return self._captured(batch, begin())
                except _TryAgainError:
                    continue
                except _ThisBatchError:
                    break
        consume = begin()
        losses = self.losses(batch)
        _refuse_without_graph(losses, self.task)
        nodes = list(nodes_outside_rules(losses))
        leaves = _leaves(nodes)
        used = {self._names[id(t)] for t in leaves if id(t) in self._names}
        self._refuse_strangers(leaves, used)
        # A function of the user's own may run a backward pass that fills .grad, which no edge of the graph shows.
        if not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes):
            self._refuse_none(used)
        losses = losses.detach()
        if self._unproved(losses):
            for place, alone in zip(*self._apart(batch, losses), strict=True):
                if not _close(alone.detach(), losses[place], torch.float32):
                    _refuse_coupling(place, losses[place], alone)
            self._known.independent = True
        self._explicit(batch, self.tensors, consume)
        return losses

    def heed_hooks(self) -> None:
        """Send parameters with hooks to the exact path, the only one on which autograd calls these."""
        _refuse_unsupported(self.tensors)
        hooked = {name: _HOOKED for name, t in self.tensors.items() if t._backward_hooks}
        if self.method != "loop":
            self._learn({name: reason for name, reason in hooked.items() if name not in self._known.slow})

    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        """Return the task's losses, one per example."""
        before = self._random_states()
        losses = self.task.losses(self.model, batch)
        self._chance = not all(map(torch.equal, before, self._random_states()))
        if self._chance:
            self._warn_once(
                "the loss draws random numbers, as dropout does in training mode: each gradient is that of one draw "
                "and changes with the batch and from run to run; call model.eval() for gradients of the model as it is "
                "used"
            )
        if losses.shape != (batch_length(batch),):
            raise InputError(
                f"{self.task!r} returned losses of shape {list(losses.shape)} for {batch_length(batch)} examples",
                f"one loss per example, shape [{batch_length(batch)}]",
                "Use reduction='none' and sum over everything but the first dim",
            )
        return losses

    def _random_states(self) -> list[Tensor]:
        devices = {tensor.device for tensor in self.tensors.values() if tensor.is_cuda}
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    # One attempt to capture a batch.

    def _captured(self, batch: Batch, consume: Consumer) -> Tensor:
        auditing: list[Consumer] = []

        def everybody(name: str, contribution: Any, which: slice) -> None:
            for consumer in (consume, *auditing):
                consumer(name, contribution, which)

        constants = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        tap = Interception(
            RULES, self._names, Provenance(batch_length(batch), batch, constants), self._dtype, everybody, TRANSPARENT
        )
        try:
            return self._attempt(tap, batch, everybody, auditing)
        finally:
            tap.close()

    def _attempt(self, tap: Interception, batch: Batch, consume: Consumer, auditing: list[Consumer]) -> Tensor:
        known = self._known
        losses = self._forward(tap, batch)
        self._learn_slow(tap, losses)
        tap.slow = known.slow
        due = self._is_due(tap, losses)
        if due or known.may_differ:
            self._compare_with_plain(tap, batch, losses.detach())
        alone = self._alone(tap, batch, losses.detach(), auditing)
        with self._exact_where_it_fails(tap):
            audit = self._audit(tap, losses, auditing) if due else None
            if tap.must_measure:
                tap.measure(losses, spread_weights(losses.detach(), tap.dtype))
            tap.backward(losses, torch.ones_like(losses))
        if tap.unmeasurable:
            raise _ThisBatchError
        if tap.mixed:
            self._go_slow(tap.mixed)
        slow = {name: tensor for name, tensor in self.tensors.items() if name in known.slow}
        self._explicit(batch, slow, consume)
        if audit is not None:
            self._judge(audit, tap)
        if alone is not None and alone.conclusive:
            for name, wrong in alone.failed().items():
                raise InputError(
                    f"gradients of {name} that differ by {wrong:.1e} between two examples together and one example at "
                    "a time",
                    *_INDEPENDENT,
                )
            known.independent = True
        return losses.detach()

    def _forward(self, tap: Interception, batch: Batch) -> Tensor:
        try:
            with tap:
                losses = self.losses(batch)
        except (DifferentiatedError, InputError):
            if not tap.differentiated:
                raise
            self._go_exact("the loss differentiates a backward pass of its own")
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._rethrow_if_its_own(batch, error)
            self._go_exact(
                f"{type(error).__name__} under interception: {str(error).splitlines()[0] if str(error) else ''}"
            )
        if tap.differentiated:
            self._go_exact("the loss differentiates a backward pass of its own")
        _refuse_without_graph(losses, self.task)
        return losses

    @contextmanager
    def _exact_where_it_fails(self, tap: Interception) -> Iterator[None]:
        """Take the exact path where the captured backward pass cannot be run."""
        try:
            yield
        except (DifferentiatedError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            differentiated = "the loss differentiates a backward pass of its own"
            text = f"{type(error).__name__} in the captured backward pass: {str(error).splitlines()[0]}"
            self._go_exact(differentiated if tap.differentiated else text)

    def _rethrow_if_its_own(self, batch: Batch, error: Exception) -> None:
        """Raise what the model raises also where nothing is intercepted."""
        try:
            with torch.random.fork_rng(devices=[]):
                self.task.losses(self.model, batch)
        except Exception:
            raise error from None

    def _learn_slow(self, tap: Interception, losses: Tensor) -> None:
        """Find the parameters that were used outside the rules, and leaves that should not be there."""
        nodes = list(nodes_outside_rules(losses))
        if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
            raise reentrant()
        leaves = [t for t in _leaves(nodes) if t is not tap.slot]
        outside = {self._names[id(t)]: t for t in leaves if id(t) in self._names}
        used = set(outside) | {name for call in tap.calls for name in call.parameters}
        # A function with a backward pass of its own may hide a use; only a whole backward pass tells.
        hidden = dict.fromkeys(tap.unrecorded - used, _UNRECORDED)
        used |= set(hidden)
        self._refuse_strangers(leaves, used)
        self._refuse_none(used)
        new = hidden | {name: tap.uses.get(name, "a use outside the rules") for name in outside}
        self._learn({name: reason for name, reason in new.items() if name not in self._known.slow})

    def _refuse_none(self, used: Collection[str]) -> None:
        if not used and self.tensors:
            raise InputError(
                f"losses that use none of the {len(self.tensors)} chosen parameters",
                "a loss computed by the model whose parameters were chosen",
                "Build the task, the parameters and the sketch from the same model, or choose other parameters",
            )

    def _refuse_strangers(self, leaves: Iterable[Tensor], used: Collection[str]) -> None:
        own = {id(t) for t in (*self.model.parameters(), *self.tensors.values())}
        foreign = [t for t in leaves if id(t) not in own]
        if foreign:  # an open Subspace makes what the model reads; its own parameters are no strangers
            makers = [reading.source.owner for reading in read_instead(self.model).values()]
            known = {id(p) for maker in makers if isinstance(maker, nn.Module) for p in maker.parameters()}
            foreign = [t for t in foreign if id(t) not in known]
        _refuse_foreign(foreign, {name: t for name, t in self.tensors.items() if name not in used})

    def _learn(self, slow: Mapping[str, str]) -> None:
        """Send parameters to the exact path, and say so."""
        if not slow:
            return
        slow = {name: f"{reason} in {self._owner(name)}" for name, reason in slow.items()}
        listed = _listed(slow)
        if self.method != "auto":
            raise InputError(
                f"{listed}, used in a way that method={self.method!r} does not know",
                "parameters of layers it knows",
                "Type method='auto', or exclude them",
            )
        self._known.slow.update(slow)
        self._warn_of_slow(slow)

    def _owner(self, name: str) -> str:
        """Return the class of the module that holds a parameter."""
        try:
            return type(self.model.get_submodule(name.rpartition(".")[0])).__name__
        except AttributeError:
            return type(self.model).__name__

    def _warn_of_slow(self, slow: Mapping[str, str]) -> None:
        new = {name: reason for name, reason in slow.items() if name not in self._told}
        if not new:
            return
        self._told |= set(new)
        listed = _listed(new)
        self._warn_once(
            f"{listed}: used in a way that cannot be captured during backward, so their gradients are formed one "
            f"example after another (exact, slower); leave them out with Parameters(model, exclude=...)"
        )

    def _go_slow(self, reasons: Mapping[str, str]) -> None:
        self._learn({name: reason for name, reason in reasons.items() if name not in self._known.slow})
        raise _TryAgainError

    def _go_exact(self, reason: str) -> None:
        """Take the exact path for everything from now on."""
        if self.method == "outer":
            raise InputError(reason, "a loss that method='outer' can follow", "Type method='auto'")
        self._known.exact = reason
        self._warn_of_exact()
        raise _TryAgainError

    def _warn_of_exact(self) -> None:
        self._warn_once(
            f"{self._known.exact}: the gradients of all parameters are formed one example after another (exact, slower)"
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, GradsketchWarning, stacklevel=2)

    # Proofs.

    def _is_due(self, tap: Interception, losses: Tensor) -> bool:
        """Whether this batch is audited: the first, one with new kinds of calls, or by chance."""
        known = self._known
        known.audits = replace(known.audits, batches=known.audits.batches + 1)
        new = not known.audits.audited or not tap.seen <= known.seen
        return (new or known.draws.random() < SCHEDULE.share) and bool(torch.isfinite(losses).all())

    def _compare_with_plain(self, tap: Interception, batch: Batch, losses: Tensor) -> None:
        """Hold the losses against those where nothing is intercepted, for a model may choose other kernels there."""
        if self._chance:
            return
        plain = self.losses(batch).detach()
        if not all(_close(one, other, tap.dtype) for one, other in zip(losses, plain, strict=True)):
            self._go_exact("the model computes something else while its functions are intercepted")

    def _audit(self, tap: Interception, losses: Tensor, auditing: list[Consumer]) -> Audit:
        """Return the audit of this batch; its exact gradients come from the same graph."""
        known = self._known
        generator = torch.Generator().manual_seed(known.audits.batches)
        weights = torch.randn(len(losses), generator=generator, dtype=torch.float64)
        with tap.inside_modules():
            audit = Audit(weights, self._gradients(losses, weights, keep=True), tolerance(tap.dtype))
        auditing.append(audit.add)
        return audit

    def _judge(self, audit: Audit, tap: Interception) -> None:
        if not audit.conclusive:
            return
        errors, failed = audit.errors(), audit.failed(loosely=self._known.slow)
        fresh = {name: f"the audit found an error of {error:.1e}" for name, error in failed.items()}
        if fresh and any(name not in self._known.slow for name in fresh):
            self._go_slow(fresh)
        if fresh:
            raise InputError(
                f"gradients that differ from autograd's by {max(failed.values()):.1e} of their length, in "
                f"{', '.join(sorted(failed)[:3])}, even one example at a time",
                f"a loss that is the same for an example alone and in a batch, to {audit.tolerance:.0e}",
                "Call model.eval() where dropout or BatchNorm is the cause, or write the loss per example",
            )
        known = self._known
        known.seen |= tap.seen
        known.audits = Audits(
            known.audits.batches, known.audits.audited + 1, max(known.audits.largest_error, *errors.values())
        )

    def _alone(self, tap: Interception, batch: Batch, losses: Tensor, auditing: list[Consumer]) -> Audit | None:
        """Run two rows alone and without interception; return the audit of their gradients in company."""
        if not self._unproved(losses):
            return None
        places, alone = self._apart(batch, losses)
        for place, loss in zip(places, alone, strict=True):
            if not _close(loss, losses[place], tap.dtype):
                _refuse_coupling(place, losses[place], loss)
        weights = torch.zeros(len(losses), dtype=torch.float64)
        weights[places] = torch.tensor([1.0, -0.7], dtype=torch.float64)
        audit = Audit(weights, self._gradients(alone, weights[places]), torch.finfo(tap.dtype).eps ** 0.4)
        auditing.append(audit.add)
        return audit

    def _unproved(self, losses: Tensor) -> bool:
        """Whether it is still to be shown that no example depends on its batch mates, and this batch can show it."""
        known = self._known.independent or self._chance
        return not known and len(losses) > 1 and bool(torch.isfinite(losses).all())

    def _apart(self, batch: Batch, losses: Tensor) -> tuple[list[int], Tensor]:
        """Return the first and the last place of a batch, and the losses there of examples that are alone.

        Where batches are made here, rows are sorted longest first, so the last has the most padding. One would not do:
        an extreme of the whole batch, as some models divide by, may be its own.
        """
        places = [0, len(losses) - 1]
        return places, torch.cat([self.losses(batch_slice(batch, place, place + 1)) for place in places])

    def _gradients(self, losses: Tensor, weights: Tensor, *, keep: bool = False) -> dict[str, Tensor]:
        """Return autograd's gradients of the weighted losses, and keep the graph if it is still wanted."""
        # A hook is called with each example's own gradient only where that is formed.
        tensors = {n: t for n, t in self.tensors.items() if not self._known.slow.get(n, "").startswith(_HOOKED)}
        return accumulated(losses, weights.to(losses), tensors, keep=keep)

    def _explicit(self, batch: Batch, tensors: Mapping[str, Tensor], consume: Consumer) -> None:
        """Hand over formed gradients, by vmap where that was asked for, else one example after another."""
        if not tensors:
            return
        form = gradients_by_vmap if self.method == "vmap" else gradients_by_loop
        try:
            for position, gradients in form(self.model, self.task, batch, tensors):
                for name, gradient in gradients.items():
                    consume(name, Direct(gradient.detach()), slice(position, position + len(gradient)))
        except RuntimeError as error:
            if self.method != "vmap":
                raise
            raise InputError(
                f"a model that vmap cannot run ({type(error).__name__}: {str(error).splitlines()[0]})",
                "operations that torch.func.vmap knows",
                "Type method='auto' or method='loop'",
            ) from error


def _known(model: nn.Module, task: Task, names: Mapping[int, str], method: str) -> _Known:
    key = (method, model.training, _identity(task), frozenset(names.items()))
    known = _KNOWN.setdefault(model, {})
    found = known.setdefault(key, _Known())
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]
    return found


class _Same:
    """Equal to another of the same object, for as long as that lives; keeps nothing alive."""

    def __init__(self, value: Any) -> None:
        self._hash, self._get = id(value), _reference(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._get() is not None and self._get() is other._get()


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # as lists and dicts, which may change besides
        return lambda: None


def _identity(value: Any, depth: int = 5) -> Any:
    """Return what tells tasks apart that are made anew for each call: their code, and all that they have captured."""
    if isinstance(value, int | float | str | torch.dtype | torch.device | types.CodeType | type(None)):
        return type(value), value
    parts = _parts(value)
    return _Same(value) if parts is None or depth == 0 else tuple(_identity(part, depth - 1) for part in parts)


def _parts(value: Any) -> tuple[Any, ...] | None:
    """Return what makes up tasks, functions and tuples."""
    match value:
        case Task():
            return (type(value), *sorted(vars(value).items()))
        case types.FunctionType():
            captured = (_content(cell) for cell in value.__closure__ or ())
            return (value.__code__, value.__defaults__, *captured, *(value.__kwdefaults__ or {}).items())
        case types.MethodType():
            return (value.__func__, value.__self__)
        case functools.partial():
            return (value.func, value.args, *value.keywords.items())
        case tuple():
            return value
    return None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return cell


def _listed(slow: Mapping[str, str]) -> str:
    more = f" and {len(slow) - 5} more" if len(slow) > 5 else ""
    return ", ".join(f"{name} ({reason})" for name, reason in sorted(slow.items())[:5]) + more


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    if not bool(torch.isfinite(one)) or not bool(torch.isfinite(other)):
        return True  # whoever sums up says so
    return bool((one - other).abs() <= torch.finfo(dtype).eps ** 0.5 * (1 + other.abs()))


def _refuse_coupling(example: int, together: Tensor, alone: Tensor) -> None:
    raise InputError(
        f"the loss of example {example} of the batch is {together.item():.6g} together and {alone.item():.6g} one "
        "example at a time",
        *_INDEPENDENT,
    )


def _refuse_without_graph(losses: Tensor, task: Task) -> None:
    if not losses.requires_grad:
        raise InputError(
            f"losses of {task!r} that carry no gradient",
            "losses that depend on the chosen parameters",
            "Leave out .detach(), .item() and torch.no_grad() in the loss, or choose parameters that it uses",
        )


def _leaves(nodes: Iterable[Any]) -> list[Tensor]:
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _refuse_foreign(foreign: list[Tensor], unused: Mapping[str, Tensor]) -> None:
    """Refuse leaves that stand in the place of parameters: their gradients would be taken for zero."""
    shapes = {tuple(t.shape): name for name, t in unused.items()}
    for leaf in foreign:
        if isinstance(leaf, nn.Parameter) or tuple(leaf.shape) in shapes:
            place = shapes.get(tuple(leaf.shape))
            raise InputError(
                f"a loss that depends on a parameter of shape {list(leaf.shape)} that is not the model's own"
                + (f", while {place!r} of that shape is not used" if place else ""),
                "a forward pass that uses the model's own parameters",
                "Switch off what swaps them meanwhile (offloading, sharding, functional_call), or move the parameters "
                "into memory first",
            )


def _refuse_replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a chosen parameter in whose place the model has another now: its gradient would be taken for zero."""
    own = dict(model.named_parameters(remove_duplicate=False))
    present = {id(t) for t in own.values()}
    for name, tensor in tensors.items():
        if name in own and id(tensor) not in present:
            raise InputError(
                f"{name!r}, which was replaced in the model after it was chosen",
                "parameters that are the model's own",
                "Build the parameters, the sketch and the sketcher anew, or load weights without assign=True",
            )


def _refuse_unsupported(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        for found, wanted, fix in (
            (tensor.is_meta, "parameters in memory", "Load the weights, or switch off offloading to disk"),
            (tensor.is_complex(), "real parameters", "Store real and imaginary parts with torch.view_as_real"),
            (tensor.is_inference(), "ordinary tensors", "Build or load the model outside torch.inference_mode()"),
            (
                type(tensor.detach()) is not Tensor,
                "plain tensors",
                "Gather sharded and dequantise quantised parameters",
            ),
            (
                bool(getattr(tensor, "_post_accumulate_grad_hooks", None)),
                "gradients as autograd computes them, which such a hook would change or use up",
                "Remove the hook meanwhile, or register it with register_hook",
            ),
        ):
            if found:
                kind = "with a post-accumulate hook" if "hook" in wanted else f"of type {type(tensor).__name__}"
                kind = "on the meta device" if tensor.is_meta else kind
                kind = f"of dtype {tensor.dtype}" if tensor.is_complex() else kind
                kind = "made in inference mode" if tensor.is_inference() else kind
                raise InputError(f"parameter {name!r} {kind}", wanted, fix)
