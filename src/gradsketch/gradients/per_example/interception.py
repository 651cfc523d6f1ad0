"""See every use of a parameter in a forward pass, and what backward brings to it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from gradsketch.fsdp import whole
from gradsketch.gradients.data import is_out_of_memory
from gradsketch.gradients.per_example.contributions import Consumer, Contribution, Direct, IndexedRows, Placed
from gradsketch.gradients.per_example.owners import (
    Grouping,
    InOrder,
    Measured,
    MixedError,
    UnmeasurableError,
    owners_of,
    projected,
)
from gradsketch.gradients.per_example.provenance import SHARED, UNKNOWN, Axis, Provenance, function_name, tensors_in
from gradsketch.lockstep import Lockstep
from gradsketch.transforms.precision import full_precision, outside_autocast

__all__ = ["DifferentiatedError", "Interception", "Kind", "Rule", "coarser", "is_foreign", "nodes_outside_rules"]

# A parameter, or a tensor made of parameters alone; what it gets; and which examples that is for (None: all).
Report = tuple[Tensor, Contribution] | tuple[Tensor, Contribution, slice]
# From the grouping of a call's rows, the gradient that reaches its result, and the tensors kept from it, to reports.
Contributions = Callable[..., Iterable[Report]]
# Takes the interception and a torch function's arguments; returns its result, or NotImplemented.
Rule = Callable[..., Any]
# Takes what a derived tensor gets, returns what one of its parameters gets.
Passing = Callable[[Contribution], Contribution]
# Of a use of parameters: function and parameters, dim of the examples, leading dims, whether there were several.
Kind = tuple[str, Axis, int, bool]


class DifferentiatedError(Exception):
    """The loss differentiates a backward pass of its own, which rules do not follow."""


@dataclass
class _Derived:
    """A tensor made of parameters and constants alone, as it was when that was seen."""

    tensor: Tensor
    version: int
    node: Any
    parameters: dict[str, Tensor]
    passing: Passing | None = None  # where one parameter's contributions keep their form


@dataclass
class _Call:
    """One watched use of parameters."""

    name: str
    axis: Axis
    leading: int
    contributions: Contributions
    parameters: tuple[str, ...]
    shape: torch.Size | None = None  # of the leading dims, where the result has them flattened
    weighted: Tensor | None = field(default=None, repr=False)


class Interception(TorchFunctionMode):
    """Runs torch functions as they are, and watches the results of those that use a chosen parameter.

    A rule calls the function with the parameter behind a *gate*, which changes nothing, and has the result *watched* by
    a node of the graph. When the backward pass that ``backward`` started reaches that node, the rule's contributions go
    to ``consume``. A use that no rule knows has no gate, so ``nodes_outside_rules`` finds its parameters. Everything
    stays in autograd's own graph, hence in-place operations, backward passes inside the loss, checkpoints and offloaded
    activations are autograd's business, and the parameters' ordinary gradients can still be asked of the same graph.

    A tensor computed from parameters and constants alone, such as ``1 + weight.float()`` or the embeddings of positions
    that all examples share, counts as chosen too. What reaches it goes on to its parameters.

    Args:
        rules: what to do for each torch function; under None, for every other.
        names: the chosen parameters' names, by id.
        provenance: where the examples stand in each tensor.
        dtype: of the parameters; becomes the coarsest that gradients pass through.
        consume: called with each parameter's name, a contribution, and the examples it is for.
        transparent: functions whose inner calls are intercepted, so that their results are followed already.
        team: the ranks over which tensor parallelism splits layers; each is handed whole contributions.
    """

    def __init__(
        self,
        rules: Mapping[Any, Rule],
        names: Mapping[int, str],
        provenance: Provenance,
        dtype: torch.dtype,
        consume: Consumer,
        transparent: Collection[Any] = (),
        team: Lockstep | None = None,
    ) -> None:
        super().__init__()
        self.team = team or Lockstep()
        self.rules, self.names, self.provenance, self.dtype, self.consume = rules, names, provenance, dtype, consume
        self.examples, self.transparent = provenance.examples, transparent
        self.slow: Mapping[str, str] = {}
        self.mixed: dict[str, str] = {}
        self.seen: set[Kind] = set()
        self.differentiated = False
        self.unmeasurable = False  # whether gradients that are not finite hide whose rows are whose
        self.calls: list[_Call] = []
        self.unrecorded: set[str] = set()  # parameters used where no gradient is recorded
        self.uses: dict[str, str] = {}  # of each parameter that a function outside the rules used: that function
        self._call = ""
        self._placed: Tensor | tuple[Tensor, ...] | None = None
        self._derived: dict[int, _Derived] = {}
        self._gates: dict[int, Tensor] = {}
        self.slot = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")
        self._pass: int | None = None
        self._weights: Tensor | None = None  # while the backward pass of weighted losses runs
        self._measured: Tensor | None = None  # the weights of such a pass that has run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED:
            return func(*args, **kwargs)
        given = tensors_in(args) + tensors_in(kwargs.values()) if kwargs else tensors_in(args)
        used = [t for t in given if self.chosen(t)]
        if used and not torch.is_grad_enabled():
            unrecorded = {name for tensor in used for name in self._origin(tensor)}
            self.unrecorded |= unrecorded
            # A function that runs a backward pass of its own may hide these uses, which an audit finds.
            self.seen |= {(f"unrecorded({name})", UNKNOWN, 0, self.examples > 1) for name in unrecorded}
            used = []
        result = self._use(func, args, kwargs, used) if used else func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype is not self.dtype and result.requires_grad:
            self.dtype = coarser(self.dtype, result.dtype)
        if id(result) in self._derived:
            self.provenance.place(result, SHARED)
        elif result is not None and result is self._placed:
            self._placed = None
        elif func not in self.transparent:
            self.provenance.follow(func, args, kwargs, result)
        return result

    def _rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply the function's own rule, or the one for all functions, where the arguments are those it takes."""
        rule = self.rules.get(func, self.rules[None])
        if any(tensor.is_complex() for tensor in tensors_in((*args, *kwargs.values()))):
            return NotImplemented  # rules multiply real numbers
        try:
            return rule(self, func, *args, **kwargs)
        except TypeError:
            try:
                inspect.signature(rule).bind(self, func, *args, **kwargs)
            except TypeError:
                return NotImplemented
            raise

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], used: list[Tensor]) -> Any:
        parameters = {name: p for tensor in used for name, p in self._origin(tensor).items()}
        self._call = f"{function_name(func)}({','.join(parameters)})"
        result = self._rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if not self._derive(func, result, used, parameters, args, kwargs):
            self.uses.update(dict.fromkeys(parameters, function_name(func)))
        return result

    # What rules ask.

    def chosen(self, tensor: Any) -> bool:
        """Whether this is one of the parameters whose gradients are wanted, or made of nothing else."""
        if id(tensor) in self.names:
            return True
        derived = self._derived.get(id(tensor))
        if derived is None:
            return False
        if derived.version == tensor._version and derived.node is tensor.grad_fn:
            return True
        # Written to since: what it is made of now, only autograd knows.
        for name in self._derived.pop(id(tensor)).parameters:
            self.uses[name] = "an in-place operation"
        return False

    def gate(self, tensor: Any) -> Any:
        """Return a chosen parameter behind its gate, anything else as it is."""
        if not isinstance(tensor, Tensor) or not self.chosen(tensor):
            return tensor
        if id(tensor) not in self._gates:
            self._gates[id(tensor)] = _Gate.apply(tensor)
        return self._gates[id(tensor)]

    def axis(self, tensor: Any) -> Axis:
        """Return the dim of a tensor that counts the examples, ``SHARED`` or ``UNKNOWN``."""
        if self.chosen(tensor):
            return SHARED
        axis = self.provenance.axis(tensor)
        return 0 if self.examples == 1 and axis != SHARED else axis

    def place(self, result: Tensor | tuple[Tensor, ...], *axes: Axis) -> None:
        """Say where the examples stand in the results of a rule, where the function alone does not tell."""
        for tensor, axis in zip(tensors_in((result,)), axes, strict=True):
            self.provenance.place(tensor, axis)
        self._placed = result

    def watch(
        self,
        result: Tensor,
        axis: Axis,
        leading: int,
        keep: tuple[Tensor, ...],
        contributions: Contributions,
        shape: torch.Size | None = None,
    ) -> Tensor:
        """Return the result, from now on reporting ``contributions(rows, gradient, *keep)`` when backward reaches it.

        ``rows`` groups the first ``leading`` dims of the result by example; ``axis`` is the one that counts the
        examples, or ``UNKNOWN``. A result that has its leading dims flattened says what ``shape`` they have.
        """
        self.seen.add((self._call, axis, leading, self.examples > 1))  # a batch of one proves nothing of more
        names = tuple(self._call.partition("(")[2][:-1].split(","))
        call = _Call(self._call, axis, leading, contributions, names, shape)
        self.calls.append(call)
        watched: Tensor = _Watch.apply(result, self.slot, self, call, *(t.detach() for t in keep))
        return watched

    def converted(self, before: Tensor, after: Tensor) -> None:
        """Follow a tensor that became another with the same entries, of which ranks hold other parts."""
        self.provenance.same(before, after)
        if not self.chosen(before) or before.shape != after.shape or not after.requires_grad:
            return
        passing = self._chained(before, _as_is(after, [before], (), {}))
        if passing is not None:
            self._derived[id(after)] = _Derived(after, after._version, after.grad_fn, self._origin(before), passing)

    # Backward.

    def close(self) -> None:
        """Let go of everything: calls and rules refer to each other, and a graph would wait for the collector."""
        self.calls.clear()
        self._derived.clear()
        self._gates.clear()

    @property
    def must_measure(self) -> bool:
        """Whether some call's rows are not known to be in order."""
        return self.examples > 1 and any(call.axis < 0 for call in self.calls)

    def measure(self, losses: Tensor, weights: Tensor) -> None:
        """Run a backward pass of the weighted losses that only measures whose row is whose."""
        self._weights = weights
        try:
            self.backward(losses, weights, again=True)
        finally:
            self._weights, self._measured = None, weights

    def backward(self, losses: Tensor, weights: Tensor, *, again: bool = False) -> None:
        """Run backward from the losses so that every watched result reports; ``again`` if it will run once more."""
        rooted = _Root.apply(losses, self)
        if self.calls:
            with self.inside_modules(), outside_autocast(losses.device):
                torch.autograd.grad(rooted, [self.slot], weights, allow_unused=True, retain_graph=again)

    @contextmanager
    def inside_modules(self) -> Iterator[None]:
        """Intercept what modules run meanwhile, on whichever thread: checkpointed layers run again during backward."""
        local = threading.local()

        def enter(*_: Any) -> None:
            local.depth = getattr(local, "depth", 0) + 1
            if local.depth == 1:
                self.__enter__()

        def leave(*_: Any) -> None:
            if getattr(local, "depth", 0) == 0:
                return  # a module that another thread had entered before
            local.depth -= 1
            if local.depth == 0:
                self.__exit__(None, None, None)

        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _reached(self, call: _Call, gradient: Tensor, kept: Sequence[Tensor]) -> None:
        """Take what a backward pass brought to a call: only the pass that was started here counts."""
        if torch.is_grad_enabled():
            self.differentiated = True
            raise DifferentiatedError
        if torch._C._current_graph_task_id() != self._pass or all(name in self.slow for name in call.parameters):
            return
        with full_precision(gradient.device), self.team.together():
            gradient, *kept = map(whole, (gradient, *kept))
            if call.shape is not None:
                gradient = gradient.reshape(*call.shape, gradient.shape[-1])
            if self._weights is not None:
                call.weighted = projected(gradient, call.leading) if call.axis < 0 else None
                return
            try:
                rows = self._grouping(call, gradient)
                for tensor, contribution, *which in call.contributions(rows, gradient, *kept):
                    self._report(tensor, contribution, which[0] if which else slice(None))
            except UnmeasurableError:
                self.unmeasurable = True
            except MixedError:
                self.mixed.update(dict.fromkeys(call.parameters, f"{call.name} mixes examples"))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # A function that takes whole batches only, for instance: these parameters have the exact path.
                self.mixed.update(dict.fromkeys(call.parameters, f"{call.name}: {str(error).splitlines()[0]}"))

    def _grouping(self, call: _Call, gradient: Tensor) -> Grouping:
        if self._measured is None or call.weighted is None:
            return InOrder(self.examples, max(0, call.axis), call.leading)
        plain = projected(gradient, call.leading)
        owners = owners_of(call.weighted, plain, self._measured.to(plain.device), self.dtype)
        call.weighted = None
        return Measured(owners, self.examples, call.leading)

    def _report(self, tensor: Tensor, contribution: Contribution, examples: slice) -> None:
        derived = self._derived.get(id(tensor))
        if derived is not None:
            self._pass_on(derived, contribution, examples)
        elif id(tensor) in self.names:
            self._consume(self.names[id(tensor)], contribution, examples)

    def _consume(self, name: str, contribution: Contribution, examples: slice) -> None:
        if name not in self.slow:
            self.consume(name, contribution, examples)

    # Tensors made of parameters.

    def _derive(
        self,
        func: Any,
        result: Any,
        used: list[Tensor],
        parameters: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Remember a result that depends on chosen parameters and on constants only; false where it is not such."""
        results = tensors_in((result,))
        if not results:
            return True
        others = [t for t in tensors_in((*args, *kwargs.values())) if all(t is not u for u in used)]
        others = [] if function_name(func) in _SHAPE_ONLY else others
        if any(t.requires_grad or not self._constant(t) for t in others) or self._rewrites(result, args):
            return False
        passing = _PASSING.get(function_name(func))
        for tensor in results:
            if tensor.requires_grad and id(tensor) not in self.names:
                keeps = passing(tensor, used, args, kwargs) if passing and len(parameters) == 1 else None
                self._derived[id(tensor)] = _Derived(
                    tensor, tensor._version, tensor.grad_fn, parameters, self._chained(used[0], keeps)
                )
        return True

    def _rewrites(self, result: Any, args: tuple[Any, ...]) -> bool:
        """Whether a function changed a tensor in place whose earlier numbers are in use."""
        changed = [a for a in args if a is result]
        return any(id(a) not in self._derived or id(a) in self._gates for a in changed)

    def _constant(self, tensor: Tensor) -> bool:
        return tensor.ndim == 0 or self.provenance.axis(tensor) == SHARED

    def _chained(self, source: Tensor, passing: Passing | None) -> Passing | None:
        """Return the passing from a tensor made of ``source`` to the parameter behind it."""
        before = self._derived.get(id(source))
        if passing is None or (before is not None and before.passing is None):
            return None
        if before is None:
            return passing
        earlier, later = before.passing, passing
        assert earlier is not None
        return lambda contribution: earlier(later(contribution))

    def _origin(self, tensor: Tensor) -> dict[str, Tensor]:
        derived = self._derived.get(id(tensor))
        return {self.names[id(tensor)]: tensor} if derived is None else derived.parameters

    def _pass_on(self, derived: _Derived, contribution: Contribution, examples: slice) -> None:
        """Give each parameter its part, by the chain rule."""
        if derived.passing is not None:
            (name,) = derived.parameters
            self._consume(name, derived.passing(contribution), examples)
            return
        shape = derived.tensor.shape
        rows = shape[0] if len(shape) > 1 else 1
        gradients = contribution.dense(rows, max(1, derived.tensor.numel()) // max(1, rows))
        wanted = {name: p for name, p in derived.parameters.items() if name not in self.slow}
        if not wanted:
            return
        gradients = gradients.reshape(-1, *shape).to(derived.tensor.dtype)
        for name, part in zip(wanted, _per_example_vjp(derived.tensor, list(wanted.values()), gradients), strict=True):
            if part is not None:
                self._consume(name, Direct(part), examples)


def _per_example_vjp(result: Tensor, sources: list[Tensor], gradients: Tensor) -> list[Tensor | None]:
    """Return the gradients of each example in each source; batched, and one by one where torch cannot."""
    try:
        parts = torch.autograd.grad(
            result, sources, gradients, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return list(parts)
    except RuntimeError:
        rows = [torch.autograd.grad(result, sources, g, retain_graph=True, allow_unused=True) for g in gradients]
        columns = zip(*rows, strict=True)
        return [None if column[0] is None else torch.stack(column) for column in columns]


class _Gate(torch.autograd.Function):
    """Changes nothing; a parameter reached only through gates is known to the rules."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Watch(torch.autograd.Function):
    """Changes nothing, tells the interception what reaches it, and keeps tensors as autograd's own nodes do.

    Marked as in place, so the result needs no copy and is no view of anything, and autograd itself orders what is done
    to it later.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, slot: Tensor, tap: Interception, call: _Call, *kept: Tensor) -> Tensor:
        ctx.mark_dirty(result)
        ctx.save_for_backward(*kept)
        ctx.tap, ctx.call, ctx.count = tap, call, 4 + len(kept)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if gradients[0] is not None:
            ctx.tap._reached(ctx.call, gradients[0], ctx.saved_tensors)
        return gradients[0], *(None for _ in range(ctx.count - 1))


class _Root(torch.autograd.Function):
    """Changes nothing; notes which backward pass starts here, for a loss may run others."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, tap: Interception) -> Tensor:
        ctx.tap = tap
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.tap._pass = torch._C._current_graph_task_id()
        return gradients[0], None


_OWN = tuple(function._backward_cls for function in (_Gate, _Watch, _Root))

# What a tensor is asked for that is no tensor: a fifth of what a language model calls.
_ASKED = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_floating_point", "__len__")),
    }
)


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return the real dtype that rounds more."""
    both = [dtype for dtype in (one, other) if dtype.is_floating_point]
    return max(both, key=lambda dtype: torch.finfo(dtype).eps, default=one)


def is_foreign(node: Any) -> bool:
    """Whether a node belongs to a ``torch.autograd.Function`` of somebody else."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) and not isinstance(node, _OWN)


