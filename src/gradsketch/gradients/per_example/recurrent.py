"""Rules for recurrent layers: torch's own forward pass, and its steps run again in backward for the gates' errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gradsketch.gradients.per_example.contributions import Outer, Sum, wide
from gradsketch.gradients.per_example.interception import Interception, Report, Rule
from gradsketch.gradients.per_example.owners import Grouping
from gradsketch.gradients.per_example.provenance import SHARED, UNKNOWN

__all__ = ["RECURRENT"]

States = tuple[Tensor, ...]
# From the products with the input and with the hidden state, and the states, to the next states, the hidden one first.
Step = Callable[[Tensor, Tensor, States], States]


def _lstm(given: Tensor, hidden: Tensor, states: States) -> States:
    i, f, g, o = (given + hidden).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(given: Tensor, hidden: Tensor, states: States) -> States:
    (r, z, n), (hr, hz, hn) = given.chunk(3, -1), hidden.chunk(3, -1)
    z = (z + hz).sigmoid()
    return ((1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * states[0],)


def _tanh(given: Tensor, hidden: Tensor, states: States) -> States:
    return ((given + hidden).tanh(),)


def _relu(given: Tensor, hidden: Tensor, states: States) -> States:
    return ((given + hidden).relu(),)


class _Products(NamedTuple):
    """What the weights of one layer and direction were multiplied with, and the results."""

    weights: Sequence[Tensor]
    inputs: tuple[Tensor, Tensor]
    results: tuple[Tensor, list[Tensor]]


def _layers(step: Step) -> Rule:
    """Whole layers over [b, t, i], or [t, b, i]; packed sequences come with other arguments and have no rule."""

    def rule(
        tap: Interception,
        func: Any,
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        train: Any,
        bidirectional: Any,
        batch_first: Any,
    ) -> Any:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if not isinstance(has_biases, bool):
            return NotImplemented
        each = 4 if has_biases else 2
        plain = len(params) == each * num_layers * (1 + bidirectional)
        axis = _axis(tap, input, states, 0 if batch_first else 1)
        if not plain or (train and dropout) or axis is None:
            return NotImplemented
        weights = [params[place : place + each] for place in range(0, len(params), each)]
        results = func(
            input, hx, [tap.gate(p) for p in params], has_biases, num_layers, dropout, train, bidirectional, batch_first
        )

        def run(x: Tensor, *states: Tensor) -> tuple[list[Tensor], list[_Products]]:
            x = x if batch_first else x.transpose(0, 1)
            out, ends, products = _run(step, x, states, weights, 1 + bidirectional)
            return [out if batch_first else out.transpose(0, 1), *ends], products

        turned = (not batch_first, *(True for _ in states))
        return _watched(tap, results, turned, axis, (input, *states), run)

    return rule


def _cell(step: Step) -> Rule:
    """One step over [b, i]."""

    def rule(tap: Interception, func: Any, input: Tensor, hx: Any, *params: Any) -> Any:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        axis = _axis(tap, input, states, 0)
        if input.ndim != 2 or axis is None:
            return NotImplemented
        result = func(input, hx, *(tap.gate(p) for p in params))
        weights = [p for p in params if p is not None]

        def run(x: Tensor, *states: Tensor) -> tuple[list[Tensor], list[_Products]]:
            _, ends, products = _run(step, x[:, None], [s[None] for s in states], [weights], 1)
            return [end[0] for end in ends], products

        several = isinstance(result, tuple)
        results = _watched(
            tap, result if several else (result,), (False, False)[: len(states)], axis, (input, *states), run
        )
        if several:
            return results
        tap.place(results[0], axis)
        return results[0]

    return rule


def _axis(tap: Interception, input: Tensor, states: States, place: int) -> int | None:
    """Return where the examples stand in a result, or None where a rule cannot work."""
    axis = tap.axis(input)
    if axis == SHARED or any(tap.chosen(t) for t in (input, *states)):
        return None
    if tap.examples == 1:
        return place
    return axis if axis in (place, UNKNOWN) else None


def _watched(
    tap: Interception,
    results: tuple[Tensor, ...],
    turned: Sequence[bool],
    axis: int,
    keep: tuple[Tensor, ...],
    run: Callable[..., tuple[list[Tensor], list[_Products]]],
) -> tuple[Tensor, ...]:
    """Watch several results as one tensor [b, …]; those that are ``turned`` have the examples in dim 1."""
    rows = [r.transpose(0, 1) if turn else r for r, turn in zip(results, turned, strict=True)]
    flat = torch.cat([r.flatten(1) for r in rows], 1)
    shapes = [r.shape for r in rows]

    def parts(whole: Tensor) -> list[Tensor]:
        cut = whole.split([shape[1:].numel() for shape in shapes], 1)
        cut = [part.reshape(shape) for part, shape in zip(cut, shapes, strict=True)]
        return [part.transpose(0, 1) if turn else part for part, turn in zip(cut, turned, strict=True)]

    def contributions(by_example: Grouping, gradient: Tensor, *kept: Tensor) -> Iterator[Report]:
        with torch.enable_grad():
            outs, products = run(*(wide(t.detach()) for t in kept))
        sought = [t for p in products for t in (p.results[0], *p.results[1])]
        found = iter(
            torch.autograd.grad(outs, sought, parts(wide(gradient)), allow_unused=True, materialize_grads=True)
        )
        for weights, inputs, (_, steps) in products:
            of_input, of_hidden = next(found), torch.stack([next(found) for _ in steps], 1)
            for place, weight in enumerate(weights):
                error = by_example((of_input, of_hidden)[place % 2]).flatten(1, 2)
                if tap.chosen(weight):
                    yield weight, Outer(error, by_example(inputs[place]).flatten(1, 2)) if place < 2 else Sum(error)

    watched = tap.watch(flat, axis if axis == UNKNOWN else 0, 1, keep, contributions)
    out = tuple(_laid_out(part, like) for part, like in zip(parts(watched), results, strict=True))
    tap.place(out, *(UNKNOWN if axis == UNKNOWN else int(turn) for turn in turned))
    return out


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return it in the memory format of the function's own result, for models call ``view`` on that."""
    return part.contiguous() if like.is_contiguous() else part.transpose(0, 1).contiguous().transpose(0, 1)


