"""Every contribution to a batch's per-example gradients: captured in one backward pass, or formed where that fails."""

from __future__ import annotations

import functools
import warnings
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.as_found import RandomState, buffers_aside
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.fsdp import Gathered, Ranks, whole
from gradsketch.gradients.data import batch_length, batch_slice, differentiable, is_out_of_memory, without_padding
from gradsketch.gradients.per_example.audit import Audit, Audits, Witness, failed, tolerance
from gradsketch.gradients.per_example.contributions import Consumer, Contribution, Direct
from gradsketch.gradients.per_example.differences import error_of_differences
from gradsketch.gradients.per_example.explicit import accumulated, gradients_by_loop, gradients_by_vmap, projections
from gradsketch.gradients.per_example.interception import (
    DifferentiatedError,
    Interception,
    Kind,
    coarser,
    is_foreign,
    nodes_outside_rules,
)
from gradsketch.gradients.per_example.owners import spread_weights
from gradsketch.gradients.per_example.provenance import Provenance
from gradsketch.gradients.per_example.refusals import (
    reentrant,
    refuse_coupling,
    refuse_none,
    refuse_other_batches,
    refuse_other_draws,
    refuse_other_gradients,
    refuse_other_losses,
    refuse_other_rows,
    refuse_replaced,
    refuse_sharded,
    refuse_strangers,
    refuse_too_large,
    refuse_underivable,
    refuse_unlike,
    refuse_unsupported,
    refuse_without_graph,
    running_alone,
)
from gradsketch.gradients.per_example.remembered import flags_of, recall
from gradsketch.gradients.per_example.rules import RULES, TRANSPARENT
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.sketches.block_sum import as_matrix
from gradsketch.tensor_parallel import are_added_up, conversions_heard, meeting
from gradsketch.transforms.precision import full_precision
from gradsketch.walks import buffers_of, modules_of, parameters_of

