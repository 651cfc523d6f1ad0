"""How each torch function's parameters get their per-example gradients.

A rule takes the interception and the function's arguments, computes the same result with the parameters detached, and
says what they get from the gradient that reaches the result: see ``Contribution``. It returns NotImplemented where it
does not know; the parameter then takes the slow path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradsketch.errors import InputError
from gradsketch.gradients.per_example.contributions import Contribution, Direct, Outer, Rows, wide
from gradsketch.gradients.per_example.interception import Interception, Rule
from gradsketch.linear_map import widened

__all__ = ["RULES"]

Reports = Iterator[tuple[Tensor, Contribution]]


def _linear(tap: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if input.ndim > 2 and input.shape[0] == 1:
        input = input.expand(tap.examples, *input.shape[1:])
    split = tap.split(input.shape[:-1])
    if split is None or weight.ndim != 2 or tap.chosen(input):
        return NotImplemented
    result = functional.linear(input, tap.plain(weight), _plain(tap, bias))
    return _matmul(tap, result, split, input, weight, bias, False)


def _addmm(tap: Interception, bias: Tensor, input: Tensor, weight: Tensor, **options: Any) -> Any:
    split = tap.split(input.shape[:-1])
    if split is None or options or bias.ndim != 1 or tap.chosen(input):
        return NotImplemented
    result = torch.addmm(tap.plain(bias), input, tap.plain(weight))
    return _matmul(tap, result, split, input, weight, bias, True)


def _matmul(
    tap: Interception,
    result: Tensor,
    split: tuple[int, int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    def contributions(gradient: Tensor, *kept: Tensor) -> Reports:
        errors = gradient.reshape(*split, -1)
        for inputs in kept:
            factors = errors, inputs.reshape(*split, -1)
            yield weight, Outer(*factors[::-1]) if transposed else Outer(*factors)
        if bias is not None and tap.chosen(bias):
            yield bias, Direct(_sum(errors, 1))

    return tap.watch(result, (input,) if tap.chosen(weight) else (), contributions)


def _embedding(
    tap: Interception,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    input = tap.shared(input)
    split = tap.split(input.shape)
    if split is None or scale_grad_by_freq or max_norm is not None:
        return NotImplemented

    def contributions(gradient: Tensor, index: Tensor) -> Reports:
        index, errors = index.reshape(split), gradient.reshape(*split, -1)
        if padding_idx is not None:
            errors = errors.masked_fill((index == padding_idx % len(weight))[..., None], 0)
        yield weight, Rows(index, errors)

    return tap.watch(functional.embedding(input, weight.detach(), padding_idx), (input,), contributions)


def _convolution(function: Callable[..., Tensor], dims: int) -> Rule:
    def rule(
        tap: Interception,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if input.ndim != dims + 2 or tap.split(input.shape[:1]) is None or len(input) != tap.examples:
            return NotImplemented
        plain = _plain(tap, bias)
        result = function(input, tap.plain(weight), plain, stride, padding, dilation, groups)

        def contributions(gradient: Tensor, *kept: Tensor) -> Reports:
            errors = gradient.flatten(2).mT
            for inputs in kept:
                patches = _patches(inputs, weight.shape[2:], gradient.shape[2:], stride, padding, dilation)
                yield weight, _grouped(errors, patches, groups)
            if bias is not None and tap.chosen(bias):
                yield bias, Direct(_sum(errors, 1))

        return tap.watch(result, (input,) if tap.chosen(weight) else (), contributions)

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
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = list(normalized_shape)
    result = functional.layer_norm(input, shape, _plain(tap, weight), _plain(tap, bias), eps)
    return _scaled(tap, result, input, weight, bias, len(shape), lambda x: functional.layer_norm(x, shape, eps=eps))


def _rms_norm(
    tap: Interception,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    shape = list(normalized_shape)
    result = functional.rms_norm(input, shape, _plain(tap, weight), eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(tap, result, input, weight, None, len(shape), lambda x: functional.rms_norm(x, shape, eps=eps))


def _group_norm(
    tap: Interception,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    result = functional.group_norm(input, num_groups, _plain(tap, weight), _plain(tap, bias), eps)
    return _channels(tap, result, input, weight, bias, lambda x: functional.group_norm(x, num_groups, eps=eps))


def _batch_norm(
    tap: Interception,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        raise coupled("a BatchNorm that uses the statistics of the batch")
    result = functional.batch_norm(
        input, running_mean, running_var, _plain(tap, weight), _plain(tap, bias), False, momentum, eps
    )

    def normalise(x: Tensor) -> Tensor:
        mean, variance = (wide(s).to(x.dtype) for s in (running_mean, running_var) if s is not None)
        return functional.batch_norm(x, mean, variance, eps=eps)

    return _channels(tap, result, input, weight, bias, normalise)


def coupled(what: str) -> InputError:
    """Return the error for a layer in which an example's loss depends on its batch mates."""
    return InputError(
        what,
        "layers in which no example sees another, so that each has a gradient of its own",
        "Call model.eval() first, or use GroupNorm",
    )