def _run(
    step: Step, x: Tensor, states: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], directions: int
) -> tuple[Tensor, list[Tensor], list[_Products]]:
    """Run layers over [b, t, i]; return the last one's output, the last states [l, b, h], and all products."""
    products, ends = [], []
    for place, own in enumerate(weights):
        if place % directions == 0:
            given, outs = x, []
        backwards = place % 2 == 1 and directions == 2
        start = tuple(s[place] for s in states)
        out, end, made = _one(step, given.flip(1) if backwards else given, start, own)
        outs.append(out.flip(1) if backwards else out)
        ends.append(end)
        products.append(made)
        x = torch.cat(outs, -1)
    return x, [torch.stack(last) for last in zip(*ends, strict=True)], products


def _one(step: Step, x: Tensor, states: States, weights: Sequence[Tensor]) -> tuple[Tensor, States, _Products]:
    """Run one layer in one direction."""
    by_input, by_hidden, *biases = (wide(w.detach()) for w in weights)
    of_input, of_hidden = biases or (None, None)
    given = _sought(functional.linear(x, by_input, of_input))
    before, steps, outs = [], [], []
    for t in range(x.shape[1]):
        before.append(states[0])
        steps.append(_sought(functional.linear(states[0], by_hidden, of_hidden)))
        states = step(given[:, t], steps[-1], states)
        outs.append(states[0])
    products = _Products(weights, (x.detach(), torch.stack(before, 1).detach()), (given, steps))
    return torch.stack(outs, 1), states, products


def _sought(product: Tensor) -> Tensor:
    """Return a tensor whose error can be asked for."""
    return product if product.requires_grad else product.requires_grad_()


RECURRENT: dict[Any, Rule] = {
    torch.lstm: _layers(_lstm),
    torch.gru: _layers(_gru),
    torch.rnn_tanh: _layers(_tanh),
    torch.rnn_relu: _layers(_relu),
    torch.lstm_cell: _cell(_lstm),
    torch.gru_cell: _cell(_gru),
    torch.rnn_tanh_cell: _cell(_tanh),
    torch.rnn_relu_cell: _cell(_relu),
}
