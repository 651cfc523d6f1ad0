"""No chain of operations makes Provenance claim a dim of examples that is none: autograd says what depends on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradsketch.gradients.per_example.provenance import SHARED, UNKNOWN, Provenance

EXAMPLES = 3
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Follow(TorchFunctionMode):
    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.provenance.follow(func, args, kwargs or {}, result)
        return result


def examples_in(result: Tensor, x: Tensor) -> Tensor:
    """Which examples [entries, b] each entry of a result depends on."""
    flat = result.reshape(-1)
    one_hot = torch.eye(len(flat), dtype=flat.dtype)
    (jacobian,) = torch.autograd.grad(flat, x, one_hot, is_grads_batched=True, retain_graph=True)
    return jacobian.reshape(len(flat), EXAMPLES, -1).abs().sum(2) > 1e-12


def false_claim(provenance: Provenance, result: Tensor, x: Tensor) -> str:
    """Say what is wrong with what is claimed of a result."""
    axis = provenance.axis(result)
    if axis == UNKNOWN or not result.requires_grad or result.numel() == 0:
        return ""
    found = examples_in(result, x)
    found &= found.sum(1, keepdim=True) == 1  # what depends on several is a coupled loss's, which is refused elsewhere
    if axis == SHARED:
        return "shared, but depends on examples" if bool(found.any()) else ""
    size = result.shape[axis]
    if size % EXAMPLES:
        return f"dim {axis} of size {size}"
    owners = (torch.arange(size) // (size // EXAMPLES)).view([-1 if d == axis else 1 for d in range(result.ndim)])
    own = functional.one_hot(owners.expand(result.shape).reshape(-1), EXAMPLES).bool()
    return f"dim {axis} of {list(result.shape)}" if bool((found & ~own).any()) else ""


# Operations: each draws what it needs, and may fail as torch does.


def dim(draw: Draw, x: Tensor) -> int:
    return draw(st.integers(-x.ndim, x.ndim - 1))


def shape(draw: Draw, x: Tensor) -> list[int]:
    """Another shape of as many entries."""
    left, sizes = x.numel(), []
    while left > 1 and len(sizes) < 4:
        sizes.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= sizes[-1]
    return [*sizes, left]


def written(change: Callable[[Draw, Tensor], Any]) -> Callable[[Draw, Tensor], Tensor]:
    def operation(draw: Draw, x: Tensor) -> Tensor:
        y = x.clone()
        change(draw, y)
        return y

    return operation


def index(draw: Draw, x: Tensor, along: int) -> Tensor:
    places = st.integers(0, x.shape[along] - 1)
    return torch.tensor(draw(st.lists(places, min_size=1, max_size=4)))


def _both(draw: Draw, x: Tensor) -> list[Tensor]:
    """Places along two dims, all of the first in order or turned round."""
    rows = torch.arange(len(x))
    rows = draw(st.sampled_from([rows, rows.flip(0), rows[:, None], rows[:, None, None], rows.view(1, -1, 1)]))
    return [rows, index(draw, x, 1)]


def _permuted(draw: Draw, x: Tensor) -> Tensor:
    return x.permute(draw(st.permutations(range(x.ndim))))


def _set(draw: Draw, y: Tensor) -> None:
    y[index(draw, y, 0)] = y[draw(st.integers(0, len(y) - 1))].clone()


def _set_into(draw: Draw, x: Tensor, zeros: Tensor) -> Tensor:
    value = draw(st.sampled_from([x[:, :1], x[:, :1].flip(0), x[:1, :1], x[0], x[:, 0], x.mT[:, :1]]))
    place = draw(st.sampled_from([(slice(None), slice(0, 1)), (slice(None), 0), (0,), (..., slice(0, 1))]))
    zeros[place] = value
    return zeros


def _narrowed(draw: Draw, x: Tensor) -> Tensor:
    d = dim(draw, x)
    start = draw(st.integers(0, x.shape[d] - 1))
    return x.narrow(d, start, draw(st.integers(1, x.shape[d] - start)))


def _sliced(draw: Draw, x: Tensor) -> Tensor:
    start, step = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    return x[(slice(None),) * draw(st.integers(0, x.ndim - 1)) + (slice(start, None, step),)]


def _gathered(draw: Draw, x: Tensor) -> Tensor:
    d = dim(draw, x)
    return x.gather(d, x.detach().argsort(d))


def _expanded(draw: Draw, x: Tensor) -> Tensor:
    return x.expand(draw(st.sampled_from([1, 2, 3])), *x.shape)


def _repeated(draw: Draw, x: Tensor) -> Tensor:
    return x.repeat([draw(st.integers(1, 2)) for _ in range(x.ndim + draw(st.integers(0, 1)))])


def _beside(draw: Draw, x: Tensor) -> Tensor:
    """With something of the same numbers at another place."""
    other = draw(st.sampled_from([x.flip(0), x.mT, x.mean(0), x[0], x.sum(-1, keepdim=True), x.roll(1, 0), x.detach()]))
    return draw(st.sampled_from([torch.add, torch.mul, torch.sub]))(x, other)


def _with_constant(draw: Draw, x: Tensor) -> Tensor:
    sizes = [draw(st.sampled_from([1, size])) for size in x.shape[draw(st.integers(0, x.ndim)) :]]
    return x * torch.linspace(1, 2, max(1, torch.Size(sizes).numel()), dtype=x.dtype).view(sizes)


def _einsum(draw: Draw, x: Tensor) -> Tensor:
    letters = "abcdef"[: x.ndim]
    kept = draw(st.lists(st.sampled_from(letters), min_size=1, max_size=x.ndim, unique=True))
    other = torch.ones(x.shape[-1], 2, dtype=x.dtype)
    if draw(st.booleans()):
        return torch.einsum(f"{letters}->{''.join(kept)}", x)
    kept = [*(k for k in kept if k != letters[-1]), "z"]
    return torch.einsum(f"{letters},{letters[-1]}z->{''.join(kept)}", x, other)


def _matmul(draw: Draw, x: Tensor) -> Tensor:
    constant = torch.ones(x.shape[-1], 3, dtype=x.dtype)
    return draw(st.sampled_from([lambda: x @ constant, lambda: x @ x.mT, lambda: constant.T[:, :1] @ x[..., :1, :],
                                 lambda: torch.ones(2, x.shape[-2], dtype=x.dtype) @ x]))()  # fmt: skip


def _written_through_a_view(draw: Draw, y: Tensor) -> None:
    view = draw(st.sampled_from([lambda: y.view(-1), lambda: y[0], lambda: y.mT, lambda: y.narrow(0, 0, 1)]))()
    view.copy_(y.detach().flip(0).reshape(-1)[: view.numel()].view(view.shape) + y.sum() * 1.0)


OPERATIONS: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "permute": _permuted,
    "transpose": lambda draw, x: x.transpose(dim(draw, x), dim(draw, x)),
    "movedim": lambda draw, x: x.movedim(dim(draw, x), dim(draw, x)),
    "reshape": lambda draw, x: x.reshape(shape(draw, x)),
    "view": lambda draw, x: x.contiguous().view(shape(draw, x)),
    "flatten": lambda draw, x: x.flatten(*sorted((dim(draw, x) % x.ndim, dim(draw, x) % x.ndim))),
    "unsqueeze": lambda draw, x: x.unsqueeze(draw(st.integers(-x.ndim - 1, x.ndim))),
    "squeeze": lambda draw, x: x.squeeze(),
    "expand": _expanded,
    "unflatten": lambda draw, x: x.unflatten(d := dim(draw, x), (draw(st.sampled_from([1, x.shape[d]])), -1)),
    "chunk": lambda draw, x: draw(st.sampled_from(x.chunk(2, dim(draw, x)))),
    "split": lambda draw, x: draw(st.sampled_from(x.split(draw(st.integers(1, 2)), dim(draw, x)))),
    "unbind": lambda draw, x: draw(st.sampled_from(x.unbind(dim(draw, x)))),
    "select": lambda draw, x: x.select(d := dim(draw, x), draw(st.integers(0, x.shape[d] - 1))),
    "narrow": _narrowed,
    "slice": _sliced,
    "item": lambda draw, x: x[draw(st.integers(0, len(x) - 1))],
    "none": lambda draw, x: x[None],
    "dots": lambda draw, x: x[..., draw(st.integers(0, x.shape[-1] - 1))],
    "index": lambda draw, x: x[index(draw, x, 0)],
    "index of two": lambda draw, x: x[:, index(draw, x, 1)],
    "index of both": lambda draw, x: x[tuple(draw(st.permutations(_both(draw, x))))],
    "index by all": lambda draw, x: x[tuple(_both(draw, x))],
    "mask": lambda draw, x: x[x.detach() > 0],
    "mask of rows": lambda draw, x: x[x.detach().flatten(1).sum(1) > 0],
    "index_select": lambda draw, x: x.index_select(d := dim(draw, x), index(draw, x, d)),
    "gather": _gathered,
    "take_along_dim": lambda draw, x: torch.take_along_dim(x, x.detach().argsort(d := dim(draw, x)), d),
    "flip": lambda draw, x: x.flip(dim(draw, x)),
    "roll": lambda draw, x: x.roll(1, dim(draw, x)),
    "roll flat": lambda draw, x: x.roll(2),
    "rot90": lambda draw, x: x.rot90(),
    "sort": lambda draw, x: x.sort(dim(draw, x)).values,
    "topk": lambda draw, x: x.topk(draw(st.integers(1, 2)), dim(draw, x)).values,
    "cumsum": lambda draw, x: x.cumsum(dim(draw, x)),
    "softmax": lambda draw, x: x.softmax(dim(draw, x)),
    "normalize": lambda draw, x: functional.normalize(x, dim=dim(draw, x)),
    "layer_norm": lambda draw, x: functional.layer_norm(x, x.shape[draw(st.integers(0, x.ndim - 1)) :]),
    "sum": lambda draw, x: x.sum(dim(draw, x), keepdim=draw(st.booleans())),
    "sum of all": lambda draw, x: x.sum(),
    "mean of two": lambda draw, x: x.mean((0, -1), keepdim=draw(st.booleans())),
    "amax": lambda draw, x: x.amax(dim=dim(draw, x)),
    "max": lambda draw, x: x.max(dim(draw, x)).values,
    "maximum": lambda draw, x: torch.max(x, draw(st.sampled_from([x.flip(0), x * 2, x.mean(0)]))),
    "std": lambda draw, x: x.std(dim(draw, x), keepdim=draw(st.booleans())),
    "norm": lambda draw, x: x.norm(dim=dim(draw, x)),
    "logsumexp": lambda draw, x: torch.logsumexp(x, dim(draw, x)),
    "cat": lambda draw, x: torch.cat([x, draw(st.sampled_from([x, x.flip(0), 2 * x]))], dim(draw, x)),
    "cat by name": lambda draw, x: torch.cat(tensors=[x, x], dim=dim(draw, x)),
    "cat of one dim": lambda draw, x: torch.cat([x, x]),
    "stack": lambda draw, x: torch.stack([x, x * 2], draw(st.integers(-x.ndim - 1, x.ndim))),
    "hstack": lambda draw, x: torch.hstack([x, x]),
    "repeat": _repeated,
    "tile": lambda draw, x: x.tile(2),
    "repeat_interleave": lambda draw, x: x.repeat_interleave(2, dim(draw, x)),
    "repeat_interleave flat": lambda draw, x: x.repeat_interleave(2),
    "unfold": lambda draw, x: x.unfold(dim(draw, x), 1, 1),
    "diagonal": lambda draw, x: x.diagonal(0, 0, 1),
    "pad": lambda draw, x: functional.pad(x, (draw(st.integers(0, 1)),) * 2),
    "pad rolled": lambda draw, x: functional.pad(x, (*(0, 0) * (x.ndim - 1), 1, -1)),
    "tanh": lambda draw, x: x.tanh(),
    "clone": lambda draw, x: x.clone(),
    "beside": _beside,
    "with constant": _with_constant,
    "where": lambda draw, x: torch.where(x.detach() > 0, x, x.flip(0) if draw(st.booleans()) else 2 * x),
    "masked_fill": lambda draw, x: x.masked_fill(x.detach() > 0, 0.0),
    "einsum": _einsum,
    "matmul": _matmul,
    "linear": lambda draw, x: functional.linear(x, torch.ones(2, x.shape[-1], dtype=x.dtype)),
    "conv1d": lambda draw, x: functional.conv1d(x, torch.ones(2, x.shape[1], 1, dtype=x.dtype)),
    "attention": lambda draw, x: functional.scaled_dot_product_attention(x, x, x),
    "max_pool": lambda draw, x: functional.max_pool1d(x, 1),
    "cosine similarity": lambda draw, x: functional.cosine_similarity(x[:, None], x[None], dim=-1),
    "cdist": lambda draw, x: torch.cdist(x, x),
    "set": written(_set),
    "set a part": written(lambda draw, y: y.__setitem__((slice(None), 0), y[:, -1].flip(0).clone())),
    "set into zeros": lambda draw, x: _set_into(draw, x, torch.zeros_like(x)),
    "set into turned zeros": lambda draw, x: _set_into(draw, x, torch.zeros_like(x).mT),
    "written by copy_": written(lambda draw, y: y.copy_(draw(st.sampled_from([y.detach() + y.flip(0), 2 * y])))),
    "written by add_": written(lambda draw, y: y.add_(draw(st.sampled_from([y.flip(0).clone(), y.mean(0)])))),
    "written through a view": written(_written_through_a_view),
    "index_add": lambda draw, x: torch.zeros_like(x).index_add(0, torch.arange(len(x)).flip(0), x),
    "scatter": lambda draw, x: torch.zeros_like(x).scatter(0, x.detach().argsort(0), x),
    "masked_scatter": lambda draw, x: torch.zeros_like(x).masked_scatter(x.detach() > 0, x.reshape(-1)),
    "as_strided": lambda draw, x: x.contiguous().as_strided(tuple(reversed(x.shape)), tuple([1] * x.ndim)),
    "vmapped": lambda draw, x: torch.func.vmap(lambda row: row * 2, in_dims=x.ndim - 1)(x),
}


@st.composite
def chains(draw: Draw) -> tuple[Provenance, Tensor, list[tuple[str, Tensor]]]:
    """A chain of operations on a batch, with each result."""
    sizes = [EXAMPLES, *draw(st.lists(st.sampled_from([1, 2, 3]), max_size=3))]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator, dtype=torch.float64).requires_grad_()
    provenance = Provenance(EXAMPLES, {"x": x}, {})
    results = []
    y = x
    with Follow(provenance):
        for name in draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=6)):
            try:
                y_next = OPERATIONS[name](draw, y)
            except (RuntimeError, IndexError, ValueError, TypeError):
                continue
            if not isinstance(y_next, Tensor) or not 0 < y_next.numel() <= 200:
                continue
            y = y_next
            results.append((name, y))
    return provenance, x, results


@settings(max_examples=300)
@given(chains())
def test_no_chain_of_operations_makes_it_claim_a_dim_that_is_none(chain):
    provenance, x, results = chain
    for place, (_, result) in enumerate(results):
        wrong = false_claim(provenance, result, x)
        assert not wrong, f"{wrong} after {[name for name, _ in results[: place + 1]]}"


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@settings(max_examples=8)
@given(data=st.data())
def test_no_operation_alone_does(name, data):
    sizes = [EXAMPLES, *data.draw(st.lists(st.sampled_from([1, 2, 3]), max_size=2))]
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    provenance = Provenance(EXAMPLES, {"x": x}, {})
    with Follow(provenance):
        y = x.movedim(0, data.draw(st.integers(0, x.ndim - 1)))
        try:
            result = OPERATIONS[name](data.draw, y)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return
    if isinstance(result, Tensor):
        assert not false_claim(provenance, result, x)


def _shifted(x: Tensor) -> Tensor:
    out = x.detach().new_zeros(x.shape)
    out[:, 1:] = x[:, :-1]
    out[..., 1:, 0] = x[..., :-1, 0]
    return out


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "merged": lambda x: x.flatten(0, 1),
    "transposed": lambda x: x.transpose(0, 1).tanh(),
    "reduced": lambda x: x.sum(1).softmax(-1),
    "sorted along another dim": lambda x: x.sort(1).values,
    "joined along another dim": lambda x: torch.cat([x, x], -1),
    "multiplied": lambda x: x @ torch.ones(2, 4, dtype=x.dtype),
    "made longer": lambda x: x.repeat_interleave(2, 0),
    "shifted into new memory": lambda x: _shifted(x),
    "places by tensors": lambda x: x[torch.arange(len(x))[:, None], torch.arange(1)],
    "the larger of two": lambda x: torch.max(x, x.square()),
    "distances": lambda x: torch.cdist(x, torch.ones(2, x.shape[-1], dtype=x.dtype)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_plain_is_followed(name):
    x = torch.randn(EXAMPLES, 4, 2, dtype=torch.float64, requires_grad=True)
    provenance = Provenance(EXAMPLES, {"x": x}, {})
    with Follow(provenance):
        result = FOLLOWED[name](x)
    assert provenance.axis(result) >= 0
    assert not false_claim(provenance, result, x)
