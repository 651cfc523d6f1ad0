"""How each torch function's parameters get their per-example gradients.

A rule takes the interception, the function and its arguments under torch's own names. It calls the function with the
parameters behind gates, and has the result watched with a function that says what the parameters get from the gradient
that reaches it: see ``Contribution``. It returns NotImplemented where it does not know.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gradsketch.gradients.per_example.composed import COMPOSED
from gradsketch.gradients.per_example.contributions import (
    Contribution,
    Direct,
    IndexedRows,
    Inside,
    Outer,
    Placed,
    Sum,
    wide,
)
from gradsketch.gradients.per_example.interception import Interception, Report, Rule
from gradsketch.gradients.per_example.owners import Grouping
from gradsketch.gradients.per_example.provenance import SHARED, UNKNOWN, Axis, einsum_letters, is_full, tensors_in
from gradsketch.gradients.per_example.recurrent import RECURRENT

__all__ = ["RULES", "TRANSPARENT"]

Reports = Iterator[Report]


def _linear(tap: Interception, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.ndim == 1 and bias is None and tap.chosen(weight):
        return _with_vector(tap, func, input, weight)
    if weight.ndim != 2 or input.ndim < 2 or not _has_examples(tap, input, input.ndim - 1):
        return NotImplemented
    flat = func(input.flatten(0, -2), tap.gate(weight), tap.gate(bias))
    return _product(tap, flat, input, weight, bias, transposed=False)


def _addmm(
    tap: Interception, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if input.ndim != 1 or not _has_examples(tap, mat1, 1) or not tap.chosen(mat2):
        return NotImplemented
    flat = func(tap.gate(input), mat1, tap.gate(mat2), beta=beta, alpha=alpha)
    return _product(tap, flat, mat1, mat2, input, transposed=True, alpha=alpha, beta=beta)


def _matmul(tap: Interception, func: Any, input: Tensor, other: Tensor) -> Any:
    if isinstance(other, Tensor) and other.ndim == 3 and input.ndim == 3:
        return _bmm(tap, func, input, other)
    if other.ndim == 1:
        return _with_vector(tap, func, input, other) if tap.chosen(other) else _mv(tap, func, input, other)
    if not tap.chosen(other) or other.ndim != 2 or input.ndim < 2 or not _has_examples(tap, input, input.ndim - 1):
        return _replay(tap, func, input, other)
    flat = torch.mm(input.flatten(0, -2), tap.gate(other))
    return _product(tap, flat, input, other, None, transposed=True)


def _product(
    tap: Interception,
    flat: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
    alpha: Any = 1,
    beta: Any = 1,
) -> Tensor:
    """Watch [r, o], alpha times the product of the flattened input with a matrix plus beta times a bias."""
    leading, width = input.shape[:-1], flat.shape[-1]

    def contributions(rows: Grouping, gradient: Tensor, *kept: Tensor) -> Reports:
        errors = rows(gradient.reshape(*leading, width))
        for inputs in kept:
            factors = errors if alpha == 1 else alpha * errors, rows(inputs)
            yield weight, Outer(*factors[::-1]) if transposed else Outer(*factors)
        if tap.chosen(bias):
            assert bias is not None
            yield bias, Sum(errors if beta == 1 else beta * errors)

    keep = (input,) if tap.chosen(weight) else ()
    watched = tap.watch(flat, tap.axis(input), len(leading), keep, contributions, leading)
    # No view, as what the function itself returns is none: FSDP2 loses its hook on a view that is written to.
    return torch.ops.aten._unsafe_view.default(watched, [*leading, width])  # type: ignore[no-any-return]


def _with_vector(tap: Interception, func: Any, input: Tensor, vector: Tensor) -> Any:
    """[…, i] times a vector [i]."""
    if input.ndim < 2 or not _has_examples(tap, input, input.ndim - 1):
        return NotImplemented
    flat = torch.mv(input.flatten(0, -2), tap.gate(vector))[:, None].clone()
    result = _product(tap, flat, input, vector, None, transposed=False)[..., 0]
    tap.place(result, tap.axis(input))
    return result


def _inner(tap: Interception, func: Any, input: Tensor, other: Tensor) -> Any:
    fits = tap.chosen(other) and not tap.chosen(input) and other.ndim in (1, 2)
    rule = _linear if fits and other.ndim == 2 else _with_vector
    result = rule(tap, functional.linear, input, other) if fits else NotImplemented
    if isinstance(result, Tensor):
        tap.place(result, tap.axis(input))
    return result


def _mv(tap: Interception, func: Any, input: Tensor, vec: Tensor) -> Any:
    """A matrix times the vector of one example, as in a loop over the examples."""
    if not tap.chosen(input) or tap.chosen(vec) or tap.axis(vec) == SHARED:
        return NotImplemented
    axis = 0 if tap.examples == 1 else UNKNOWN

    def contributions(rows: Grouping, gradient: Tensor, inputs: Tensor) -> Reports:
        yield input, Outer(rows(gradient), rows(inputs))

    watched = tap.watch(func(tap.gate(input), vec)[None].clone(), axis, 1, (vec[None],), contributions)
    return watched[0]


def _grouped_mm(
    tap: Interception, func: Any, input: Tensor, weight: Tensor, offs: Any = None, bias: Any = None, **options: Any
) -> Any:
    """Rows sorted by expert, each multiplied with its expert's matrix; ``offs`` says where each expert's rows end."""
    known = isinstance(offs, Tensor) and bias is None and weight.ndim == 3 and tap.chosen(weight) and input.ndim == 2
    if not known or tap.chosen(input) or tap.axis(input) == SHARED:
        return NotImplemented
    result = func(input, tap.gate(weight), offs=offs, **options)

    def contributions(rows: Grouping, gradient: Tensor, inputs: Tensor, ends: Tensor) -> Reports:
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                mine = rows.part(start, end)
                outer = Outer(mine(inputs[start:end]), mine(gradient[start:end]))
                yield weight, Inside(outer, expert, weight.shape[1])
            start = end

    return tap.watch(result, 0 if tap.examples == 1 else UNKNOWN, 1, (input, offs), contributions)


def _bmm(tap: Interception, func: Any, input: Tensor, mat2: Tensor) -> Any:
    """A stack of matrices, each with rows of its own."""
    result = _stacked(tap, lambda weight: func(input, weight), input, mat2, None)
    return _replay(tap, func, input, mat2) if result is NotImplemented else result


def _baddbmm(tap: Interception, func: Any, input: Tensor, batch1: Tensor, batch2: Tensor, **options: Any) -> Any:
    plain = not options and input.ndim == 3 and input.shape[1] == 1 and input.shape[0] == len(batch2)
    if not plain or (tap.axis(input) != SHARED and not tap.chosen(input)):
        return _replay(tap, func, input, batch1, batch2, **options)
    return _stacked(tap, lambda weight: func(tap.gate(input), batch1, weight), batch1, batch2, input)


def _stacked(
    tap: Interception, product: Callable[[Tensor], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Any:
    """[e, r, i] times [e, i, o], plus [e, 1, o]."""
    fits = input.ndim == weight.ndim == 3 and tap.chosen(weight) and not tap.chosen(input)
    axis = tap.axis(input) if fits else SHARED
    axis = 1 if tap.examples == 1 and fits else axis
    if axis not in (1, UNKNOWN) or input.shape[0] != weight.shape[0]:
        return NotImplemented
    size = input.shape[1]

    def contributions(rows: Grouping, gradient: Tensor, inputs: Tensor) -> Reports:
        for place, (x, g) in enumerate(zip(inputs, gradient, strict=True)):
            mine = rows.part(place * size, (place + 1) * size)
            yield weight, Inside(Outer(mine(x), mine(g)), place, weight.shape[1])
            if tap.chosen(bias):
                assert bias is not None
                yield bias, Inside(Sum(mine(g)), place, 1)

    return tap.watch(product(tap.gate(weight)), axis, 2, (input,), contributions)


def _cat(tap: Interception, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Tensors made of parameters beside the examples' own, along another dim."""
    others = [t for t in tensors if not tap.chosen(t)]
    if not others or not all(isinstance(t, Tensor) and t.ndim for t in tensors):
        return NotImplemented
    result = func([tap.gate(t) for t in tensors], dim)
    if _axis_of(tap, func, (tensors, dim), {}, result) != 0 or dim % result.ndim == 0:
        return NotImplemented
    dim = dim % result.ndim
    sizes = [t.shape[dim] for t in tensors]
    parameters = [t if tap.chosen(t) else None for t in tensors]

    def contributions(rows: Grouping, gradient: Tensor) -> Reports:
        for tensor, part in zip(parameters, gradient.split(sizes, dim), strict=True):
            if tensor is not None:
                yield tensor, Placed(part.reshape(tap.examples, -1, *part.shape[1:]))

    return tap.watch(result, 0, 1, (), contributions)