def nodes_outside_rules(losses: Tensor) -> Iterator[Any]:
    """Yield the nodes of the losses' graph that are reached on a way without a gate."""
    gate = _Gate._backward_cls
    todo, seen = [losses.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or isinstance(node, gate):
            continue
        seen.add(node)
        yield node
        todo.extend(parent for parent, _ in node.next_functions)


def _as_is(result: Tensor, used: list[Tensor], args: Any, kwargs: Any) -> Passing | None:
    """A change of dtype or memory."""
    return (lambda contribution: contribution) if result.shape == used[0].shape else None


def _transposed(result: Tensor, used: list[Tensor], args: Any, kwargs: Any) -> Passing | None:
    if result.ndim == used[0].ndim == 3 and result.stride() == used[0].mT.stride() and result.shape == used[0].mT.shape:
        height, shape = result.shape[2], result.shape
        return lambda contribution: contribution.turned(shape, height)
    same = result.ndim == 2 and result.shape == used[0].shape[::-1]
    turned = same and result.stride() == used[0].stride()[::-1]
    return (lambda contribution: contribution.transposed()) if turned else None


def _item(result: Tensor, used: list[Tensor], args: Any, kwargs: Any) -> Passing | None:
    """One entry of the first dim, as an expert's matrix in a stack of them."""
    index = args[-1] if len(args) == 2 else kwargs.get("index")
    if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or result.shape != used[0].shape[1:] or result.ndim < 2:
        return None
    place, height = index % len(used[0]), len(result)
    return lambda contribution: contribution.inside(place, height)


# Of their second tensor they take the dtype or the shape only.
_SHAPE_ONLY = ("to", "type_as", "view_as", "reshape_as", "expand_as")


def _reshaped(result: Tensor, used: list[Tensor], args: Any, kwargs: Any) -> Passing | None:
    """The same entries in the same order."""
    rows = result.shape[0] if result.ndim > 1 else 1
    columns, shape = result.numel() // max(1, rows), used[0].shape
    return lambda contribution: Direct(contribution.dense(rows, columns).reshape(-1, *shape))


def _looked_up(result: Tensor, used: list[Tensor], args: Any, kwargs: Any) -> Passing | None:
    """Rows of an embedding that all examples share, as those of positions."""
    index = whole(args[0] if args else kwargs["input"])
    padding, renormalised, by_frequency = (
        args[place] if len(args) > place else kwargs.get(name)
        for place, name in ((2, "padding_idx"), (3, "max_norm"), (5, "scale_grad_by_freq"))
    )
    if padding is not None or renormalised is not None or by_frequency:
        return None  # that is autograd's business

    def passing(contribution: Contribution) -> Contribution:
        if isinstance(contribution, Placed) and index.ndim > 1:
            terms = contribution.terms
            return IndexedRows(index.reshape(len(terms), -1), terms.reshape(len(terms), -1, result.shape[-1]))
        if isinstance(contribution, IndexedRows) and index.ndim > 1:
            right = contribution.right
            own = index.flatten(1)[contribution.index].flatten(1)
            return IndexedRows(own, right.reshape(len(right), -1, result.shape[-1]))
        right = contribution.dense(result.shape[0], result.numel() // result.shape[0])
        right = right.reshape(len(right), index.numel(), -1)
        return IndexedRows(index.flatten().expand(len(right), -1), right)

    return passing


_PASSING: dict[str, Callable[..., Passing | None]] = {
    "embedding": _looked_up,
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"), _reshaped),
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"), _as_is),
    **dict.fromkeys(
        ("t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "adjoint", "movedim"), _transposed
    ),
    "getitem": _item,
}