def _channels(
    tap: Interception,
    result: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Any:
    """Weight and bias per channel, dim 1."""
    if tap.split(input.shape[:1]) is None or len(input) != tap.examples:
        return NotImplemented

    def contributions(gradient: Tensor, *kept: Tensor) -> Reports:
        errors = wide(gradient).reshape(*gradient.shape[:2], -1)
        for x in kept:
            if weight is not None:
                yield weight, Direct((errors * normalise(wide(x)).view_as(errors)).sum(2))
        if bias is not None and tap.chosen(bias):
            yield bias, Direct(errors.sum(2))

    return tap.watch(result, (input,) if tap.chosen(weight) else (), contributions)


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
    split = tap.split(input.shape[: input.ndim - inner])
    if split is None:
        return NotImplemented

    def contributions(gradient: Tensor, *kept: Tensor) -> Reports:
        shape = (*split, *gradient.shape[gradient.ndim - inner :])
        errors = wide(gradient).reshape(shape)
        for x in kept:
            if weight is not None:
                yield weight, Direct((errors * normalise(wide(x)).view(shape)).sum(1))
        if bias is not None and tap.chosen(bias):
            yield bias, Direct(errors.sum(1))

    return tap.watch(result, (input,) if tap.chosen(weight) else (), contributions)


def _elementwise(function: Callable[..., Tensor]) -> Rule:
    """A parameter added to, or multiplied with, the examples' numbers entry by entry."""

    def rule(tap: Interception, first: Any, second: Any, **options: Any) -> Any:
        parameter, other = (first, second) if tap.chosen(first) else (second, first)
        if not isinstance(other, Tensor) or tap.chosen(other) or len(other.shape[:1]) != 1:
            return NotImplemented
        below = other.ndim > parameter.ndim or (other.ndim == parameter.ndim and parameter.shape[0] == 1)
        if not below or tap.split(other.shape[:1]) is None or len(other) != tap.examples:
            return NotImplemented
        copies = tap.per_example(parameter, other.ndim)
        return function(*((copies, other) if parameter is first else (other, copies)), **options)

    return rule


def _expand(tap: Interception, parameter: Tensor, *sizes: Any) -> Any:
    """A parameter with a leading dim of one, repeated for every example."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if parameter.ndim == 0 or parameter.shape[0] != 1 or len(sizes) != parameter.ndim or sizes[0] != tap.examples:
        return NotImplemented
    if tap.split(torch.Size(sizes[:1])) is None:
        return NotImplemented
    return tap.per_example(parameter, parameter.ndim).expand(*sizes)


def _plain(tap: Interception, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tap.plain(tensor)


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim, dtype=widened(x.dtype))


_ELEMENTWISE = [
    getattr(owner, name)
    for owner, names in (
        (torch, ("add", "sub", "mul")),
        (Tensor, ("add", "sub", "mul", "__add__", "__radd__", "__sub__", "__mul__", "__rmul__")),
    )
    for name in names
]

RULES: dict[Any, Rule] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
    functional.conv1d: _convolution(functional.conv1d, 1),
    functional.conv2d: _convolution(functional.conv2d, 2),
    functional.conv3d: _convolution(functional.conv3d, 3),
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    Tensor.expand: _expand,
    **{function: _elementwise(function) for function in _ELEMENTWISE},
}