def _embedding(
    tap: Interception,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if scale_grad_by_freq or max_norm is not None or not _has_examples(tap, input, input.ndim):
        return NotImplemented
    return _rows_of(tap, func(input, tap.gate(weight), padding_idx), input, weight, padding_idx)


def _item(tap: Interception, func: Any, table: Tensor, index: Any) -> Any:
    """Rows of a table, chosen by an index of the examples."""
    places = (
        index[0] if isinstance(index, tuple) and index and all(i is ... or is_full(i) for i in index[1:]) else index
    )
    return _chosen_rows(tap, lambda table: func(table, index), table, places)


def _chosen_rows(tap: Interception, choose: Callable[[Tensor], Tensor], table: Tensor, index: Any) -> Any:
    whole = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype not in (torch.bool, torch.uint8)
    if not whole or not tap.chosen(table) or not _has_examples(tap, index, index.ndim):
        return NotImplemented
    return _rows_of(tap, choose(tap.gate(table)), index, table, None)


def _index_select(tap: Interception, func: Any, input: Tensor, dim: int, index: Tensor) -> Any:
    return _chosen_rows(tap, lambda table: func(table, 0, index), input, index) if dim == 0 else NotImplemented


def _gather(tap: Interception, func: Any, input: Tensor, dim: int, index: Tensor, **options: Any) -> Any:
    """Entries of a table [n, c] at places [r, c] of the examples: one from each column."""
    fits = tap.chosen(input) and input.ndim == index.ndim == 2 and dim in (0, -2) and index.shape[1] == input.shape[1]
    if not fits or not _has_examples(tap, index, 1):
        return NotImplemented
    columns = torch.arange(input.shape[1], device=index.device)

    def contributions(rows: Grouping, gradient: Tensor, index: Tensor) -> Reports:
        places, errors = rows(index) * input.shape[1] + columns, rows(gradient)
        yield input, Direct(_scattered(places.flatten(1), errors.flatten(1)[..., None], input.numel()))

    return tap.watch(func(tap.gate(input), dim, index, **options), tap.axis(index), 1, (index,), contributions)


def _take_along_dim(tap: Interception, func: Any, input: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or input.ndim != 2 or indices.ndim != 2:
        return NotImplemented
    expanded, axis = indices.expand(-1, input.shape[1]), tap.axis(indices)
    tap.provenance.place(expanded, axis)
    return _gather(tap, torch.gather, input, dim, expanded)


def _rows_of(tap: Interception, result: Tensor, index: Tensor, table: Tensor, padding: int | None) -> Tensor:
    def contributions(rows: Grouping, gradient: Tensor, index: Tensor) -> Reports:
        width = table.shape[1:].numel()
        places, errors = rows(index) % len(table), rows(gradient.reshape(*index.shape, width))
        if padding is not None:
            errors = errors.masked_fill((places == padding % len(table))[..., None], 0)
        yield table, IndexedRows(places, errors) if table.ndim > 1 else Direct(_scattered(places, errors, len(table)))

    return tap.watch(result, tap.axis(index), index.ndim, (index,), contributions)


def _scattered(places: Tensor, errors: Tensor, size: int) -> Tensor:
    out = wide(errors).new_zeros(len(errors), size)
    return out.scatter_add_(1, places, wide(errors).squeeze(-1))


def _convolution(dims: int) -> Rule:
    def rule(
        tap: Interception,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if input.ndim == dims + 1 and not tap.chosen(input) and tap.axis(input) != SHARED:
            # Without a dim for the batch, as in a loop over the examples.
            alone = input[None]
            tap.provenance.place(alone, UNKNOWN)
            return rule(tap, func, alone, weight, bias, stride, padding, dilation, groups)[0]
        if input.ndim != dims + 2 or not _has_examples(tap, input, 1):
            return NotImplemented
        result = func(input, tap.gate(weight), tap.gate(bias), stride, padding, dilation, groups)

        def contributions(rows: Grouping, gradient: Tensor, *kept: Tensor) -> Reports:
            errors = rows(gradient.flatten(2).mT).flatten(1, 2)
            for inputs in kept:
                patches = _patches(inputs, weight.shape[2:], gradient.shape[2:], stride, padding, dilation)
                yield weight, _grouped(errors, rows(patches).flatten(1, 2), groups)
            if tap.chosen(bias):
                assert bias is not None
                yield bias, Sum(errors)

        return tap.watch(result, tap.axis(input), 1, (input,) if tap.chosen(weight) else (), contributions)

    return rule


def _grouped(errors: Tensor, patches: Tensor, groups: int) -> Contribution:
    """Return the contribution of a convolution with groups, given errors [b, t, o] and patches [b, t, i·k]."""
    if groups == 1:
        return Outer(errors, patches)
    b, t = errors.shape[:2]
    left, right = (wide(x).view(b, t, groups, -1).transpose(1, 2) for x in (errors.contiguous(), patches))
    return Direct((left.mT @ right).flatten(1, 2))


def _patches(
    x: Tensor, kernel: Sequence[int], output: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """Return the window that each output position saw: [b, t, i·k], columns in the order of the flattened weight."""
    dims = len(kernel)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if isinstance(padding, str):
        before = [r // 2 if padding == "same" else 0 for r in reach]
        after = [r - r // 2 if padding == "same" else 0 for r in reach]
    else:
        before = after = _each(padding, dims)
    x = functional.pad(x, [side for both in zip(reversed(before), reversed(after), strict=True) for side in both])
    for dim in range(dims):
        length, step = reach[dim] + 1, strides[dim]
        x = x.unfold(2 + dim, length, step).narrow(2 + dim, 0, output[dim])[..., :: dilations[dim]]
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.permute(order).reshape(len(x), -1, x.shape[1] * torch.Size(kernel).numel())


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * dims if len(values) == 1 else values)]


def _layer_norm(
    tap: Interception,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = list(normalized_shape)
    if not _has_examples(tap, input, input.ndim - len(shape)):
        return NotImplemented
    result = func(input, shape, tap.gate(weight), tap.gate(bias), eps)
    return _scaled(tap, result, input, weight, bias, len(shape), lambda x: functional.layer_norm(x, shape, eps=eps))


def _rms_norm(
    tap: Interception,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    shape = list(normalized_shape)
    if not _has_examples(tap, input, input.ndim - len(shape)):
        return NotImplemented
    result = func(input, shape, tap.gate(weight), eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(tap, result, input, weight, None, len(shape), lambda x: functional.rms_norm(x, shape, eps=eps))


def _scaled(
    tap: Interception,
    result: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    inner: int,
    normalise: Callable[[Tensor], Tensor],
) -> Any:
    """Weight and bias over the last ``inner`` dims."""

    def contributions(rows: Grouping, gradient: Tensor, *kept: Tensor) -> Reports:
        errors = wide(gradient)
        for x in kept:
            assert weight is not None
            yield weight, Sum(rows(errors * normalise(wide(x))))
        if tap.chosen(bias):
            assert bias is not None
            yield bias, Sum(rows(errors))

    return tap.watch(result, tap.axis(input), input.ndim - inner, (input,) if tap.chosen(weight) else (), contributions)


def _group_norm(
    tap: Interception,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not _has_examples(tap, input, 1):
        return NotImplemented
    result = func(input, num_groups, tap.gate(weight), tap.gate(bias), eps)
    return _channels(tap, result, input, weight, bias, lambda x: functional.group_norm(x, num_groups, eps=eps))


def _batch_norm(
    tap: Interception,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not _has_examples(tap, input, 1) or training:
        return NotImplemented
    result = func(input, running_mean, running_var, tap.gate(weight), tap.gate(bias), False, momentum, eps)

    def normalise(x: Tensor) -> Tensor:
        mean, variance = (wide(s).to(x.dtype) for s in (running_mean, running_var) if s is not None)
        return functional.batch_norm(x, mean, variance, eps=eps)

    return _channels(tap, result, input, weight, bias, normalise)


def _channels(
    tap: Interception,
    result: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Any:
    """Weight and bias per channel, dim 1."""

    def terms(rows: Grouping, x: Tensor) -> Tensor:
        return rows(x.reshape(*x.shape[:2], -1).mT).flatten(1, 2)

    def contributions(rows: Grouping, gradient: Tensor, *kept: Tensor) -> Reports:
        errors = wide(gradient)
        for x in kept:
            assert weight is not None
            yield weight, Sum(terms(rows, errors * normalise(wide(x))))
        if tap.chosen(bias):
            assert bias is not None
            yield bias, Sum(terms(rows, errors))

    return tap.watch(result, tap.axis(input), 1, (input,) if tap.chosen(weight) else (), contributions)


# What a parameter p gets, entry by entry, from the gradient g, the other operand x and p itself.
Entries = Callable[[Tensor, Tensor, Tensor], Tensor]


def _elementwise(first: Entries, second: Entries, keeps: bool) -> Rule:
    """A parameter as first or second operand of an operation that broadcasts."""

    def rule(tap: Interception, func: Any, input: Any, other: Any, **options: Any) -> Any:
        parameter, x, entries = (input, other, first) if tap.chosen(input) else (other, input, second)
        if not isinstance(x, Tensor) or tap.chosen(x) or tap.axis(x) == SHARED or set(options) - {"alpha"}:
            return NotImplemented
        factor = options.get("alpha", 1) if parameter is other else 1
        if keeps and _in_place(func):  # x is gone before it could be kept
            return NotImplemented
        late = _in_place(func) and parameter is other  # what is written to must not be written to twice
        result = x if late else func(tap.gate(input), tap.gate(other), **options)
        axis = tap.axis(x) if late else _axis_of(tap, func, (input, other), options, result)
        shape, leading = _aligned(parameter.shape, result.ndim, axis)
        each = result.ndim > 0 and shape[:1] == [result.shape[0]] and len(result) > 1
        own = axis in (0, UNKNOWN) and each and tap.examples > 1  # one entry per example, or more
        if leading < 1 and not own and tap.examples > 1:
            return NotImplemented
        result = func(tap.gate(input), tap.gate(other), **options) if late else result
        whole = result.shape

        def contributions(rows: Grouping, gradient: Tensor, *kept: Tensor) -> Reports:
            given = entries(wide(gradient), wide(kept[0]) if kept else gradient, wide(parameter.detach())) * factor
            if tap.examples == 1:  # whatever dims there are, all of them are this example's
                yield parameter, Direct(given.expand(whole).sum_to_size(parameter.shape)[None])
                return
            if own:
                alike = [dim for dim, size in enumerate(shape) if size == 1]
                given = given.expand(whole).sum(alike, keepdim=True) if alike else given.expand(whole)
                yield parameter, _of_each(rows, given.reshape(-1, *shape[1:]), axis)
                return
            terms = _terms(rows, given.expand(whole), axis, leading, shape)
            yield parameter, Sum(terms.reshape(*terms.shape[:2], *parameter.shape))

        leading = 1 if own else leading if axis < 0 else axis + 1
        return tap.watch(result, axis, leading, (x,) if keeps else (), contributions)

    return rule


def _of_each(rows: Grouping, entries: Tensor, axis: Axis) -> Contribution:
    """Return the contribution to a tensor with entries of each example's own in its first dim."""
    if axis == 0:
        return Placed(entries.reshape(rows.examples, -1, *entries.shape[1:]))
    return IndexedRows(rows(torch.arange(len(entries), device=entries.device)), rows(entries).flatten(2))


def _where(tap: Interception, func: Any, condition: Tensor, input: Any, other: Any) -> Any:
    """Parameters where a condition holds, or where it does not, repeated along leading dims."""
    if tap.chosen(condition):
        return NotImplemented
    args = condition, input, other
    result = func(condition, tap.gate(input), tap.gate(other))
    axis = _axis_of(tap, func, args, {}, result)
    parts = []
    for place, parameter in enumerate((input, other)):
        if tap.chosen(parameter):
            shape, leading = _aligned(parameter.shape, result.ndim, axis)
            parts.append((parameter, place, shape, leading))
    least = min(leading for *_, leading in parts)
    if least < 1 or all(tap.axis(t) == SHARED for t in tensors_in(args)):
        return _replay(tap, func, *args)
    whole = result.shape

    def contributions(rows: Grouping, gradient: Tensor, condition: Tensor) -> Reports:
        for parameter, place, shape, _ in parts:
            given = gradient.masked_fill(~condition if place == 0 else condition, 0)
            terms = _terms(rows, given.expand(whole), axis, least, shape)
            yield parameter, Sum(terms.reshape(*terms.shape[:2], *parameter.shape))

    return tap.watch(result, axis, least, (condition,), contributions)


def _attention(
    tap: Interception,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    *args: Any,
    **named: Any,
) -> Any:
    """A mask made of parameters, as relative positions are, repeated for each example."""
    mine = tap.axis(query)
    fits = tap.chosen(attn_mask) and not any(map(tap.chosen, (query, key, value))) and mine in (0, UNKNOWN)
    shape, leading = _aligned(attn_mask.shape, query.ndim, 0) if fits and query.ndim > 2 else ([], 0)
    if leading != 1:
        return _replay(tap, func, query, key, value, attn_mask, *args, **named)

    def contributions(rows: Grouping, gradient: Tensor) -> Reports:
        terms = rows(gradient)
        yield attn_mask, Sum(terms.reshape(*terms.shape[:2], *attn_mask.shape))

    each = tap.gate(attn_mask).expand(len(query), *shape[1:]).clone()
    return func(query, key, value, tap.watch(each, mine, 1, (), contributions), *args, **named)


def _in_place(func: Any) -> bool:
    name = func.__name__
    return bool(name.startswith("__i") or (name.endswith("_") and not name.startswith("__")))


def _aligned(shape: torch.Size, ndim: int, axis: Axis) -> tuple[list[int], int]:
    """Return a parameter's shape with ones in front, and the leading dims it is constant along: 0 where it is not."""
    full = [1] * (ndim - len(shape)) + list(shape)
    if len(full) != ndim:
        return full, 0
    if axis >= 0:
        return full, axis + 1 if full[axis] == 1 else 0
    leading = next((dim for dim, size in enumerate(full) if size != 1), ndim)
    return full, leading


def _terms(rows: Grouping, given: Tensor, axis: Axis, leading: int, shape: list[int]) -> Tensor:
    """Return [b, t, *inner]: dims along which the parameter is constant become positions t."""
    if axis < 0:
        alike = [2 + dim for dim, size in enumerate(shape[leading:]) if size == 1]
        return rows(given).sum(alike, keepdim=True) if alike else rows(given)
    constant = [dim for dim, size in enumerate(shape) if size == 1 and dim != axis]
    varying = [dim for dim, size in enumerate(shape) if size != 1]
    moved = given.permute(axis, *constant, *varying)
    return moved.reshape(rows.examples, -1, *(shape[dim] for dim in varying))


def _expand(tap: Interception, func: Any, input: Tensor, *sizes: Any, **named: Any) -> Any:
    """A parameter repeated for every example, in a dim of its own behind others of size 1."""
    if not tap.chosen(input):
        return NotImplemented
    result = func(tap.gate(input), *sizes, **named)
    axis = next((dim for dim, size in enumerate(result.shape) if size != 1), 0) if tap.examples > 1 else 0
    shape, leading = _aligned(input.shape, result.ndim, axis)
    if result.ndim == 0 or result.shape[axis] != tap.examples or not leading or result.numel() == 0:
        return NotImplemented
    if any(size not in (1, whole) for size, whole in zip(shape, result.shape, strict=True)):
        return NotImplemented  # repeated along a dim that is not constant

    def contributions(rows: Grouping, gradient: Tensor) -> Reports:
        terms = _terms(rows, gradient, axis, leading, shape)
        yield input, Sum(terms.reshape(*terms.shape[:2], *input.shape))

    watched = tap.watch(result.clone(), axis, axis + 1, (), contributions)
    tap.place(watched, axis)
    return watched


def _replay(tap: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other function whose dim of examples is known: run again on each example alone."""
    given = tensors_in((*args, *kwargs.values()))
    others = [t for t in given if not tap.chosen(t)]
    if not tap.provenance.follows(func) or _in_place(func) or all(tap.axis(t) == SHARED for t in others):
        return NotImplemented
    result = func(*_map(args, tap.gate), **_map(kwargs, tap.gate))
    if not isinstance(result, Tensor) or not result.requires_grad or any(result is a for a in args):
        return NotImplemented
    result = result.clone()  # some functions keep their result for backward, where a watch would be a change of it
    axis = _axis_of(tap, func, args, kwargs, result)
    if axis < 0:
        return NotImplemented
    axes = [_axis_beside(tap, func, args, t, result, axis) for t in others]
    parameters = list({id(t): t for t in given if tap.chosen(t)}.values())
    own = [_axis_beside(tap, func, args, p, result, axis) for p in parameters]  # with entries of each example's own
    examples, places = tap.examples, {id(t): i for i, t in enumerate((*others, *parameters))}
    forms = _map((args, kwargs), lambda v: _Place(places[id(v)]) if isinstance(v, Tensor) else v)

    def contributions(rows: Grouping, gradient: Tensor, *kept: Tensor) -> Reports:
        for i in range(examples):
            with torch.enable_grad():
                cut = [_part(t, a, i, examples) for t, a in zip(kept, axes, strict=True)]
                leaves = [
                    _part(p.detach(), a, i, examples).requires_grad_() for p, a in zip(parameters, own, strict=True)
                ]
                positional, named = _map(forms, partial(_filled, operands=(*cut, *leaves)))
                out = func(*positional, **named)
            parts = torch.autograd.grad(out, leaves, _part(gradient, axis, i, examples), allow_unused=True)
            for parameter, part, place in zip(parameters, parts, own, strict=True):
                if part is not None:
                    whole = _whole(part, parameter, place, i, examples)
                    yield parameter, Direct(whole[None]), slice(i, i + 1)

    return tap.watch(result, axis, axis + 1, tuple(others), contributions)


class _Place(NamedTuple):
    """Stands for an operand, because what a rule holds until backward must not hold the graph."""

    number: int


def _filled(value: Any, operands: tuple[Tensor, ...]) -> Any:
    return operands[value.number] if isinstance(value, _Place) else value


def _whole(part: Tensor, parameter: Tensor, axis: Axis, example: int, examples: int) -> Tensor:
    """Return the gradient of the parameter, given that of the entries of one example."""
    if axis < 0:
        return part
    whole = torch.zeros_like(parameter)
    _part(whole, axis, example, examples).copy_(part)
    return whole


def _axis_of(tap: Interception, func: Any, args: Any, kwargs: Any, result: Tensor) -> Axis:
    tap.provenance.follow(func, args, kwargs, result)
    return 0 if tap.examples == 1 else tap.provenance.axis(result)


def _axis_beside(tap: Interception, func: Any, args: Any, tensor: Tensor, result: Tensor, axis: Axis) -> Axis:
    """Return the dim along which an operand is cut with the result, also where it is a constant of the batch's size."""
    known = tap.axis(tensor)
    if known >= 0 or tap.examples == 1:
        return known if tap.examples > 1 else SHARED
    if isinstance(args[0], str):
        left, right = einsum_letters(args)
        letters = next((p for p, t in zip(left, tensors_in(args), strict=True) if t is tensor), "")
        place = letters.find(right[axis])
        return place if place >= 0 and tensor.shape[place] == result.shape[axis] else SHARED
    place = axis - result.ndim
    alike = tap.provenance.cuts_alike(func, place) and tensor.ndim >= -place and result.shape[axis] > 1
    return tensor.ndim + place if alike and tensor.shape[place] == result.shape[axis] else SHARED


def _part(tensor: Tensor, axis: Axis, example: int, examples: int) -> Tensor:
    """Return what belongs to one example."""
    if axis < 0 or examples == 1:
        return tensor
    size = tensor.shape[axis] // examples
    return tensor.narrow(axis, example * size, size)


def _map(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, dict):
        return {k: _map(v, change) for k, v in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_map(v, change) for v in values)
    return change(values)


def _has_examples(tap: Interception, tensor: Any, leading: int) -> bool:
    """Whether an operand holds examples, in one of its leading dims or nobody knows where."""
    if not isinstance(tensor, Tensor) or tap.chosen(tensor):
        return False
    axis = tap.axis(tensor)
    return (axis == UNKNOWN and leading > 0) or 0 <= axis < leading


def _opened(tap: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a function of torch that is written in Python with the calls inside it intercepted."""
    names = {name: (lambda *_: False) for name in func.__globals__ if name.startswith("has_torch_function")}
    inside = types.FunctionType(
        func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__, func.__closure__
    )
    inside.__kwdefaults__ = func.__kwdefaults__
    with tap:
        return inside(*args, **kwargs)


_ADDED = _elementwise(lambda g, x, p: g, lambda g, x, p: g, keeps=False)
_SUBTRACTED = _elementwise(lambda g, x, p: g, lambda g, x, p: -g, keeps=False)
_MULTIPLIED = _elementwise(lambda g, x, p: g * x, lambda g, x, p: g * x, keeps=True)
_DIVIDED = _elementwise(lambda g, x, p: g / x, lambda g, x, p: -g * x / p.square(), keeps=True)


def _named(rule: Rule, *names: str) -> dict[Any, Rule]:
    """Return the rule for every function of torch or method of a tensor with one of these names."""
    return {getattr(owner, name): rule for owner in (torch, Tensor) for name in names if hasattr(owner, name)}


RULES: dict[Any, Rule] = {
    functional.linear: _linear,
    **_named(_addmm, "addmm"),
    **_named(_matmul, "matmul", "mm", "__matmul__"),
    functional.embedding: _embedding,
    Tensor.__getitem__: _item,
    **{owner._grouped_mm: _grouped_mm for owner in (torch,) if hasattr(owner, "_grouped_mm")},
    **_named(_bmm, "bmm"),
    **_named(_mv, "mv"),
    **_named(_inner, "inner"),
    **_named(_baddbmm, "baddbmm"),
    **_named(_cat, "cat", "concat", "concatenate"),
    **_named(_index_select, "index_select"),
    **_named(_gather, "gather"),
    **_named(_take_along_dim, "take_along_dim"),
    functional.conv1d: _convolution(1),
    functional.conv2d: _convolution(2),
    functional.conv3d: _convolution(3),
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    **_named(_expand, "expand", "repeat", "broadcast_to", "tile"),
    **_named(_ADDED, "add", "add_", "__add__", "__radd__", "__iadd__"),
    **_named(_SUBTRACTED, "sub", "sub_", "subtract", "__sub__", "__isub__"),
    **_named(_MULTIPLIED, "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"),
    **_named(_DIVIDED, "div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"),
    functional.multi_head_attention_forward: _opened,
    functional.scaled_dot_product_attention: _attention,
    torch.where: _where,
    **COMPOSED,
    **RECURRENT,
    None: _replay,
}
TRANSPARENT = frozenset({functional.multi_head_attention_forward, *COMPOSED})
