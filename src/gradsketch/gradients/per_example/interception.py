"""See every use of a parameter in a forward pass, and what backward brings to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from gradsketch.gradients.per_example.contributions import Consumer, Contribution, Direct
from gradsketch.gradients.per_example.layout import Layouts
from gradsketch.transforms.precision import full_precision

__all__ = ["Interception", "Rule", "reached"]

# From the gradient that reaches a call's result, and the tensors kept from it, to the parameters' contributions.
Contributions = Callable[..., Iterable[tuple[Tensor, Contribution]]]
# Replaces a torch function: same arguments after the interception, same result, or NotImplemented.
Rule = Callable[..., Any]


class Interception(TorchFunctionMode):
    """Runs torch functions as they are, except those that use a chosen parameter in a way some rule knows.

    Such a call gets the parameter detached, so autograd neither makes nor keeps anything for its gradient, and its
    result is watched: when backward reaches it, the rule's contributions go to ``consume``. A use that no rule knows
    stays in the graph, where ``reached`` finds it. Works at the level of functions, so that subclassed layers, tied
    weights and functional uses need no treatment of their own.

    A tensor computed from parameters alone, such as ``1 + weight.float()``, counts as chosen too; what reaches it goes
    on to its parameters by a small backward pass of its own.
    """

    def __init__(
        self, rules: Mapping[Any, Rule], names: Mapping[int, str], layouts: Layouts, consume: Consumer
    ) -> None:
        super().__init__()
        self.rules, self.names, self.layouts, self.consume = rules, names, layouts, consume
        self.examples = layouts.examples
        self.slow: set[str] = set()
        self._call = ""
        self._derived: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._anchors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [a for a in (*args, *kwargs.values()) if self.chosen(a)] if torch.is_grad_enabled() else []
        if used and func in self.rules:
            self._call = f"{func.__name__}({','.join(name for tensor in used for name in self._origin(tensor))})"
            result = self.rules[func](self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if used:
            self._derive(result, used, (*args, *kwargs.values()))
        elif isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
            self.layouts.note_flattening(args[0].shape, result.shape)
        return result

    def chosen(self, tensor: Any) -> bool:
        """Whether this is one of the parameters whose gradients are wanted, or made of nothing else."""
        return id(tensor) in self.names or id(tensor) in self._derived

    def plain(self, tensor: Tensor) -> Tensor:
        """Return a chosen parameter without its place in the graph, anything else as it is."""
        return tensor.detach() if self.chosen(tensor) else tensor

    def split(self, leading: torch.Size) -> tuple[int, int] | None:
        """Return (b, t) for the leading dims of a call, or None where examples cannot be told apart."""
        return self.layouts.split(self._call, leading)

    def shared(self, index: Tensor) -> Tensor:
        """Give every example a copy of an index that all share, ``[1, t]`` or ``[t]``."""
        return self.layouts.unshare(self._call, index)

    def backward(self, losses: Tensor, weights: Tensor, *, again: bool = False) -> None:
        """Run backward from the losses so that every watched result reports; ``again`` if it will run once more."""
        leaves = list(reached(losses))
        if leaves:
            with self._inside_modules():
                torch.autograd.grad(losses, leaves, weights, allow_unused=True, retain_graph=again)

    @contextmanager
    def _inside_modules(self) -> Iterator[None]:
        """Intercept what modules run meanwhile, on whichever thread: checkpointed layers run again during backward."""
        local = threading.local()

        def enter(*_: Any) -> None:
            local.depth = getattr(local, "depth", 0) + 1
            if local.depth == 1:
                self.__enter__()

        def leave(*_: Any) -> None:
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

    def watch(self, result: Tensor, keep: tuple[Tensor, ...], contributions: Contributions) -> Tensor:
        """Return the result, from now on reporting ``contributions(gradient, *keep)`` when backward reaches it."""
        if not result.requires_grad:
            result = result + self._anchor(result)
        node, call = _Keep.apply(self._anchor(result), *keep).grad_fn, self._call

        def report(gradient: Tensor) -> None:
            # Detached: a consumer that keeps contributions would otherwise keep the graph, which keeps the consumer.
            kept = (tensor.detach() for tensor in node.saved_tensors)
            self._report(call, contributions(gradient, *kept))

        result.register_hook(report)
        return result

    def per_example(self, parameter: Tensor, ndim: int) -> Tensor:
        """Return one copy of the parameter an example, [b, 1, …, *shape] of ``ndim`` dims, whose gradient counts."""
        shape = parameter.shape[1:] if parameter.ndim == ndim else parameter.shape
        copies = parameter.detach().view(1, *[1] * (ndim - 1 - len(shape)), *shape)
        copies = copies.expand(self.examples, *copies.shape[1:]) + self._anchor(parameter)
        return self.watch(copies, (), lambda gradient: [(parameter, Direct(gradient))])

    def _report(self, call: str, contributions: Iterable[tuple[Tensor, Contribution]]) -> None:
        with torch.no_grad():
            for tensor, contribution in contributions:
                self.layouts.check(call, contribution)
                if id(tensor) in self._derived:
                    self._pass_on(tensor, contribution)
                elif id(tensor) in self.names:
                    self._consume(self.names[id(tensor)], contribution)

    def _consume(self, name: str, contribution: Contribution) -> None:
        if name not in self.slow:
            with full_precision(contribution.device):
                self.consume(name, contribution)

    def _derive(self, result: Any, used: list[Any], args: tuple[Any, ...]) -> None:
        """Remember a result that depends on chosen parameters and on no other tensor."""
        others = [a for a in args if not self.chosen(a)]
        if any(isinstance(a, Tensor | tuple | list) and not _plain_numbers(a) for a in others):
            return
        parameters = {name: tensor for u in used for name, tensor in self._origin(u).items()}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in self.names:
                self._derived[id(tensor)] = tensor, parameters

    def _origin(self, tensor: Tensor) -> dict[str, Tensor]:
        return self._derived[id(tensor)][1] if id(tensor) in self._derived else {self.names[id(tensor)]: tensor}

    def _pass_on(self, derived: Tensor, contribution: Contribution) -> None:
        parameters = self._origin(derived)
        rows = derived.shape[0] if derived.ndim > 1 else 1
        gradients = contribution.dense(rows, derived.numel() // rows)
        parts = torch.autograd.grad(
            derived,
            list(parameters.values()),
            gradients.view(-1, *derived.shape).to(derived.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        for name, part in zip(parameters, parts, strict=True):
            if part is not None:
                self._consume(name, Direct(part))

    def _anchor(self, like: Tensor) -> Tensor:
        """Return the zero that every watched result depends on, so that backward reaches them all."""
        key = like.dtype, like.device
        if key not in self._anchors:
            self._anchors[key] = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        return self._anchors[key]


class _Keep(torch.autograd.Function):
    """A node that only keeps tensors, so that activation checkpointing and offloading treat them as autograd's own."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("nothing depends on this node")


def reached(losses: Tensor) -> Iterator[Tensor]:
    """Yield the tensors in which the graph of the losses begins: where backward would leave a gradient."""
    todo, seen = [losses.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo.extend(parent for parent, _ in node.next_functions)


def _plain_numbers(value: Any) -> bool:
    """Whether an argument is a constant number or a sequence of them, such as a shape."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.requires_grad
    return all(not isinstance(v, Tensor) for v in value)
