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


class _Own(NamedTuple):
    """The parameters of one layer and direction."""

    by_input: Tensor
    by_hidden: Tensor
    of_input: Tensor | None = None
    of_hidden: Tensor | None = None
    projection: Tensor | None = None


class _Product(NamedTuple):
    """What a weight was multiplied with, [b, t, i], and the results: one [b, t, o], or [b, o] of each step."""

    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    results: Sequence[Tensor]


def _layers(step: Step) -> Rule:
    """Whole layers over [b, t, i], or [t, b, i], or a packed sequence, which comes with other arguments."""

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
        if not isinstance(has_biases, bool):
            return _packed(
                step, tap, func, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
            )
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        directions = 1 + bidirectional
        weights = _owned(params, has_biases, num_layers * directions)
        axis = _axis(tap, input, states, 0 if batch_first else 1)
        if weights is None or (train and dropout) or axis is None:
            return NotImplemented
        results = func(
            input, hx, [tap.gate(p) for p in params], has_biases, num_layers, dropout, train, bidirectional, batch_first
        )

        def run(x: Tensor, *states: Tensor) -> tuple[list[Tensor], list[_Product]]:
            x = x if batch_first else x.transpose(0, 1)
            out, ends, products = _run(step, x, states, weights, directions)
            return [out if batch_first else out.transpose(0, 1), *ends], products

        turned = (not batch_first, *(True for _ in states))
        return _watched(tap, results, turned, axis, (input, *states), run)

    return rule


def _owned(params: Sequence[Tensor], has_biases: bool, count: int) -> list[_Own] | None:
    """Return the parameters by layer and direction; an LSTM may have a projection in each."""
    each, rest = divmod(len(params), count)
    plain = 4 if has_biases else 2
    if rest or each not in (plain, plain + 1):
        return None
    found = []
    for place in range(0, len(params), each):
        by_input, by_hidden, *biases = params[place : place + plain]
        of_input, of_hidden = biases or (None, None)
        projection = params[place + plain] if each > plain else None
        found.append(_Own(by_input, by_hidden, of_input, of_hidden, projection))
    return found


def _packed(
    step: Step,
    tap: Interception,
    func: Any,
    data: Tensor,
    sizes: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> Any:
    """Sequences of any lengths, the longest first: the first steps of all, then the second. Owners are measured."""
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 1 + bidirectional
    weights = _owned(params, has_biases, num_layers * directions)
    axis = _axis(tap, data, states, 0)
    if weights is None or (train and dropout) or axis is None:
        return NotImplemented
    gated = [tap.gate(p) for p in params]
    out, *ends = func(data, sizes, hx, gated, has_biases, num_layers, dropout, train, bidirectional)
    running = (torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]).to(data.device)  # [t, b]
    places = torch.zeros(running.shape, dtype=torch.int64, device=data.device)
    places[running] = torch.arange(len(data), device=data.device)
    inside = running.mT[..., None]

    def padded(rows: Tensor) -> Tensor:
        return rows[places.mT] * inside

    def run(x: Tensor, *states: Tensor) -> tuple[list[Tensor], list[_Product]]:
        found, last, products = _run(step, padded(x), states, weights, directions, inside)
        return [found, *last], products

    turned = (False, *(True for _ in states))
    watched = _watched(tap, (padded(out), *ends), turned, 0 if tap.examples == 1 else UNKNOWN, (data, *states), run)
    result = watched[0].transpose(0, 1)[running], *watched[1:]
    tap.place(result, *(UNKNOWN for _ in result))
    return result


def _cell(step: Step) -> Rule:
    """One step over [b, i]."""

    def rule(tap: Interception, func: Any, input: Tensor, hx: Any, *params: Any) -> Any:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        axis = _axis(tap, input, states, 0)
        if input.ndim != 2 or axis is None:
            return NotImplemented
        result = func(input, hx, *(tap.gate(p) for p in params))
        own = _Own(*params)

        def run(x: Tensor, *states: Tensor) -> tuple[list[Tensor], list[_Product]]:
            _, ends, products = _run(step, x[:, None], [s[None] for s in states], [own], 1)
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
    run: Callable[..., tuple[list[Tensor], list[_Product]]],
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
        sought = [result for product in products for result in product.results]
        found = iter(
            torch.autograd.grad(outs, sought, parts(wide(gradient)), allow_unused=True, materialize_grads=True)
        )
        for product in products:
            errors = [next(found) for _ in product.results]
            error = by_example(errors[0] if errors[0].ndim == 3 else torch.stack(errors, 1)).flatten(1, 2)
            if tap.chosen(product.weight):
                yield product.weight, Outer(error, by_example(product.inputs).flatten(1, 2))
            if product.bias is not None and tap.chosen(product.bias):
                yield product.bias, Sum(error)

    watched = tap.watch(flat, axis if axis == UNKNOWN else 0, 1, keep, contributions)
    out = tuple(_laid_out(part, like) for part, like in zip(parts(watched), results, strict=True))
    tap.place(out, *(UNKNOWN if axis == UNKNOWN else int(turn) for turn in turned))
    return out


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return it in the memory format of the function's own result, for models call ``view`` on that."""
    return part.contiguous() if like.is_contiguous() else part.transpose(0, 1).contiguous().transpose(0, 1)


def _run(
    step: Step,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[_Own],
    directions: int,
    inside: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[_Product]]:
    """Run layers over [b, t, i]; return the last one's output, the last states [l, b, h], and all products.

    Where a place [b, t, 1] is not ``inside`` its sequence, states stay as they are.
    """
    products, ends = [], []
    for place, own in enumerate(weights):
        if place % directions == 0:
            given, outs = x, []
        start = tuple(s[place] for s in states)
        backwards = place % 2 == 1 and directions == 2
        if backwards:
            out, end, made = _one(step, given.flip(1), start, own, None if inside is None else inside.flip(1))
        else:
            out, end, made = _one(step, given, start, own, inside)
        outs.append(out.flip(1) if backwards else out)
        ends.append(end)
        products += made
        x = torch.cat(outs, -1)
    return x, [torch.stack(last) for last in zip(*ends, strict=True)], products


def _one(
    step: Step, x: Tensor, states: States, own: _Own, inside: Tensor | None
) -> tuple[Tensor, States, list[_Product]]:
    """Run one layer in one direction."""
    given = _times(x, own.by_input, own.of_input)
    before, hidden, raw, projected, outs = [], [], [], [], []
    for t in range(x.shape[1]):
        before.append(states[0])
        hidden.append(_times(states[0], own.by_hidden, own.of_hidden))
        after = step(given[:, t], hidden[-1], states)
        if own.projection is not None:
            raw.append(after[0])
            projected.append(_times(after[0], own.projection))
            after = (projected[-1], *after[1:])
        if inside is not None:
            after = tuple(torch.where(inside[:, t], new, old) for new, old in zip(after, states, strict=True))
        states = after
        outs.append(states[0])
    products = [
        _Product(own.by_input, own.of_input, x.detach(), [given]),
        _Product(own.by_hidden, own.of_hidden, torch.stack(before, 1).detach(), hidden),
    ]
    if own.projection is not None:
        products.append(_Product(own.projection, None, torch.stack(raw, 1).detach(), projected))
    return torch.stack(outs, 1), states, products


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a product whose error can be asked for."""
    product = functional.linear(x, wide(weight.detach()), None if bias is None else wide(bias.detach()))
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