__all__ = ["SCHEDULE", "Capture", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Which batches are audited: the first, those with a new kind of call, and of the rest a random ``share``."""

    share: float = 0.01


SCHEDULE = Schedule()
_UNRECORDED = "a use where no gradient is recorded"
_HOOKED = "a hook on the parameter"


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
        self.ranks = Ranks(model)
        refuse_unsupported(self.tensors, sharded=self.ranks.several)
        known = ("auto", "outer", "loop") if self.ranks.split else ("auto", "outer")
        refuse_sharded(self.ranks.several and method not in known, f"method={method!r}")
        self._gathered = Gathered(model, self.tensors)
        self._told: set[str] = set()  # slow parameters and other things that were warned of
        self._drawn = self._chance = False  # whether this batch is to be audited; whether its losses are random
        self._witness: Witness | None = None
        # This batch's audit, what it saw of autograd's gradients, and in what the model computes.
        self._passed: tuple[Audit, Mapping[str, Tensor], torch.dtype] | None = None
        self._dtype = functools.reduce(coarser, (t.dtype for t in tensors.values()), torch.float64)
        self._recall()

    def _recall(self) -> None:
        """Take up what is known of the model and the task as they are now."""
        self._flags = flags_of(self.model, self.task)
        self._known = recall(
            self.model, self.task, self.method, frozenset((id(t), name) for name, t in self.tensors.items())
        )
        # In eval mode torch's encoder layers choose a faster kernel where nothing is intercepted.
        self._may_differ = any(
            isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) and not m.training
            for m in modules_of(self.model)
        )

    @property
    def slow(self) -> Mapping[str, str]:
        """Parameters whose gradients are formed one example after another, and why."""
        return dict.fromkeys(self.tensors, self._known.exact) if self._known.exact else dict(self._known.slow)

    @property
    def audits(self) -> Audits:
        """How often the captured gradients were held against autograd's own."""
        return self._known.audits

    def __call__(
        self, batch: Batch, begin: Callable[[], Consumer], witness: Witness | None = None
    ) -> Float[Tensor, " b"]:
        """Hand over the contributions of one batch and return its losses.

        ``begin`` returns a consumer for a new attempt; what earlier ones were given counts no more. Where a ``witness``
        says what the consumer makes of them, hand its rows to ``hold`` afterwards.

        Raises:
            InputError: an example depends on its batch mates, or gradients that cannot be had.
        """
        self._witness, self._passed = witness, None
        refuse_replaced(self.model, self.tensors)
        self.heed_hooks()
        self._begin()
        with self.ranks.team.together():
            self.ranks.most(1)  # hears who still has a batch, in step with ``keep_up``
            refuse_other_batches(self.ranks.team, batch)
            with refuse_too_large(self.ranks, batch):
                return self._contributions(batch, begin)

    def hold(self, values: Float[Tensor, "b d"]) -> None:
        """Hold the rows of the last batch, if it was audited, against what its witness makes of whole gradients.

        Raises:
            InputError: they are others.
        """
        passed, witness = self._passed, self._witness
        self._passed = self._witness = None
        if passed is not None and witness is not None:
            audit, seen, dtype = passed
            error = audit.error_of_rows(values, seen, dtype)
            if error:
                self._known.witnessed.discard(witness.key)
                refuse_other_rows(error)

    def keep_up(self, batch: Batch) -> None:
        """Run a batch, for nothing, as often as other ranks of a sharded model run theirs, until none has one left."""
        while any(self.ranks.most(0)):
            with refuse_too_large(self.ranks, batch):
                self._contributions(batch, lambda: lambda name, contribution, which: None)

    def _contributions(self, batch: Batch, begin: Callable[[], Consumer]) -> Tensor:
        if self.method in ("auto", "outer"):
            for _ in range(len(self.tensors) + 4):
                if self._known.exact:
                    break
                try:
                    return self._captured(batch, begin())
                except _TryAgainError:
                    continue
                except _ThisBatchError:
                    break
        return self._one_by_one(batch, begin())

    def _begin(self) -> None:
        """Count a batch, draw whether it is audited, and say what takes the exact path."""
        if flags_of(self.model, self.task) != self._flags:
            self._recall()  # what was proved of the model and the task as they were is no proof of what they are now
        known = self._known
        known.audits = replace(known.audits, batches=known.audits.batches + 1)
        self._drawn = known.draws.random() < SCHEDULE.share
        if known.exact and self.method == "auto":
            self._warn_of_exact()
        elif known.slow:
            self._warn_of_slow(known.slow)

    def heed_hooks(self) -> None:
        """Send parameters with hooks to the exact path, the only one on which autograd calls these."""
        refuse_unsupported(self.tensors, sharded=self.ranks.several)
        hooked = {name: _HOOKED for name, t in self.tensors.items() if t._backward_hooks}
        if self.method != "loop":
            self._learn({name: reason for name, reason in hooked.items() if name not in self._known.slow})

    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        """Return the task's losses, one per example, of copies of the batch and of buffers, to which a pass may write.

        Every pass finds the same buffers, or the frequencies that a long batch left behind would make its rows agree
        when they run alone.
        """
        with buffers_aside(self.model), self._gathered.noting(), meeting(self.model, self.ranks.team):
            return self._losses_of(differentiable(batch))

    def _losses_of(self, batch: Batch) -> Tensor:
        count, before = batch_length(batch), self._random_states()
        self.ranks.team.meet(-1)  # before a pass, which may begin with exchanges of the model's own
        losses = whole(self.task.losses(self.model, batch))
        self._chance = not all(map(torch.equal, before, self._random_states()))
        if self._chance:
            refuse_other_draws(self.ranks.team, before)
            self._warn_once(
                "the loss draws random numbers, as dropout does in training mode: each gradient is that of one draw "
                "and changes with the batch and from run to run; call model.eval() for gradients of the model as it is "
                "used"
            )
        if losses.shape != (count,):
            raise InputError(
                f"{self.task!r} returned losses of shape {list(losses.shape)} for {count} examples",
                f"one loss per example, shape [{count}]",
                "Use reduction='none' and sum over everything but the first dim",
            )
        refuse_other_losses(self.ranks.team, losses.detach(), self._dtype)
        return losses

    def _random_states(self) -> list[Tensor]:
        with torch._C.DisableTorchFunction():  # to ask each tensor for its device would be intercepted
            devices = {tensor.device for tensor in self.tensors.values() if tensor.is_cuda}
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    # One attempt to capture a batch.

    def _captured(self, batch: Batch, consume: Consumer) -> Tensor:
        audits: list[Audit] = []
        copy = differentiable(batch)

        def everybody(name: str, contribution: Contribution, which: slice) -> None:
            contribution = self._added_up(name, contribution)
            consume(name, contribution, which)
            for audit in audits:
                audit.add(name, contribution, which)

        own = {id(t): t for t in (*parameters_of(self.model), *buffers_of(self.model))}
        constants = ChainMap(own, self._gathered.every) if self.ranks.several else own
        provenance = Provenance(batch_length(copy), copy, constants)
        team = self.ranks.team
        tap = Interception(RULES, self._gathered.names, provenance, self._dtype, everybody, TRANSPARENT, team)
        try:
            with conversions_heard(tap.converted) if self.ranks.split else nullcontext():
                losses = self._forward(tap, batch, copy)
                return self._attempt(tap, batch, losses, everybody, audits)
        finally:
            tap.close()

    def _added_up(self, name: str, contribution: Contribution) -> Contribution:
        """Return the whole of a contribution of which each rank of a team has a part."""
        tensor = self.tensors[name]
        if not (self.ranks.split and are_added_up(tensor)):
            return contribution
        part = contribution.dense(*as_matrix(tensor.shape))
        return Direct(self.ranks.team.sums(part.flatten()).view(-1, *tensor.shape))

    def _attempt(
        self, tap: Interception, batch: Batch, losses: Tensor, consume: Consumer, audits: list[Audit]
    ) -> Tensor:
        known = self._known
        self._learn_slow(tap, losses)
        tap.slow = known.slow
        # All ranks of a sharded model make the same passes: what one of them must do, all do.
        due, apart, comparing, measuring = self.ranks.most(
            self._is_due(tap.seen, losses, proved=known.independent or self._chance or len(losses) == 1),
            self._chance or known.apart,
            not self._chance,
            tap.must_measure,
        )
        if self._may_differ:
            self._compare_with_plain(tap, batch, losses.detach())
        if due:
            audits.append(self._audit(len(losses)))
        own = other = None
        with self._exact_where_it_fails(tap):
            for audit in audits if apart else ():
                with tap.inside_modules():
                    own = self._gradients(audit, [(losses, audit.weights)], keep=True)
            if measuring:
                tap.measure(losses, spread_weights(losses.detach(), tap.dtype))
            tap.backward(losses, torch.ones_like(losses))
        for audit in audits if comparing else ():  # after the backward pass, when memory is free
            other = self._in_other_company(tap, batch, losses.detach(), audit)
        if tap.unmeasurable:
            raise _ThisBatchError
        if tap.mixed:
            self._go_slow(tap.mixed)
        slow = {name: tensor for name, tensor in self.tensors.items() if name in known.slow}
        self._explicit(batch, slow, consume, losses.detach())
        for audit in audits:
            with self.ranks.team.together():
                self._judge(audit, own, other, tap.seen, known.slow, tap.dtype)
            self._hold_against_differences(batch, tap.dtype)
        return losses.detach()

    def _forward(self, tap: Interception, batch: Batch, copy: Batch) -> Tensor:
        """Run the loss on a copy of the batch with its functions intercepted."""
        try:
            gathered = self._gathered.noting(tap.provenance.same)
            with buffers_aside(self.model), gathered, meeting(self.model, self.ranks.team), tap:
                losses = self._losses_of(copy)
        except (DifferentiatedError, InputError):
            if not tap.differentiated:
                raise
            self._go_exact("the loss differentiates a backward pass of its own")
        # Anything may come of a model that does not expect its functions to be intercepted. What is the model's own
        # fault comes again without interception, and is raised as it is.
        except Exception as error:
            if is_out_of_memory(error) or self.ranks.several or self._fails_by_itself(batch):
                raise
            self._go_exact(
                f"{type(error).__name__} under interception: {str(error).splitlines()[0] if str(error) else ''}"
            )
        if tap.differentiated:
            self._go_exact("the loss differentiates a backward pass of its own")
        refuse_without_graph(losses, self.task)
        return losses

    @contextmanager
    def _exact_where_it_fails(self, tap: Interception) -> Iterator[None]:
        """Take the exact path where the captured backward pass cannot be run."""
        try:
            yield
        except (DifferentiatedError, RuntimeError) as error:
            # Of a team another rank may have failed, in whose words it is raised.
            if is_out_of_memory(error) or (self.ranks.split and isinstance(error, RuntimeError)):
                raise
            differentiated = "the loss differentiates a backward pass of its own"
            text = f"{type(error).__name__} in the captured backward pass: {str(error).splitlines()[0]}"
            self._go_exact(differentiated if tap.differentiated else text)

    def _fails_by_itself(self, batch: Batch) -> bool:
        """Whether the loss raises also where nothing is intercepted."""
        try:
            with torch.random.fork_rng(devices=[]):
                self.task.losses(self.model, differentiable(batch))
        except Exception:  # the user's own, whatever it is; the caller raises what came before
            return True
        return False

    def _one_by_one(self, batch: Batch, consume: Consumer) -> Tensor:
        """Form the gradients of every example alone."""
        losses = self.losses(batch)
        refuse_without_graph(losses, self.task)
        nodes = list(nodes_outside_rules(losses))
        self._dtype = functools.reduce(coarser, (meta.dtype for n in nodes for meta in n._input_metadata), self._dtype)
        leaves = _leaves(nodes)
        names = self._gathered.names
        used = {names[id(t)] for t in leaves if id(t) in names}
        refuse_strangers(self.model, leaves, self.tensors, used, self._gathered.every)
        # A function of the user's own may run a backward pass that fills .grad, which no edge of the graph shows.
        if not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes):
            refuse_none(used, self.tensors)
        if self._chance or not self._is_due(set(), losses, proved=True):
            self._explicit(batch, self.tensors, consume, losses.detach())
            return losses.detach()
        audit = self._audit(len(losses))
        own = self._gradients(audit, [(losses, audit.weights)])

        def everybody(name: str, contribution: Any, which: slice) -> None:
            consume(name, contribution, which)
            audit.add(name, contribution, which)

        self._explicit(batch, self.tensors, everybody, losses.detach())
        ends = sorted({0, len(losses) - 1})
        self._warn_of_padding(batch, ends, losses[ends], self._dtype)
        with self.ranks.team.together():
            self._judge(audit, own, None, set(), self.tensors, self._dtype)
        self._hold_against_differences(batch, self._dtype)
        return losses.detach()

    def _learn_slow(self, tap: Interception, losses: Tensor) -> None:
        """Find the parameters that were used outside the rules, and leaves that should not be there."""
        nodes = list(nodes_outside_rules(losses))
        if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
            raise reentrant()
        leaves = [t for t in _leaves(nodes) if t is not tap.slot]
        names = self._gathered.names
        outside = {names[id(t)]: t for t in leaves if id(t) in names}
        used = set(outside) | {name for call in tap.calls for name in call.parameters}
        # A function with a backward pass of its own may hide a use; only a whole backward pass tells.
        hidden = dict.fromkeys(tap.unrecorded - used, _UNRECORDED) if any(map(is_foreign, nodes)) else {}
        used |= set(hidden)
        refuse_strangers(self.model, leaves, self.tensors, used, self._gathered.every)
        refuse_none(used, self.tensors)
        new = hidden | {name: tap.uses.get(name, "a use outside the rules") for name in outside}
        self._learn({name: reason for name, reason in new.items() if name not in self._known.slow})

    def _learn(self, slow: Mapping[str, str]) -> None:
        """Send parameters to the exact path, and say so."""
        if not slow:
            return
        slow = {name: f"{reason} in {self._owner(name)}" for name, reason in slow.items()}
        listed = _listed(slow)
        refuse_sharded(self.ranks.several and not self.ranks.split, listed)
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
        refuse_sharded(self.ranks.several and not self.ranks.split, reason)
        self._known.exact = reason
        self._warn_of_exact()
        raise _TryAgainError

    def _warn_of_exact(self) -> None:
        self._warn_once(
            f"{self._known.exact}: the gradients of all parameters are formed one example after another (exact, slower)"
        )

    def _warn_once(self, text: str, key: str = "") -> None:
        if (key or text) not in self._told:
            self._told.add(key or text)
            warnings.warn(text, GradsketchWarning, stacklevel=2)

    # Proofs.

    def _is_due(self, kinds: set[Kind], losses: Tensor, *, proved: bool) -> bool:
        """Whether this batch is audited: the first, one with new kinds of calls or without usual ones, or by chance."""
        known = self._known
        new = not proved or not known.audits.audited or not kinds <= known.seen or self._is_unwitnessed
        return (new or known.lacks(kinds) or self._drawn) and bool(torch.isfinite(losses).all())

    @property
    def _is_unwitnessed(self) -> bool:
        """Whether rows are made that nobody has held against whole gradients, which a witness could."""
        return self._witness is not None and self._witness.key not in self._known.witnessed

    def _compare_with_plain(self, tap: Interception, batch: Batch, losses: Tensor) -> None:
        """Hold the losses against those where nothing is intercepted, for a model may choose other kernels there."""
        if self._chance:
            return
        plain = self.losses(batch).detach()
        if not _alike(losses, plain, tap.dtype).all():
            self._go_exact("the model computes something else while its functions are intercepted")

    def _audit(self, count: int) -> Audit:
        seed = self._known.audits.batches
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")
        # A hook is called with each example's own gradient only where that is formed. What was not found to have one
        # is audited: an ignored hook shows.
        slow = self._known.slow
        heeded = {name for name, reason in slow.items() if reason.startswith(_HOOKED)}
        heeded |= {name for name, tensor in self.tensors.items() if tensor._backward_hooks and self.method == "loop"}
        return Audit(weights, {name: t for name, t in self.tensors.items() if name not in heeded}, seed)

    def _judge(
        self,
        audit: Audit,
        own: Mapping[str, Tensor] | None,
        other: Mapping[str, Tensor] | None,
        kinds: set[Kind],
        slow: Collection[str],
        dtype: torch.dtype,
    ) -> None:
        """Hold an audit against gradients by autograd, of the batch's own graph and of rows in other company.

        Those in other company are enough where they agree, since they prove the capture and the rows' independence at
        once. Where they do not, the batch's own graph tells whose fault that is: what was captured wrong goes to the
        exact path, what depends on its company is refused, and what is rounding of other kernels has more room.
        """
        known, allowed = self._known, tolerance(dtype)
        conclusive = self.ranks.team.all(all(audit.conclusive(seen) for seen in (own, other) if seen is not None))
        errors = audit.errors((own or other) or {}, allowed) if conclusive else {}
        if self._chance:  # each example that ran alone drew random numbers of its own
            errors = {name: error for name, error in errors.items() if name not in slow}
        wrong = failed(errors, allowed, loosely=slow)
        if own is None and any(self.ranks.most(bool(wrong))):
            known.apart = True
            raise _TryAgainError
        if not conclusive:
            return
        first = audit.errors(self._of_first((own or other) or {}), allowed)
        refuse_unlike({name: error for name, error in failed(first, allowed).items() if name not in wrong})
        if any(name not in slow for name in wrong):
            self._go_slow({name: f"the audit found an error of {error:.1e}" for name, error in wrong.items()})
        refuse_other_gradients(wrong, self.model)
        if own is not None and other is not None and not self._chance:
            room = float(torch.finfo(dtype).eps ** 0.4)
            refuse_other_gradients(failed(audit.errors(other, room), room), self.model, "in parts of it")
        if self._witness is not None:
            known.witnessed.add(self._witness.key)
            if audit.row is not None and not (self._chance and slow):
                self._passed = audit, (own or other) or {}, dtype
        known.covered(kinds)
        known.independent |= other is not None and len(audit.weights) > 1
        known.audits = replace(
            known.audits,
            audited=known.audits.audited + 1,
            largest_error=max((known.audits.largest_error, *errors.values())),
        )

    def _in_other_company(self, tap: Interception, batch: Batch, losses: Tensor, audit: Audit) -> Mapping[str, Tensor]:
        """Run every row once more without interception, two alone and the others among at most half of the batch.

        Returns what the audit sees of the gradients of its weighted losses. One row alone would not do: an extreme of
        the whole batch, as some models divide by, may be its own. Nor would two: who is kept by a rank or a capacity is
        others in other company.
        """
        places = self._places(len(losses))
        alone = losses.cpu().clone()

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            ranges = list(_companies(places, len(losses)))
            (passes,) = self.ranks.most(len(ranges))
            for start, stop in ranges:
                with running_alone(start, stop):
                    found = self.losses(batch_slice(batch, start, stop))
                alone[start:stop] = found.detach()
                if not _alike(found, losses[start:stop], tap.dtype).all() and not self.ranks.several:
                    self._compare_with_plain(tap, batch, losses)
                where = "one example at a time" if stop - start == 1 else f"among {stop - start} of the batch"
                self._compare(start, alone[start:stop], losses, tap.dtype, where)
                yield found, audit.weights[start:stop]
            for _ in range(passes - len(ranges)):  # in step with ranks that have more rows
                found = self.losses(batch_slice(batch, 0, 1))
                yield found, torch.zeros(1, dtype=torch.float64, device="cpu")

        gradients = self._gradients(audit, parts())
        self._warn_of_padding(batch, places, alone[places], tap.dtype)
        return gradients

    def _warn_of_padding(self, batch: Batch, places: Sequence[int], alone: Tensor, dtype: torch.dtype) -> None:
        """Warn where a row's loss depends on its padding, as with positions scaled by the length of the batch."""
        if self.task.not_padded is None:
            return
        rows = [batch_slice(batch, place, place + 1) for place in places]
        shorter = [without_padding(row, self.task.not_padded) for row in rows]
        if not any(self.ranks.most(any(row is not None for row in shorter))):
            return
        for place, row, short, loss in zip(places, rows, shorter, alone.detach(), strict=True):
            if short is None and not self.ranks.several:
                continue
            try:
                with torch.no_grad():
                    other = self.losses(row if short is None else short)[0]
            except Exception:  # fields of other shapes, of which nobody knows what is padding: nothing is compared
                if self.ranks.several:
                    raise
                continue
            if not _alike(other, loss, dtype, digits=0.7):
                self._warn_once(
                    f"the loss of example {place} of the batch is {loss.item():.6g} with its padding and "
                    f"{other.item():.6g} without: this model's outputs depend on how long the batch is, and so do "
                    "sketches; put rows of equal length together, or one row into a batch",
                    key="padding",
                )

    def _places(self, count: int) -> list[int]:
        """Return two places of a batch: at first those at its ends, then any.

        Where batches are made here, rows are sorted longest first, so the last has the most padding.
        """
        if count == 1 or not self._known.independent:
            return [0, count - 1]
        return sorted(self._known.draws.sample(range(count), 2))

    def _compare(
        self, start: int, others: Tensor, losses: Tensor, dtype: torch.dtype, where: str = "one example at a time"
    ) -> None:
        """Refuse losses of examples, from one place on, that are others alone or in other company than in this."""
        together = losses[start : start + len(others)]
        alike = _alike(others, together, dtype)
        if not self._chance and not alike.all():
            place = int(alike.int().argmin())
            refuse_coupling(start + place, together[place], others[place], where)

    def _gradients(
        self, audit: Audit, parts: Iterable[tuple[Tensor, Tensor]], *, keep: bool = False
    ) -> dict[str, Tensor]:
        """Return what an audit sees of autograd's gradients of weighted losses; ``keep`` the graph if it is wanted."""
        weighted = ((losses, weights.to(losses)) for losses, weights in parts)
        first = audit.row is None and audit.names == self.tensors.keys()
        witness = self._witness if first else None

        def see(name: str, gradient: Tensor) -> Tensor:
            if witness is not None:
                audit.witnessed(name, gradient, witness)
            return audit.seen(name, gradient)

        if self.ranks.several and not self.ranks.split:  # nobody holds all of the gradient at once
            return projections(weighted, self._gathered, see, keep=keep)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in audit.names}
        return {name: see(name, whole(g)) for name, g in accumulated(weighted, tensors, keep=keep).items()}

    def _hold_against_differences(self, batch: Batch, dtype: torch.dtype) -> None:
        """See once that what autograd returns for a split model is the derivative of its losses."""
        if not self.ranks.split or self._known.derivative:
            return
        draws = RandomState(*{torch.device("cpu"), *(t.device for t in self.tensors.values())})
        losses = self.losses(batch)
        gradients = accumulated([(losses, torch.ones_like(losses))], self.tensors)

        def loss() -> float:
            draws.put_back()
            return float(self.losses(batch).detach().double().sum())

        error = error_of_differences(loss, self.model, self.tensors, gradients, dtype, self.ranks.team.all)
        refuse_underivable(error)
        self._known.derivative = True

    def _of_first(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the first rank of a team has seen of gradients.

        What every rank has captured is the same, unless a parameter that each holds whole is used for a part of a
        split layer: each rank then has a part of the gradient, and nobody says how many make a whole.
        """
        team = self.ranks.team
        return {n: team.first(part.flatten()).view_as(part) for n, part in seen.items()} if team.several else {}

    def _explicit(self, batch: Batch, tensors: Mapping[str, Tensor], consume: Consumer, losses: Tensor) -> None:
        """Hand over formed gradients, by vmap where that was asked for, else one example after another."""
        if not tensors:
            return
        form = gradients_by_vmap if self.method == "vmap" else gradients_by_loop
        try:
            with meeting(self.model, self.ranks.team):
                for position, alone, gradients in form(self.model, self.task, batch, tensors):
                    with self.ranks.team.together(), full_precision(losses.device):
                        self._compare(position, alone, losses, self._dtype)
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


def _listed(slow: Mapping[str, str]) -> str:
    more = f" and {len(slow) - 5} more" if len(slow) > 5 else ""
    return ", ".join(f"{name} ({reason})" for name, reason in sorted(slow.items())[:5]) + more


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype, digits: float = 0.5) -> Tensor:
    """Return which losses agree to a share of the digits of the dtype; those that are not finite do."""
    one, other = one.detach(), other.detach().to(one.device)
    far: Tensor = (one - other).abs() > torch.finfo(dtype).eps ** digits * (1 + other.abs())
    return ~(far & torch.isfinite(one) & torch.isfinite(other))  # whoever sums up says so


def _companies(places: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """Yield ranges that cover a batch: these places alone, the others in ranges of at most half of it."""
    cuts = sorted({0, count, *places, *(place + 1 for place in places)})
    for start, stop in pairwise(cuts):
        middle = (start + stop) // 2
        yield from [(start, middle), (middle, stop)] if stop - start > max(1, count // 2) else [(start, stop)]


def _leaves(nodes: Iterable[Any]) -> list[Tensor]:
    return [node.variable for node in nodes if hasattr(node, "variable")]
