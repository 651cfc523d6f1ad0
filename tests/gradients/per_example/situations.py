"""Situations in which a per-example gradient is easily wrong, each one function that builds it.

A situation is registered by what must come out: ``fast``, captured in one backward pass with nothing on the exact path;
``slow``, as exact, with the parameters that match the globs in ``sketcher.slow``; ``refused``, an InputError. A
function with ``variants`` makes one situation for each.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint

Losses = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Setting:
    """A model, a function (model, batch) → losses [b], and a batch of five rows."""

    model: nn.Module
    losses: Losses
    batch: Any
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # entered by every call


@dataclass(frozen=True)
class Situation:
    name: str
    make: Callable[[], Setting]
    outcome: str  # "fast", "slow" or "refused"
    slow: tuple[str, ...] = ()  # globs of the parameters on the exact path
    words: str = ""  # what a refusal says
    tolerance: float = 1e-9
    methods: tuple[str, ...] = ("auto", "outer", "loop")
    first: bool = True  # of the variants of a function

    def setting(self) -> Setting:
        """Build it: the same numbers every time."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return self.make()
        finally:
            torch.set_default_dtype(before)


SITUATIONS: dict[str, Situation] = {}


def _register(outcome: str, variants: Mapping[str, Any] | None, **facts: Any) -> Callable[[Any], Any]:
    def register(make: Callable[..., Setting]) -> Callable[..., Setting]:
        for place, (variant, value) in enumerate((variants or {"": None}).items()):
            name = make.__name__ + (f"[{variant}]" if variant else "")
            assert name not in SITUATIONS
            made = partial(make, value) if variant else make
            SITUATIONS[name] = Situation(name, made, outcome, first=place == 0, **facts)
        return make

    return register


def fast(*, variants: Mapping[str, Any] | None = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what is captured in one backward pass."""
    return _register("fast", variants, **facts)


def slow(*globs: str, variants: Mapping[str, Any] | None = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what is exact, with the parameters that match one of the globs on the exact path."""
    return _register("slow", variants, slow=globs, **facts)


def refused(words: str, *, variants: Mapping[str, Any] | None = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what is an InputError whose text matches."""
    return _register("refused", variants, words=words, **facts)


# What situations are made of.


class Model(nn.Module):
    """Any function of (model, x), with the parts it uses."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def numbers(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.5)


def waves(model: Any, batch: Any) -> Tensor:
    """A loss for outputs of any shape [b, …] in which every entry counts differently."""
    out = model(batch["x"]).flatten(1)
    return (out * (1 + torch.arange(out.shape[1], dtype=out.dtype) / 7)).sin().sum(1)


def classes(model: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def tokens(model: Any, batch: Any) -> Tensor:
    """Cross entropy of [b, t, classes] against [b, t], summed over what is not −100."""
    return functional.cross_entropy(model(batch["x"]).mT, batch["y"], reduction="none").sum(1)


def setting(function: Callable[[Any, Tensor], Any], x: Tensor, losses: Losses = waves, **parts: Any) -> Setting:
    return Setting(Model(function, **parts).eval(), losses, {"x": x, "y": torch.arange(len(x)) % 3})


def ids(*shape: int, below: int = 7) -> Tensor:
    return torch.randint(0, below, shape)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


# Results of watched functions that are written to.

_IN_PLACE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mul_": lambda h, x: h.mul_(2),
    "a part of it is zeroed": lambda h, x: h[..., :1].zero_(),
    "relu_": lambda h, x: functional.relu_(h),
    "sigmoid_": lambda h, x: h.sigmoid_(),
    "add_ of the examples' own": lambda h, x: h.add_(x.sum(-1, keepdim=True)),
    "set a part": lambda h, x: h.__setitem__((..., slice(0, 2)), 0.5),
    "set a part from another": lambda h, x: h.__setitem__((..., slice(0, 2)), h[..., 2:4].clone()),
    "masked_fill_": lambda h, x: h.masked_fill_(x[..., :1] < 0, 0.0),
    "clamp_": lambda h, x: h.clamp_(-0.5, 0.5),
    "mul_ of a view": lambda h, x: h.view(len(x), -1).mul_(2),
    "copy_ into one example": lambda h, x: h[0].mul_(1.0),
    "transposed view": lambda h, x: h.mT.mul_(3.0) if h.ndim > 2 else h.unsqueeze(1).mul_(3.0),
}
_KINDS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear 2-d": lambda: (nn.Linear(6, 8), torch.randn(5, 6)),
    "linear 3-d": lambda: (nn.Linear(6, 8), torch.randn(5, 4, 6)),
    "linear 3-d without bias": lambda: (nn.Linear(6, 8, bias=False), torch.randn(5, 4, 6)),
    "linear 4-d": lambda: (nn.Linear(6, 8), torch.randn(5, 2, 3, 6)),
    "conv1d": lambda: (nn.Conv1d(3, 4, 3), torch.randn(5, 3, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 4, 3), torch.randn(5, 3, 6, 6)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2), torch.randn(5, 2, 4, 4, 4)),
    "transposed conv": lambda: (nn.ConvTranspose1d(3, 4, 3), torch.randn(5, 3, 6)),
    "layer norm": lambda: (nn.LayerNorm(6), torch.randn(5, 4, 6)),
    "rms norm": lambda: (nn.RMSNorm(6), torch.randn(5, 4, 6)),
    "group norm": lambda: (nn.GroupNorm(2, 4), torch.randn(5, 4, 5)),
    "batch norm 1-d": lambda: (nn.BatchNorm1d(4), torch.randn(5, 4, 5)),
    "batch norm 2-d": lambda: (nn.BatchNorm2d(4), torch.randn(5, 4, 3, 3)),
    "instance norm": lambda: (nn.InstanceNorm1d(4, affine=True), torch.randn(5, 4, 6)),
    "embedding": lambda: (nn.Embedding(7, 6), ids(5, 4)),
    "embedding of one token": lambda: (nn.Embedding(7, 6), ids(5)),
    "einsum": lambda: (Model(lambda m, x: torch.einsum("bti,io->bto", x, m.w), w=numbers(6, 4)), torch.randn(5, 4, 6)),
    "matmul 2-d": lambda: (Model(lambda m, x: x @ m.w, w=numbers(6, 4)), torch.randn(5, 6)),
    "matmul 3-d": lambda: (Model(lambda m, x: x @ m.w, w=numbers(6, 4)), torch.randn(5, 4, 6)),
    "addmm": lambda: (Model(lambda m, x: torch.addmm(m.b, x, m.w), w=numbers(6, 4), b=numbers(4)), torch.randn(5, 6)),
    "sum": lambda: (Model(lambda m, x: x.exp() + m.w, w=numbers(6)), torch.randn(5, 4, 6)),
    "product": lambda: (Model(lambda m, x: x * m.w, w=numbers(6)), torch.randn(5, 4, 6)),
    "stacked copies": lambda: (Model(lambda m, x: m.w.repeat(len(x), 2, 1), w=numbers(1, 1, 6)), torch.randn(5, 4, 6)),
    "prelu": lambda: (nn.PReLU(6), torch.randn(5, 6)),
}


class Written(nn.Module):
    """A part whose input needs gradients and whose results are written to, in one way after another."""

    def __init__(self, part: nn.Module, x: Tensor, ways: Iterable[Callable[[Tensor, Tensor], Any]]) -> None:
        super().__init__()
        self.before = numbers(x.shape[-1]) if x.is_floating_point() else numbers(1)
        self.part, self.ways = part, tuple(ways)
        for parameter in part.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for write in self.ways:
            h = self.part(x * self.before if x.is_floating_point() else x)
            write(h, x)
            out.append(h)
        return torch.stack(out, -1) * self.before.sum()


@fast(variants=_KINDS)
def written(kind: Callable[[], tuple[nn.Module, Tensor]]) -> Setting:
    part, x = kind()
    ways = _IN_PLACE["mul_"], _IN_PLACE["a part of it is zeroed"]
    return Setting(Written(part, x, ways).eval(), waves, {"x": x})


@fast(variants=_IN_PLACE)
def written_in_ways(way: Callable[[Tensor, Tensor], Any]) -> Setting:
    part, x = _KINDS["linear 3-d"]()
    return Setting(Written(part, x, [way]).eval(), waves, {"x": x})


@fast(variants=_IN_PLACE)
def written_in_ways_where_there_is_one_token(way: Callable[[Tensor, Tensor], Any]) -> Setting:
    part, x = _KINDS["linear 2-d"]()
    return Setting(Written(part, x, [way]).eval(), waves, {"x": x})


@fast()
def written_in_place_by_everybody() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = functional.relu_(m.conv(x)).mean((2, 3))
        h += m.shift
        q, k, _ = m.qkv(h).split(3, -1)
        z = m.qkv(h)
        z[:, :3] *= 0.5
        z[:, 3:6].sigmoid_()
        return q * 2 + k + z[:, :3] + z[:, 3:6]

    return setting(forward, torch.randn(5, 1, 6, 6), conv=nn.Conv2d(1, 4, 3), qkv=nn.Linear(4, 9), shift=numbers(1, 4))


def _beside_constants(m: Any, h: Tensor) -> Tensor:
    turned = h.transpose(0, 1).contiguous()
    turned += m.a[:, None] * torch.ones(1, len(h), 1, dtype=h.dtype)
    return turned.transpose(0, 1)


@slow(
    "a",
    variants={
        "addcmul_": lambda m, h: h.addcmul_(h.detach().cos(), m.a),
        "lerp_": lambda m, h: h.lerp_(h.detach().cos(), m.a),
        "+= of a tensor as large as the batch": _beside_constants,
    },
)
def written_in_place_with_a_parameter_once(write: Callable[[Any, Tensor], Tensor]) -> Setting:
    forward = lambda m, x: m.o(write(m, m.l(x)))  # noqa: E731
    return setting(forward, torch.randn(5, 4, 6), a=numbers(4, 3), l=nn.Linear(6, 3), o=nn.Linear(3, 2))


def _row_by_row(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 4)
    for place in range(len(x)):
        out[place] = m.a(x[place : place + 1])[0]
    return m.b(out)


@fast()
def written_row_by_row() -> Setting:
    return setting(_row_by_row, torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


# Whose row is whose.


class Tokens(nn.Module):
    """Embedding, hidden layer and head over ids [b, t], with the hidden layer run in an order of its own."""

    def __init__(self, hidden: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.e, self.l, self.o, self.hidden = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7), hidden
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.hidden(self, self.e(x))))


def _windows(m: Any, h: Tensor) -> Tensor:
    b, t, _ = h.shape
    return (
        m.l(h.view(b, t // 2, 2, 6).transpose(0, 1).flatten(0, 1)).view(t // 2, b, 2, 6).transpose(0, 1).flatten(1, 2)
    )


_ORDERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "merged": lambda m, h: m.l(h.flatten(0, 1)).view(h.shape),
    "merged and named": lambda m, h: m.l(h.reshape(-1, h.size(-1))).unflatten(0, h.shape[:2]),
    "time first": lambda m, h: m.l(h.transpose(0, 1)).transpose(0, 1),
    "time first, merged": lambda m, h: (
        m.l(h.transpose(0, 1).reshape(-1, 6)).view(h.shape[1], h.shape[0], 6).transpose(0, 1)
    ),
    "features first": lambda m, h: torch.einsum("ibt,oi->bto", h.permute(2, 0, 1), m.l.weight) + m.l.bias,
    "one row of all": lambda m, h: m.l(h.reshape(1, -1, 6)).view(h.shape),
    "one row each": lambda m, h: m.l(h[None])[0],
    "one row each, last": lambda m, h: m.l(h.unsqueeze(-2)).squeeze(-2),
    "windows of each example": lambda m, h: m.l(h.view(-1, 2, 6)).view(h.shape),
    "windows, first of all examples first": _windows,
    "halves of the features": lambda m, h: functional.linear(h.view(*h.shape[:2], 2, 3), m.l.weight[:3, :3]).flatten(2),
    "movedim": lambda m, h: m.l(h.movedim(0, 1)).movedim(1, 0),
    "gathered by index": lambda m, h: m.l(h[torch.arange(len(h))]),
    "turned and back": lambda m, h: m.l(h.flip(0)).flip(0),
    "rolled and back": lambda m, h: m.l(h.roll(1, 0)).roll(-1, 0),
    "rolled on and on": lambda m, h: m.l(h.roll(1, 0)).roll(len(h) - 1, 0),
    "sorted by a number of each": lambda m, h: _sorted_by_norm(m, h),
    "tokens sorted over all": lambda m, h: _tokens_sorted(m, h),
    "shuffled along the tokens": lambda m, h: m.l(h[:, torch.arange(h.shape[1]).flip(0)]),
    "two halves of the batch": lambda m, h: torch.cat([m.l(part) for part in h.split((len(h) + 1) // 2)]),
    "halves that swap": lambda m, h: _swapped_halves(m, h),
    "doubled": lambda m, h: (lambda both: both[: len(h)] - both[len(h) :])(m.l(torch.cat([h, -2 * h]))),
    "doubled, beside each other": lambda m, h: m.l(h.repeat_interleave(2, 0)).view(len(h), 2, *h.shape[1:]).prod(1),
    "doubled by repeat": lambda m, h: m.l(h.repeat(2, 1, 1)).view(2, *h.shape).prod(0),
    "one by one": lambda m, h: torch.stack([m.l(row) for row in h]),
    "one by one, as batches": lambda m, h: torch.cat([m.l(row[None]) for row in h]),
    "unbound and stacked": lambda m, h: m.l(torch.stack(h.unbind(0))),
    "unbound along the tokens": lambda m, h: torch.stack([m.l(token) for token in h.unbind(1)], 1),
    "strided memory": lambda m, h: m.l(h.as_strided(h.shape, h.stride())),
    "a diagonal": lambda m, h: m.l(torch.diag_embed(h).sum(-1)),
    "masked and scattered back": lambda m, h: _masked(m, h),
    "index_select": lambda m, h: m.l(h.index_select(0, torch.arange(len(h)).flip(0))).flip(0),
    "a part of it swapped in place": lambda m, h: _swap_a_part(m.l(_swap_a_part(h) * m.l.bias)),
    "swapped in place": lambda m, h: _swap(m.l(_swap(h))),
    "swapped in place, by copy_": lambda m, h: _copied_back(m.l(_copied_back(h))),
    "gather": lambda m, h: m.l(h.gather(1, torch.zeros_like(h[:, :2], dtype=torch.long))).repeat(1, 2, 1),
    "meshed": lambda m, h: m.l(h.view(len(h), 2, 2, 6).transpose(1, 2).reshape(-1, 6)).view(h.shape),
    "cumulated along the tokens": lambda m, h: m.l(h.cumsum(1)).cumsum(1),
    "sorted within each feature": lambda m, h: m.l(h.sort(1).values),
    "padded and cut": lambda m, h: m.l(functional.pad(h, (0, 0, 1, 2)))[:, 1:-2],
    "unfolded": lambda m, h: m.l(h.unfold(1, 2, 2).mT.flatten(1, 2)),
    "complex and back": lambda m, h: m.l(
        torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (3, 2)))).flatten(-2)
    ),
    "Fourier": lambda m, h: m.l(torch.fft.fft(h, dim=1).real),
    "numbers of the batch only": lambda m, h: m.l(h) * (1 + len(h) * 0),
}


def _sorted_by_norm(m: Any, h: Tensor) -> Tensor:
    order = h.detach().square().sum((1, 2)).argsort()
    return m.l(h[order])[order.argsort()]


def _tokens_sorted(m: Any, h: Tensor) -> Tensor:
    flat = h.flatten(0, 1)
    order = flat.detach()[:, 0].argsort()
    return m.l(flat[order])[order.argsort()].view(h.shape)


def _swapped_halves(m: Any, h: Tensor) -> Tensor:
    first, second = h[: len(h) // 2], h[len(h) // 2 :]
    out = m.l(torch.cat([second, first]))
    return torch.cat([out[len(second) :], out[: len(second)]])


def _swap(h: Tensor) -> Tensor:
    h = h.clone()
    h[torch.arange(len(h))] = h.flip(0)
    return h


def _swap_a_part(h: Tensor) -> Tensor:
    out = h.clone()
    out[:, 0] = h[:, 0].flip(0)
    return out


def _copied_back(h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    return out.copy_(h.flip(0))


def _masked(m: Any, h: Tensor) -> Tensor:
    mask = h.detach()[..., 0] > 0
    out = torch.zeros_like(h)
    out[mask] = m.l(h[mask])
    return out


@fast(variants=_ORDERS)
def ordered(hidden: Callable[[Any, Tensor], Tensor]) -> Setting:
    return Setting(Tokens(hidden), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


@fast(
    variants={
        name: _ORDERS[name]
        for name in ("merged", "time first", "time first, merged", "windows, first of all examples first")
    }
)
def as_many_tokens_as_examples(hidden: Callable[[Any, Tensor], Tensor]) -> Setting:
    return Setting(Tokens(hidden), tokens, {"x": ids(6, 6), "y": ids(6, 6)})


@fast(variants={"both": 2, "one": 1, "four of five": 4})
def time_first_with_examples_that_have_no_gradient(silent: int) -> Setting:
    y = ids(5, 4)
    y[:silent] = -100
    return Setting(Tokens(_ORDERS["time first, merged"]), tokens, {"x": ids(5, 4), "y": y})


@fast()
def time_first_with_weights_of_zero() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        return batch["w"] * tokens(m, batch)

    w = torch.tensor([0.0, 0, 1, 2, 0.5])
    return Setting(Tokens(_ORDERS["time first, merged"]), losses, {"x": ids(5, 4), "y": ids(5, 4), "w": w})


@refused("together and")
def rows_that_belong_to_two_examples() -> Setting:
    hidden = lambda m, h: m.l(h.roll(3)).roll(-3)  # noqa: E731
    return Setting(Tokens(hidden), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


class SortsByLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.o = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        order = n.argsort(descending=True, stable=True)
        mask = (torch.arange(x.shape[1]) < n[order][:, None])[..., None]
        return self.o(((torch.tanh(self.l(self.e(x[order]))) * mask).sum(1) / n[order][:, None])[order.argsort()])


def _with_lengths(m: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(m(batch["x"], batch["n"]), batch["y"], reduction="none")


@fast(variants={"the first two in order": [6, 5, 3, 2, 4], "the first two not in order": [5, 6, 3, 2, 4]})
def sorts_by_length(lengths: list[int]) -> Setting:
    batch = {"x": ids(5, 6), "n": torch.tensor(lengths), "y": torch.arange(5) % 3}
    return Setting(SortsByLength(), _with_lengths, batch)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p, self.o = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(5, 3)
        self.g = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        p = nn.utils.rnn.pack_padded_sequence(self.e(x), n, batch_first=True, enforce_sorted=False)
        data = torch.tanh(self.p(p.data))
        p = nn.utils.rnn.PackedSequence(data, p.batch_sizes, p.sorted_indices, p.unsorted_indices)
        return self.o(self.g(p)[1][-1])


_LENGTHS = {"sorted": [6, 5, 3, 2, 4], "equal lengths first": [4, 4, 3, 6, 3]}


@fast(variants=_LENGTHS)
def packs_padded_sequences(lengths: list[int]) -> Setting:
    return Setting(Packs(), _with_lengths, {"x": ids(5, 6), "n": torch.tensor(lengths), "y": torch.arange(5) % 3})


class PacksAndPads(nn.Module):
    """Any recurrent layer over packed sequences, whose outputs and last states all count."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.e, self.r = nn.Embedding(7, 6), layer

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.e(x), n, batch_first=True, enforce_sorted=False)
        packed, last = self.r(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        return out.sin().sum(1)[:, :3] + sum(h.sum(0)[:, :3] for h in (last if isinstance(last, tuple) else [last]))


@fast(
    variants={
        "LSTM": lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
        "GRU": lambda: nn.GRU(6, 5, batch_first=True, bidirectional=True),
        "RNN without bias": lambda: nn.RNN(6, 5, 2, bias=False),
        "LSTM with projections": lambda: nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3),
    }
)
def packs_and_pads(layer: Callable[[], nn.Module]) -> Setting:
    batch = {"x": ids(5, 6), "n": torch.tensor([3, 6, 1, 6, 4]), "y": torch.arange(5) % 3}
    return Setting(PacksAndPads(layer()), _with_lengths, batch)


class Experts(nn.Module):
    """A router, and a list of experts or stacks of their matrices."""

    def __init__(self, count: int, each: int, *, stacked: bool = False) -> None:
        super().__init__()
        self.e, self.o, self.each, self.stacked = nn.Embedding(7, 6), nn.Linear(6, 7), each, stacked
        self.r = nn.Linear(6, count, bias=False)
        if stacked:
            self.up = numbers(count, 6, 6)
        else:
            self.up = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        flat = h.reshape(-1, 6)
        weights, chosen = self.r(flat).softmax(-1).topk(self.each, -1)
        out = torch.zeros_like(flat)
        mask = functional.one_hot(chosen, len(self.up)).permute(2, 1, 0)
        for place in range(len(self.up)):
            slot, token = torch.where(mask[place])
            if len(token):
                given = flat[token] @ self.up[place] if self.stacked else self.up[place](flat[token])
                out = out.index_add(0, token, torch.tanh(given) * weights[token, slot, None])
        return self.o(h + out.view_as(h))


@fast(
    variants={
        "1 of 4": (4, 1, False),
        "2 of 2": (2, 2, False),
        "2 of 4": (4, 2, False),
        "2 of 4, stacked": (4, 2, True),
    }
)
def routes_tokens_to_experts(variant: tuple[int, int, bool]) -> Setting:
    count, each, stacked = variant
    return Setting(Experts(count, each, stacked=stacked), tokens, {"x": ids(6, 4), "y": ids(6, 4)})


@fast()
def routes_so_that_an_expert_has_as_many_tokens_as_there_are_examples() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.e(x)
        flat = h.reshape(-1, 6)
        out = torch.zeros_like(flat)
        for place, expert in enumerate(m.up):
            mine = (x.reshape(-1) % 3 == place).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, torch.tanh(expert(flat[mine])))
        return m.o((h + out.view_as(h)).cumsum(1))

    x = torch.tensor([[1, 4, 4, 6, 0], [3, 1, 0, 6, 3], [3, 0, 6, 3, 3], [0, 3, 6, 3, 3], [2, 2, 2, 2, 2]])
    experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    parts = {"e": nn.Embedding(7, 6), "up": experts, "o": nn.Linear(6, 7)}
    return Setting(Model(forward, **parts), tokens, {"x": x, "y": ids(5, 5)})


@fast()
def batched_experts() -> Setting:
    """Every token through every expert, mixed by the router."""

    def forward(m: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        all_of_them = torch.bmm(flat.expand(3, -1, -1), m.up)
        return torch.einsum("eno,ne->no", all_of_them, m.r(flat).softmax(-1)).view(*x.shape[:2], 4)

    return setting(forward, torch.randn(5, 4, 6), up=numbers(3, 6, 4), r=nn.Linear(6, 3))


@fast()
def a_head_over_the_counted_tokens() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        h = torch.tanh(m.l(m.e(batch["x"])))
        h = h[:, :-1] + m.aux(h[:, :-1])
        counted = batch["y"][:, 1:] != -100
        each = functional.cross_entropy(m.o(h[counted]), batch["y"][:, 1:][counted], reduction="none")
        return h.new_zeros(counted.shape).masked_scatter(counted, each).sum(1)

    y = ids(5, 6)
    y[2:, 1:3] = -100
    parts = {"e": nn.Embedding(7, 6), "l": nn.Linear(6, 6), "aux": nn.Linear(6, 6), "o": nn.Linear(6, 7)}
    return Setting(Model(lambda m, x: x, **parts), losses, {"x": ids(5, 6), "y": y})


@fast()
def a_head_over_the_last_token_of_each() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        h = torch.tanh(m.l(m.e(batch["x"])))
        last = h[torch.arange(len(h)), batch["n"] - 1]
        return functional.cross_entropy(m.o(last), batch["y"], reduction="none")

    batch = {"x": ids(5, 6), "n": torch.tensor([6, 5, 3, 2, 4]), "y": torch.arange(5) % 3}
    return Setting(Model(lambda m, x: x, e=nn.Embedding(7, 6), l=nn.Linear(6, 6), o=nn.Linear(6, 3)), losses, batch)


@fast()
def multiple_choice() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(m.a(x.view(-1, 2, 4))).mean(1)).view(len(x), 3)

    return setting(forward, torch.randn(5, 3, 2, 4), classes, a=nn.Linear(4, 5), o=nn.Linear(5, 1))


@fast()
def packed_into_one_row() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.n(torch.tanh(m.l(m.e(x.view(1, -1))))) * m.p).view(*x.shape, 7)

    parts = {"e": nn.Embedding(7, 6), "l": nn.Linear(6, 8), "n": nn.LayerNorm(8), "o": nn.Linear(8, 7), "p": numbers(8)}
    return Setting(Model(forward, **parts), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


@fast()
def a_batch_in_front_of_the_batch() -> Setting:
    return setting(
        lambda m, x: m.b(torch.tanh(m.a(x[None])))[-1], torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )


@fast()
def everything_is_five() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.a(x) + m.p + m.q).tanh() @ m.w

    parts = {"a": nn.Linear(5, 5), "p": numbers(5, 5), "q": numbers(5), "w": numbers(5, 5)}
    return setting(forward, torch.randn(5, 5, 5), **parts)


@fast()
def a_square_of_examples() -> Setting:
    """[b, b] where b is also the width: nothing but the way says which dim counts the examples."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x)).T
        return m.b(h.contiguous().T) * m.p[:, None].T + torch.einsum("ib,oi->bo", h, m.a.weight)

    return setting(forward, torch.randn(5, 5), a=nn.Linear(5, 5), b=nn.Linear(5, 5), p=numbers(5))


@fast()
def heads_beside_the_examples() -> Setting:
    """Attention with examples and heads merged in one dim."""

    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, 2, 3).transpose(1, 2).reshape(b * 2, t, 3) for p in m.qkv(x).chunk(3, -1))
        out = torch.bmm(torch.baddbmm(m.shift.expand(b * 2, t, t), q, k.mT).softmax(-1), v)
        return m.o(out.view(b, 2, t, 3).transpose(1, 2).reshape(b, t, 6))

    return setting(forward, torch.randn(5, 4, 6), qkv=nn.Linear(6, 18), o=nn.Linear(6, 6), shift=numbers(1, 1, 4))


@fast()
def convolution_over_merged_rows() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x.flatten(0, 1)[:, None]).mean((1, 2)).view(len(x), -1)

    return setting(forward, torch.randn(5, 3, 6), a=nn.Conv1d(1, 2, 3))


@slow("a.*")
def convolution_with_the_examples_in_a_spatial_dim() -> Setting:
    return setting(lambda m, x: m.a(x.T[None]).squeeze(0).T, torch.randn(5, 3), a=nn.Conv1d(3, 2, 1))


@fast()
def convolution_with_the_examples_in_the_channels() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return functional.conv1d(x[None], m.w.repeat(len(x), 1, 1), groups=len(x))[0]

    return setting(forward, torch.randn(5, 6), w=numbers(1, 1, 3))


@fast()
def unbatched_convolution_in_a_loop() -> Setting:
    return setting(lambda m, x: torch.stack([m.a(z).mean(1) for z in x]), torch.randn(5, 2, 6), a=nn.Conv1d(2, 3, 3))


# Tables that all examples share.


@fast()
def learned_positions() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(m.e(x) + m.p(torch.arange(x.shape[1]))))

    parts = {"e": nn.Embedding(7, 6), "p": nn.Embedding(9, 6), "o": nn.Linear(6, 7)}
    return Setting(Model(forward, **parts), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


@fast()
def learned_positions_by_an_index_for_all() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        return m.o(torch.tanh(m.e(x) + m.p(places) + m.q(places.expand(len(x), -1)) + m.r(places.expand_as(x).clone())))

    parts = {"e": nn.Embedding(7, 6), **{n: nn.Embedding(9, 6) for n in "pqr"}, "o": nn.Linear(6, 7)}
    return Setting(Model(forward, **parts), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


@fast()
def positions_from_a_mask() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = (x != 0).long().cumsum(1) * (x != 0)
        return m.o(torch.tanh(m.e(x) + m.p(places)))

    parts = {"e": nn.Embedding(7, 6), "p": nn.Embedding(9, 6, padding_idx=0), "o": nn.Linear(6, 7)}
    return Setting(Model(forward, **parts), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


@fast()
def positions_as_a_parameter() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(m.e(x) + m.p[:, : x.shape[1]] + m.q[: x.shape[1]]))

    parts = {"e": nn.Embedding(7, 6), "p": numbers(1, 9, 6), "q": numbers(9, 6), "o": nn.Linear(6, 7)}
    return Setting(Model(forward, **parts), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


def _attention(m: Any, x: Tensor, bias: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = (p.view(b, t, 2, 3).transpose(1, 2) for p in m.qkv(x).chunk(3, -1))
    return ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


@fast(variants={"added": False, "over the batch": True})
def relative_positions(expanded: bool) -> Setting:
    """T5's: a table looked up for each pair of places, one number for each head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = m.p((places[:, None] - places[None]).abs()).permute(2, 0, 1).unsqueeze(0)
        bias = bias.expand(len(x), -1, -1, -1) if expanded else bias
        return m.o(_attention(m, x, bias) + _attention(m, x.flip(1), bias))

    return setting(forward, torch.randn(5, 4, 6), qkv=nn.Linear(6, 18), p=nn.Embedding(5, 2), o=nn.Linear(6, 6))


@fast()
def relative_positions_by_an_index() -> Setting:
    """Swin's: a table [places, heads] indexed by a buffer and reshaped."""

    def forward(m: Any, x: Tensor) -> Tensor:
        t = x.shape[1]
        places = (torch.arange(t)[:, None] - torch.arange(t)[None]).abs()
        return m.o(_attention(m, x, m.table[places.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous()[None]))

    return setting(forward, torch.randn(5, 4, 6), qkv=nn.Linear(6, 18), table=numbers(5, 2), o=nn.Linear(6, 6))


@fast()
def relative_positions_by_shifts() -> Setting:
    """XLNet's: scores of distances, moved to places by a reshape and an index, with time first."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, t = x.transpose(0, 1), x.shape[1]
        q = torch.einsum("ibh,hnd->ibnd", h, m.q)
        scores = torch.einsum("ibnd,jnd->bnij", q, m.r)
        b, n, i, j = scores.shape
        moved = scores.reshape(b, n, j, i)[:, :, 1:].reshape(b, n, i, j - 1)
        p = torch.index_select(moved, 3, torch.arange(t)).softmax(3)
        return torch.einsum("ibnd,hnd->ibh", torch.einsum("bnij,jbnd->ibnd", p, q), m.o).transpose(0, 1)

    return setting(forward, torch.randn(5, 4, 6), q=numbers(6, 2, 3), r=numbers(8, 2, 3), o=numbers(6, 2, 3))


@fast()
def relative_positions_in_scaled_dot_product_attention() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, 2, 3).transpose(1, 2) for p in m.qkv(x).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=m.bias).transpose(1, 2).flatten(2)

    return setting(forward, torch.randn(5, 4, 6), qkv=nn.Linear(6, 18), bias=numbers(1, 2, 4, 4))


@fast()
def relative_positions_under_a_mask() -> Setting:
    """T5's with torch's own attention: joined with a mask of the examples, or with one for all."""

    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        places = torch.arange(t)
        bias = m.p((places[:, None] - places[None]).abs()).permute(2, 0, 1).unsqueeze(0)
        q, k, v = (p.view(b, t, 2, 3).transpose(1, 2) for p in m.qkv(x).chunk(3, -1))
        there = (x[:, :, 0] > -1)[torch.arange(b)][:, None, None, :] | torch.eye(t, dtype=torch.bool)
        for mask in (there, torch.tril(torch.ones(t, t, dtype=torch.bool))[None, None]):
            mask = torch.where(mask, bias, torch.finfo(x.dtype).min).contiguous()
            v = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return m.o(v.transpose(1, 2).flatten(2))

    return setting(forward, torch.randn(5, 4, 6), qkv=nn.Linear(6, 18), p=nn.Embedding(5, 2), o=nn.Linear(6, 6))


@fast(variants={"chosen": torch.arange(5).flip(0), "in order": torch.arange(5)})
def positions_beside_rows_in_an_order_that_nobody_knows(order: Tensor) -> Setting:
    """Idefics': a table's rows for each image, and images chosen by an index."""

    def forward(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        index = order[order < len(x)] if len(x) < 5 else torch.arange(len(x)).flip(0)
        h = m.i(x)[index] + m.p(places)
        return m.o(h.tanh())[index.argsort()]

    return setting(forward, torch.randn(5, 4, 3), i=nn.Linear(3, 6), p=nn.Embedding(9, 6), o=nn.Linear(6, 2))


@fast()
def slopes_of_distances() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        distance = (places[:, None] - places[None]).abs()
        return _attention(m, x, -m.slopes[:, None, None] * distance)

    return setting(forward, torch.randn(5, 4, 6), qkv=nn.Linear(6, 18), slopes=numbers(2))


_CLASS_TOKENS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "expand": lambda m, x: m.c.expand(len(x), -1, -1),
    "expand, sizes by name": lambda m, x: m.c.expand(size=(len(x), 1, 6)),
    "repeat": lambda m, x: m.c.repeat(len(x), 1, 1),
    "broadcast_to": lambda m, x: torch.broadcast_to(m.c, (len(x), 1, 6)),
    "expand_as": lambda m, x: m.c.expand_as(x[:, :1]),
    "tile": lambda m, x: m.c.tile(len(x), 1, 1),
    "repeat_interleave": lambda m, x: m.c.repeat_interleave(len(x), 0),
    "added to zeros": lambda m, x: torch.zeros_like(x[:, :1]) + m.c,
    "stacked": lambda m, x: torch.cat([m.c] * len(x)),
    "from a vector": lambda m, x: m.c[0, 0][None, None].expand(len(x), 1, 6),
}


@fast(variants=_CLASS_TOKENS)
def a_class_token(token: Callable[[Any, Tensor], Tensor]) -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.cat([token(m, x), x], 1)
        return m.o(torch.tanh(m.l(h).cumsum(1)))

    return setting(forward, torch.randn(5, 3, 6), c=numbers(1, 1, 6), l=nn.Linear(6, 6), o=nn.Linear(6, 2))


@fast()
def a_mask_token() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        masked = (x[..., :1] > 0).to(x.dtype)
        return m.o(torch.tanh(m.l(x * (1 - masked) + m.c.expand(*x.shape[:2], -1) * masked)))

    return setting(forward, torch.randn(5, 3, 6), c=numbers(1, 1, 6), l=nn.Linear(6, 6), o=nn.Linear(6, 2))


@fast()
def a_mask_token_by_where() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(m.l(torch.where(x[..., :1] > 0, m.c, x))))

    return setting(forward, torch.randn(5, 3, 6), c=numbers(6), l=nn.Linear(6, 6), o=nn.Linear(6, 2))


@slow("c")
def a_mask_token_written_in() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.l(x)
        h[x[..., 0] > 0] = m.c
        return m.o(torch.tanh(h))

    return setting(forward, torch.randn(5, 3, 6), c=numbers(6), l=nn.Linear(6, 6), o=nn.Linear(6, 2))


_TABLES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "repeated": lambda m, r: r.repeat(m.rows, 1, 1),
    "expanded": lambda m, r: r[0].expand(m.rows, 4, 6),
    "asserted": lambda m, r: _one_row(r),
    "transposed": lambda m, r: r.mT.mT,
    "summed": lambda m, r: r.sum(0),
}


def _one_row(table: Tensor) -> Tensor:
    assert table.shape[0] == 1
    return table


@fast(variants=_TABLES)
def a_table_goes_through_a_layer(spread: Callable[[Any, Tensor], Tensor]) -> Setting:
    """DeBERTa's: relative embeddings are projected once, then meet every example."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.rows = len(x)
        r = spread(m, m.l(m.n(m.table.unsqueeze(0))))
        return m.o((x @ r.mT).softmax(-1) @ r)

    parts = {"table": numbers(4, 6), "l": nn.Linear(6, 6), "n": nn.LayerNorm(6), "o": nn.Linear(6, 2)}
    return setting(forward, torch.randn(5, 3, 6), **parts)


@fast()
def a_constant_goes_through_a_layer() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(x + m.l(x.new_ones(1, 6)) + m.l(x.new_ones(len(x), 1, 6))))

    return setting(forward, torch.randn(5, 3, 6), l=nn.Linear(6, 6), o=nn.Linear(6, 2))


@slow("table", methods=("auto", "loop"))
def a_table_kept_from_the_first_forward_pass() -> Setting:
    """Once a forward pass has kept a tensor made of parameters, no later pass makes it again."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if "kept" not in m.__dict__:
            m.__dict__["kept"] = m.table + 1
        return m.o(torch.tanh(x + m.__dict__["kept"]))

    return setting(forward, torch.randn(5, 6), table=numbers(6), o=nn.Linear(6, 2))


# Ties and repeated use.


@fast()
def an_embedding_tied_to_the_head() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(m.l(m.e(x))), m.e.weight)

    return Setting(Model(forward, e=nn.Embedding(7, 6), l=nn.Linear(6, 6)), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


@fast()
def one_parameter_under_two_names() -> Setting:
    model = Model(lambda m, x: m.o(torch.tanh(m.l(m.e(x)))), e=nn.Embedding(7, 6), l=nn.Linear(6, 6), o=nn.Linear(6, 7))
    model.o.weight = model.e.weight
    return Setting(model, tokens, {"x": ids(5, 4), "y": ids(5, 4)})


_TIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "x @ W.T": lambda m, h: h.view(len(h), -1)[:, :5] @ m.a.weight.T.mT,
    "x @ W": lambda m, h: h[:, :5] @ m.a.weight,
    "linear of W.T": lambda m, h: functional.linear(h[:, :5], m.a.weight.T),
    "linear of W.mT.contiguous()": lambda m, h: functional.linear(h[:, :5], m.a.weight.mT.contiguous()),
    "einsum": lambda m, h: torch.einsum("bo,oi->bi", h[:, :5], m.a.weight),
    "scaled": lambda m, h: functional.linear(h[:, :5], 2 * m.a.weight.T),
    "sum of squares": lambda m, h: h[:, :5] * m.a.weight.square().sum(),
}


@fast(variants=_TIES)
def tied_in_another_form(other: Callable[[Any, Tensor], Tensor]) -> Setting:
    return setting(lambda m, x: other(m, torch.tanh(m.a(x))), torch.randn(5, 4), a=nn.Linear(4, 5))


@fast()
def a_convolution_used_as_a_layer() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x.mT).mean(2) + functional.linear(x.flatten(1)[:, :8], m.a.weight.view(3, -1))

    return setting(forward, torch.randn(5, 6, 4), a=nn.Conv1d(4, 3, 2))


@fast()
def a_layer_used_as_a_convolution() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x).mT + functional.conv1d(x.mT, m.a.weight[:, :, None], m.a.bias)

    return setting(forward, torch.randn(5, 6, 4), a=nn.Linear(4, 3))


@fast()
def one_module_used_in_many_shapes() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(torch.tanh(m.a(x))))
        return h.mean(1) + m.a(x[:, 0]) + m.a(x.reshape(-1, 4)).view(x.shape).sum(1) + m.a(x.transpose(0, 1)).sum(0)

    return setting(forward, torch.randn(5, 6, 4), a=nn.Linear(4, 4))


@fast()
def one_module_used_by_two_others() -> Setting:
    shared = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(nn.Tanh(), shared))
    return Setting(model, waves, {"x": torch.randn(5, 4)})


@fast()
def one_bias_for_two_layers() -> Setting:
    model = Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.bias = model.a.bias
    return Setting(model, waves, {"x": torch.randn(5, 4)})


# Parameters of every form.


_USES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "x @ W": (lambda m, x: torch.tanh(x @ m.a) @ m.b, {"a": (4, 6), "b": (6, 3)}),
    "einsum": (lambda m, x: torch.einsum("bi,ij->bj", x, m.a), {"a": (4, 3)}),
    "einsum without an arrow": (lambda m, x: torch.einsum("bi,ij", x, m.a), {"a": (4, 3)}),
    "einsum with dots": (lambda m, x: torch.einsum("...i,ij->...j", x, m.a), {"a": (4, 3)}),
    "einsum, examples last": (lambda m, x: torch.einsum("bi,ij->jb", x, m.a).T, {"a": (4, 3)}),
    "einsum of two parameters": (lambda m, x: torch.einsum("bi,ij,jk->bk", x, m.a, m.b), {"a": (4, 3), "b": (3, 2)}),
    "W @ x": (lambda m, x: (m.a @ x.T).T, {"a": (3, 4)}),
    "W @ column": (lambda m, x: (m.a @ x[..., None])[..., 0], {"a": (3, 4)}),
    "mv": (lambda m, x: torch.stack([torch.mv(m.a, row) for row in x]), {"a": (3, 4)}),
    "x @ vector": (lambda m, x: (x @ m.a)[:, None], {"a": (4,)}),
    "dot": (lambda m, x: torch.stack([torch.dot(m.a, row) for row in x])[:, None], {"a": (4,)}),
    "inner": (lambda m, x: torch.inner(x, m.a), {"a": (3, 4)}),
    "inner with a vector": (lambda m, x: x.inner(m.a)[:, None], {"a": (4,)}),
    "einsum of a diagonal": (lambda m, x: torch.einsum("bi,ii->bi", x, m.a), {"a": (4, 4)}),
    "einsum with many dots": (
        lambda m, x: torch.einsum("i...,...ij->...j", x.view(len(x), 2, 2).movedim(2, 0), m.a).flatten(1),
        {"a": (1, 2, 2, 3)},
    ),
    "W @ x, columns": (lambda m, x: torch.mm(m.a, torch.tanh(x * m.b).T).T, {"a": (3, 4), "b": (4,)}),
    "x @ vector, of tokens": (lambda m, x: torch.tanh(x.view(-1, 2, 2) * m.b) @ m.a, {"a": (2,), "b": (2,)}),
    "W @ row in a loop": (lambda m, x: torch.stack([m.a @ row.tanh() for row in x]), {"a": (3, 4)}),
    "baddbmm with factors": (
        lambda m, x: torch.baddbmm(m.b, x[:, None], m.a.expand(len(x), -1, -1), beta=0.5, alpha=2)[:, 0],
        {"a": (4, 3), "b": (1, 1, 3)},
    ),
    "vdot": (lambda m, x: torch.stack([row.vdot(m.a) for row in x])[:, None], {"a": (4,)}),
    "tensordot": (lambda m, x: torch.tensordot(x, m.a, dims=1), {"a": (4, 3)}),
    "tensordot of dims": (
        lambda m, x: torch.tensordot(x.view(-1, 2, 2), m.a, dims=([2, 1], [0, 2])).flatten(1),
        {"a": (2, 3, 2, 2)},
    ),
    "tensordot of a parameter": (lambda m, x: torch.tensordot(m.a, x, dims=([0], [-1])).T, {"a": (4, 3)}),
    "tensordot in a loop": (lambda m, x: torch.stack([torch.tensordot(row, m.a, 1) for row in x]), {"a": (4, 3)}),
    "outer": (lambda m, x: torch.stack([torch.outer(row, m.a) for row in x]), {"a": (3,)}),
    "outer of a parameter": (lambda m, x: torch.stack([m.a.outer(row.tanh()) for row in x]), {"a": (3,)}),
    "outer with the examples": (lambda m, x: torch.outer(x.sum(1), m.a), {"a": (3,)}),
    "ger": (lambda m, x: torch.stack([torch.ger(row, m.a) for row in x]), {"a": (3,)}),
    "kron": (lambda m, x: torch.stack([torch.kron(row, m.a) for row in x]), {"a": (3,)}),
    "kron of matrices": (lambda m, x: torch.stack([row.view(2, 2).kron(m.a) for row in x]), {"a": (3, 2)}),
    "kron of a parameter": (lambda m, x: torch.stack([torch.kron(m.a, row) for row in x]), {"a": (2, 3)}),
    "addmm by name": (lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.a), {"a": (4, 3), "b": (3,)}),
    "addmm with factors": (lambda m, x: torch.addmm(m.b, x, m.a, beta=0.5, alpha=2), {"a": (4, 3), "b": (3,)}),
    "bmm of an expanded": (lambda m, x: torch.bmm(x[:, None], m.a.expand(len(x), -1, -1))[:, 0], {"a": (1, 4, 3)}),
    "add by name": (lambda m, x: torch.add(input=x.exp(), other=m.a), {"a": (4,)}),
    "mul by name": (lambda m, x: torch.mul(input=x.exp(), other=m.a), {"a": (4,)}),
    "add with a factor": (lambda m, x: torch.add(x.exp(), m.a, alpha=2), {"a": (4,)}),
    "sub with a factor": (lambda m, x: torch.sub(m.a, x.exp(), alpha=2), {"a": (4,)}),
    "rsub": (lambda m, x: 1 - (m.a - x.exp()) - m.b, {"a": (4,), "b": (4,)}),
    "division": (lambda m, x: x.exp() / (1 + m.a.square()) + m.b / (1 + x.square()), {"a": (4,), "b": (4,)}),
    "power": (lambda m, x: (1 + x.abs()) ** m.a, {"a": (1,)}),
    "base of a power": (lambda m, x: (1 + m.a.square()) ** x, {"a": (4,)}),
    "maximum": (lambda m, x: torch.maximum(x, m.a) * torch.minimum(x, m.a), {"a": (4,)}),
    "maximum with a transposed": (lambda m, x: torch.maximum(x.view(-1, 2, 2), m.a.T).flatten(1), {"a": (2, 2)}),
    "maximum with an entry": (lambda m, x: torch.maximum(x.view(-1, 2, 2), m.a[1]).flatten(1), {"a": (3, 2, 2)}),
    "clamp between": (lambda m, x: x.clamp(min=m.a, max=m.a + 0.3), {"a": (4,)}),
    "where": (lambda m, x: torch.where(x > 0, m.a, m.b * x), {"a": (4,), "b": (1,)}),
    "where, two of them": (lambda m, x: torch.where(x > 0, m.a, m.b), {"a": (4,), "b": (1,)}),
    "where nobody knows the examples": (
        lambda m, x: torch.where(x[torch.arange(len(x))] > 0, m.a, x.exp()),
        {"a": (1, 4)},
    ),
    "minimum by another name": (lambda m, x: torch.min(x, m.a).exp() * torch.max(m.b, x), {"a": (4,), "b": (4,)}),
    "lerp": (lambda m, x: torch.lerp(x, x.square(), m.a), {"a": (4,)}),
    "addcmul": (lambda m, x: torch.addcmul(m.a, x, m.b, value=0.5), {"a": (4,), "b": (4,)}),
    "linear by name": (lambda m, x: functional.linear(input=x, weight=m.a, bias=m.b), {"a": (3, 4), "b": (3,)}),
    "linear with a vector": (lambda m, x: functional.linear(x, m.a)[:, None], {"a": (4,)}),
    "prelu": (lambda m, x: functional.prelu(x, m.a), {"a": (1,)}),
    "softmax temperature": (lambda m, x: (x / m.a.exp()).softmax(-1), {"a": ()}),
    "0-dim factor and shift": (lambda m, x: x.exp() * m.a.exp() + m.b, {"a": (), "b": ()}),
    "0-dim in a table": (lambda m, x: x * torch.stack([m.a, m.b]).sum(), {"a": (), "b": ()}),
    "a row of it": (lambda m, x: x * m.a[1] + m.a[2:].sum(0) + m.a[-1], {"a": (5, 4)}),
    "a column of it": (lambda m, x: x * m.a[:, 1], {"a": (4, 5)}),
    "rows of it": (lambda m, x: functional.linear(x, m.a[:3]) + functional.linear(x, m.a[2:]), {"a": (5, 4)}),
    "chunks of it": (lambda m, x: sum(functional.linear(x, part) for part in m.a.chunk(2)), {"a": (6, 4)}),
    "split, unbound": (lambda m, x: sum(x * row for row in m.a.unbind()), {"a": (3, 4)}),
    "narrowed": (lambda m, x: functional.linear(x, m.a.narrow(1, 1, 4)), {"a": (3, 6)}),
    "stacked": (lambda m, x: functional.linear(x, torch.stack([m.a, m.b])), {"a": (4,), "b": (4,)}),
    "concatenated": (lambda m, x: functional.linear(x, torch.cat([m.a, m.b])), {"a": (2, 4), "b": (3, 4)}),
    "one on top of the other": (lambda m, x: x @ torch.vstack([m.a, m.b]).T, {"a": (2, 4), "b": (3, 4)}),
    "block diagonal": (lambda m, x: x @ torch.block_diag(m.a, m.b), {"a": (2, 2), "b": (2, 3)}),
    "concatenated with a constant": (
        lambda m, x: functional.linear(x, torch.cat([m.a, x.new_ones(2, 4)])),
        {"a": (2, 4)},
    ),
    "product of two": (lambda m, x: functional.linear(x, m.a @ m.b), {"a": (3, 2), "b": (2, 4)}),
    "kron of two": (lambda m, x: x @ torch.kron(m.a, m.b), {"a": (2, 2), "b": (2, 3)}),
    "triangular": (lambda m, x: x @ torch.tril(m.a) + x @ m.a.triu(1), {"a": (4, 4)}),
    "inverted": (lambda m, x: x @ torch.linalg.inv(m.a + 4 * torch.eye(4, dtype=x.dtype)), {"a": (4, 4)}),
    "solved": (lambda m, x: torch.linalg.solve(m.a + 4 * torch.eye(4, dtype=x.dtype), x.T).T, {"a": (4, 4)}),
    "matrix exponential": (lambda m, x: x @ torch.matrix_exp(m.a), {"a": (4, 4)}),
    "expanded by name": (lambda m, x: x.exp() + m.a.expand(size=(len(x), 4)), {"a": (1, 4)}),
    "repeated": (lambda m, x: x.exp() + m.a.repeat(len(x), 2), {"a": (1, 2)}),
    "repeated twice as often": (
        lambda m, x: x.exp().repeat(2, 1).mul(m.a.repeat(2 * len(x), 1)).view(2, -1, 4).sum(0),
        {"a": (1, 4)},
    ),
    "expand_as": (lambda m, x: x.exp() * m.a.expand_as(x), {"a": (1, 4)}),
    "one entry for each example, averaged": (lambda m, x: x.exp() + m.a.mean(0), {"a": (5, 4)}),
    "rounded": (lambda m, x: functional.linear(x, m.a + (m.a.round() - m.a).detach()), {"a": (3, 4)}),
    "masked": (lambda m, x: functional.linear(x, m.a * (m.a.detach() > 0)), {"a": (3, 4)}),
    "normalised": (lambda m, x: functional.linear(x, functional.normalize(m.a, dim=1)), {"a": (3, 4)}),
    "of softmax": (lambda m, x: x @ m.a.softmax(0), {"a": (4, 3)}),
    "detached beside": (lambda m, x: functional.linear(x, m.a) + functional.linear(x, m.a.detach()), {"a": (3, 4)}),
    "of size zero": (lambda m, x: torch.cat([x * m.b, x @ m.a], 1), {"a": (4, 0), "b": (4,)}),
    "of size zero and unused": (lambda m, x: x * m.b, {"a": (0,), "b": (4,)}),
    "unused": (lambda m, x: x * m.b, {"a": (3,), "b": (4,)}),
    "cdist": (lambda m, x: torch.cdist(x, m.a), {"a": (3, 4)}),
    "cdist of tokens": (lambda m, x: torch.cdist(x.view(-1, 2, 2), m.a), {"a": (3, 2)}),
    "cdist to a parameter": (lambda m, x: torch.cdist(m.a, x).T, {"a": (3, 4)}),
    "kernel": (lambda m, x: (x[:, None] - m.a[None]).square().sum(-1).neg().exp(), {"a": (3, 4)}),
    "cosine similarity": (lambda m, x: functional.cosine_similarity(x[:, None], m.a[None], dim=-1), {"a": (3, 4)}),
    "layer norm by hand": (
        lambda m, x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * m.a + m.b,
        {"a": (4,), "b": (4,)},
    ),
    "a row for each pair": (lambda m, x: (x[:, None, :] * m.a[None, :, :]).sum(-1), {"a": (3, 4)}),
    "in front of the batch": (lambda m, x: (m.a[:, None] * x[None]).sum(0), {"a": (3, 4)}),
    "view_as_complex": (
        lambda m, x: torch.view_as_real(torch.fft.fft(x, dim=1) * torch.view_as_complex(m.a)),
        {"a": (4, 2)},
    ),
    "cumulated": (lambda m, x: x * m.a.cumsum(0), {"a": (4,)}),
    "sorted": (lambda m, x: x * m.a.sort().values, {"a": (4,)}),
    "interpolated": (lambda m, x: x + functional.interpolate(m.a[None], size=4, mode="linear")[0, 0], {"a": (1, 3)}),
    "flipped": (lambda m, x: functional.linear(x, m.a.flip(0)), {"a": (3, 4)}),
    "set into zeros": (lambda m, x: functional.linear(x, _set_into(m, x)), {"a": (2, 4)}),
}


def _set_into(m: Any, x: Tensor) -> Tensor:
    w = x.new_zeros(3, 4)
    w[1:] = m.a
    return w


_SLOW_USES = (
    "solved", "view_as_complex", "set into zeros",
)  # fmt: skip


@slow("*", variants={name: _USES[name] for name in _SLOW_USES})
def uses_outside_the_rules(variant: Any) -> Setting:
    return uses(variant)


@fast(variants={name: use for name, use in _USES.items() if name not in _SLOW_USES})
def uses(variant: tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]) -> Setting:
    forward, shapes = variant
    return setting(forward, torch.randn(5, 4), **{name: numbers(*shape) for name, shape in shapes.items()})


@fast()
def parameters_in_a_list() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        for weight, bias in zip(m.weights, m.biases.values(), strict=True):
            x = torch.tanh(x @ weight + bias)
        return x

    weights = nn.ParameterList([numbers(4, 4) for _ in range(3)])
    biases = nn.ParameterDict({f"b{i}": numbers(4) for i in range(3)})
    return setting(forward, torch.randn(5, 4), weights=weights, biases=biases)


def _assembled(mode: str, m: Any) -> Tensor:
    w = m.base.clone()
    if mode == "a row is set":
        w[0] = m.other
    elif mode == "another is added":
        w += m.hyper(m.z).view(4, 3)
    elif mode == "add_":
        w.add_(m.other)
    elif mode == "rows are zeroed":
        w[torch.tensor([True, False, True, False])] = 0
    elif mode == "a buffer multiplies":
        w *= torch.arange(3.0)
    elif mode == "copy_ into a part":
        w[1:].copy_(m.other.expand(3, 3))
    return w


def _assembling(mode: str) -> Setting:
    parts = {"base": numbers(4, 3), "other": numbers(3), "hyper": nn.Linear(2, 12)}
    made = setting(lambda m, x: functional.linear(x, _assembled(mode, m)), torch.randn(5, 3), **parts)
    made.model.register_buffer("z", torch.randn(2))
    return made


@slow("base", "other")
def a_weight_with_a_row_set() -> Setting:
    return _assembling("a row is set")


@slow("base", "other")
def a_weight_with_a_part_copied_in() -> Setting:
    return _assembling("copy_ into a part")


@fast()
def a_weight_with_another_added() -> Setting:
    return _assembling("add_")


@fast()
def a_weight_with_a_networks_output_added() -> Setting:
    return _assembling("another is added")


@slow("base")
def a_weight_written_to_in_part() -> Setting:
    forward = lambda m, x: functional.linear(x, _assembled("rows are zeroed", m))  # noqa: E731
    return setting(forward, torch.randn(5, 3), base=numbers(4, 3))


@fast()
def a_weight_written_to() -> Setting:
    forward = lambda m, x: functional.linear(x, _assembled("a buffer multiplies", m))  # noqa: E731
    return setting(forward, torch.randn(5, 3), base=numbers(4, 3))


@fast()
def a_weight_made_by_a_network() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return functional.linear(x, m.hyper(m.z).view(4, 3))

    made = setting(forward, torch.randn(5, 3), hyper=nn.Linear(2, 12))
    made.model.register_buffer("z", torch.randn(2))
    return made


@fast()
def a_weight_of_its_own_for_each_example() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.bmm(m.hyper(x).view(len(x), 4, 3), x[..., None])[..., 0]

    return setting(forward, torch.randn(5, 3), hyper=nn.Linear(3, 12))


_NORMED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@fast(variants=_NORMED)
def parametrized(how: Callable[[nn.Module], nn.Module]) -> Setting:
    parts = {"a": how(nn.Linear(4, 6)), "b": how(nn.Linear(6, 3))}
    return setting(lambda m, x: m.b(torch.tanh(m.a(x))), torch.randn(5, 4), **parts)


@fast()
def weight_norm_by_a_hook() -> Setting:
    parts = {"a": nn.utils.weight_norm(nn.Linear(4, 6)), "b": nn.utils.weight_norm(nn.Conv1d(6, 3, 1), dim=None)}
    return setting(lambda m, x: m.b(torch.tanh(m.a(x))[..., None]), torch.randn(5, 4), **parts)


@fast()
def spectral_norm_by_a_hook() -> Setting:
    return setting(lambda m, x: m.a(x), torch.randn(5, 4), a=nn.utils.spectral_norm(nn.Linear(4, 6)))


@fast(
    variants={
        "plain": {},
        "with biases": {"bias": "all"},
        "with an embedding": {"target_modules": ["a", "e"]},
        "with a whole module": {"modules_to_save": ["e"]},
        "rank stabilised": {"use_rslora": True},
        "dora": {"use_dora": True},
    }
)
def lora(options: dict[str, Any]) -> Setting:
    import peft

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(self.e(x))))

    config = peft.LoraConfig(**{"target_modules": ["a", "b"], "r": 2, "init_lora_weights": False, **options})
    return Setting(peft.get_peft_model(Base(), config).eval(), tokens, {"x": ids(5, 4), "y": ids(5, 4)})


# Layers of torch.


def _last(m: Any, x: Tensor) -> Tensor:
    out = m.r(x)
    return m.o((out[0] if isinstance(out, tuple) else out)[:, -1])


@fast(
    variants={
        "RNN": lambda: nn.RNN(4, 5, 2, batch_first=True, bidirectional=True),
        "LSTM": lambda: nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True),
        "GRU": lambda: nn.GRU(4, 5, 2, batch_first=True, bidirectional=True),
        "RNN with relu": lambda: nn.RNN(4, 10, nonlinearity="relu", bias=False, batch_first=True),
        "LSTM of one layer": lambda: nn.LSTM(4, 10, batch_first=True),
        "LSTM with projections": lambda: nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True, proj_size=5),
        "LSTM with a projection and no bias": lambda: nn.LSTM(4, 12, bias=False, batch_first=True, proj_size=10),
        "GRU of three layers": lambda: nn.GRU(4, 10, 3, batch_first=True, bias=False),
    },
)
def recurrent(layer: Callable[[], nn.Module]) -> Setting:
    return setting(_last, torch.randn(5, 6, 4), r=layer(), o=nn.Linear(10, 3))


@fast()
def recurrent_with_time_first() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        out, (h, c) = m.r(x.transpose(0, 1))
        return m.o(out.view(-1, 5)).view(len(out), len(x), 3).sum(0) + m.o(h[0] * c[0])

    return setting(forward, torch.randn(5, 5, 4), r=nn.LSTM(4, 5), o=nn.Linear(5, 3))


@fast(variants={"sorted": True, "in chunks": False})
def recurrent_in_another_order(ordered: bool) -> Setting:
    """With a layer that starts from a state of each example's own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.i(x[:, 0])[None]
        if not ordered:
            return torch.cat([m.o(m.r(a, b)[0][:, -1]) for a, b in zip(x.split(2), h.split(2, 1), strict=True)])
        order = x[:, 0, 0].argsort()
        return m.o(m.r(x[order], h[:, order])[1][0])[order.argsort()]

    parts = {"i": nn.Linear(4, 5), "r": nn.GRU(4, 5, batch_first=True), "o": nn.Linear(5, 3)}
    return setting(forward, torch.randn(5, 6, 4), **parts)


@fast()
def recurrent_from_a_learned_state() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.r(x, m.h.expand(-1, len(x), -1).contiguous())[0].sum(1))

    parts = {"h": numbers(1, 1, 5), "r": nn.GRU(4, 5, batch_first=True), "o": nn.Linear(5, 3)}
    return setting(forward, torch.randn(5, 6, 4), **parts)


@fast(variants={"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell})
def recurrent_cells(kind: Any) -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = None
        for t in range(x.shape[1]):
            h = m.r(x[:, t], h)
        return m.o(h[0] if isinstance(h, tuple) else h)

    return setting(forward, torch.randn(5, 4, 4), r=kind(4, 5), o=nn.Linear(5, 3))


@fast(
    variants={
        "batch first": (True, {}),
        "time first": (False, {}),
        "with kdim and vdim": (True, {"kdim": 3, "vdim": 2}),
        "with a zero to attend to": (True, {"add_zero_attn": True}),
        "without bias": (True, {"bias": False}),
        "with bias for keys and values": (True, {"kdim": 3, "vdim": 2, "add_bias_kv": True}),
    }
)
def multi_head_attention(variant: tuple[bool, dict[str, Any]]) -> Setting:
    return _attending(*variant)


def _attending(batch_first: bool, options: dict[str, Any]) -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = x, x[..., : options.get("kdim", 4)], x[..., : options.get("vdim", 4)]
        if batch_first:
            return m.o(m.a(q, k, v)[0])
        return m.o(m.a(*(t.transpose(0, 1) for t in (q, k, v)))[0].transpose(0, 1))

    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return setting(forward, torch.randn(5, 2, 4), a=attention, o=nn.Linear(4, 3))


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


def _padded(m: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(
        m.o(m.e(batch["x"], src_key_padding_mask=batch["m"]).mean(1)), batch["y"], reduction="none"
    )


@fast(variants={"norm first": {"norm_first": True}, "gelu": {"activation": "gelu"}, "plain": {}})
def torch_encoder(options: dict[str, Any]) -> Setting:
    return setting(lambda m, x: m.o(m.e(x)), torch.randn(5, 6, 4), e=_encoder(**options), o=nn.Linear(4, 3))


@fast()
def torch_encoder_with_padding() -> Setting:
    mask = torch.arange(6) >= torch.tensor([6, 5, 3, 2, 4])[:, None]
    batch = {"x": torch.randn(5, 6, 4), "m": mask, "y": torch.arange(5) % 3}
    return Setting(Model(lambda m, x: x, e=_encoder(), o=nn.Linear(4, 3)).eval(), _padded, batch)


@slow("*")
def torch_encoder_frozen_under_a_head() -> Setting:
    """In eval mode torch takes a fast path, which sets padded positions to zero, unless something intercepts."""
    mask = torch.arange(6) >= torch.tensor([6, 5, 3, 2, 4])[:, None]
    batch = {"x": torch.randn(5, 6, 4), "m": mask, "y": torch.arange(5) % 3}
    model = Model(lambda m, x: x, e=_encoder().requires_grad_(False), o=nn.Linear(4, 3)).eval()
    return Setting(model, _padded, batch)


@fast()
def torch_decoder() -> Setting:
    layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    decoder = nn.TransformerDecoder(layer, 1)
    return setting(lambda m, x: m.o(m.d(x, x[:, :3])), torch.randn(5, 6, 4), d=decoder, o=nn.Linear(4, 3))


@fast(
    variants={
        "plain": {},
        "padding 0": {"padding_idx": 0},
        "padding -1": {"padding_idx": -1},
        "sparse": {"sparse": True},
    }
)
def embeddings(options: dict[str, Any]) -> Setting:
    x = ids(5, 6)
    x[:, 1] = x[:, 0]
    return setting(lambda m, x: m.o(m.e(x).mean(1)), x, e=nn.Embedding(7, 4, **options), o=nn.Linear(4, 3))


@slow("e.weight")
def embeddings_that_are_renormalised() -> Setting:
    return setting(lambda m, x: m.o(m.e(x).mean(1)), ids(5, 6), e=nn.Embedding(7, 4, max_norm=0.5), o=nn.Linear(4, 3))


@refused("scale_grad_by_freq")
def embeddings_whose_gradients_are_scaled_by_how_often_the_batch_has_a_token() -> Setting:
    embedding = nn.Embedding(7, 4, scale_grad_by_freq=True)
    return setting(lambda m, x: m.o(m.e(x).mean(1)), ids(5, 6), e=embedding, o=nn.Linear(4, 3))


@slow("e.weight", variants={mode: mode for mode in ("mean", "sum", "max")})
def embedding_bag(mode: str) -> Setting:
    return setting(lambda m, x: m.o(m.e(x)), ids(5, 6), e=nn.EmbeddingBag(7, 4, mode=mode), o=nn.Linear(4, 3))


_LOOKED_UP: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "table[ids]": lambda m, x: m.e[x],
    "table[ids, :]": lambda m, x: m.e[x, :],
    "table[list]": lambda m, x: m.e[[1, 2]].sum(0) * x[..., None],
    "one-hot": lambda m, x: functional.one_hot(x, 7).to(m.e) @ m.e,
    "index_select": lambda m, x: m.e.index_select(0, x.flatten()).view(*x.shape, 4),
    "table[ids, ...]": lambda m, x: m.e[x, ...],
    "gather by different columns": lambda m, x: m.e.gather(0, (x.flatten()[:, None] + torch.arange(4)) % 7).view(
        *x.shape, 4
    ),
    "gather": lambda m, x: m.e.gather(0, x.flatten()[:, None].expand(-1, 4)).view(*x.shape, 4),
    "take_along_dim": lambda m, x: m.e.take_along_dim(x.flatten()[:, None], 0).view(*x.shape, 4),
    "by a derived table": lambda m, x: functional.embedding(x, m.e * 2 + 1),
    "by two tables": lambda m, x: torch.cat([m.e, m.f]).index_select(0, x.flatten()).view(*x.shape, 4) + m.f.sum(),
    "negative ids": lambda m, x: m.e[x - 7],
    "by name": lambda m, x: functional.embedding(input=x, weight=m.e),
    "a scalar of each": lambda m, x: m.e[:, 0][x][..., None].expand(-1, -1, 4),
    "by a mask of the table": lambda m, x: m.e[torch.arange(7) % 2 == 0].sum(0) * x[..., None],
}


@fast(variants=_LOOKED_UP)
def looked_up(how: Callable[[Any, Tensor], Tensor]) -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(how(m, x)) + m.f.sum())

    return setting(forward, ids(5, 6), e=numbers(7, 4), f=numbers(2, 4), o=nn.Linear(4, 3))


@fast()
def bilinear() -> Setting:
    return setting(lambda m, x: m.l(x, x.exp()), torch.randn(5, 4), l=nn.Bilinear(4, 4, 3))


@fast(variants={"one": 1, "each": 4})
def prelu(count: int) -> Setting:
    parts = {"k": nn.Linear(4, 4), "p": nn.PReLU(count), "l": nn.Linear(4, 3)}
    return setting(lambda m, x: m.l(m.p(m.k(x))), torch.randn(5, 4), **parts)


_CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dilated, grouped": (lambda: nn.Conv2d(2, 6, 3, dilation=2, groups=2, padding=(1, 2)), (2, 7, 6)),
    "even kernel, same": (lambda: nn.Conv2d(2, 4, 4, padding="same"), (2, 7, 6)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "circular, strided": (lambda: nn.Conv1d(2, 3, 3, 2, padding=2, padding_mode="circular"), (2, 9)),
    "depthwise": (lambda: nn.Conv3d(3, 3, 2, groups=3), (3, 4, 4, 4)),
    "valid": (lambda: nn.Conv1d(2, 3, 3, padding="valid", bias=False), (2, 7)),
    "channels last": (lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), (2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1), (2, 4, 4)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), (4, 5)),
}


@fast(variants=_CONVOLUTIONS)
def convolutions(variant: tuple[Callable[[], nn.Module], tuple[int, ...]]) -> Setting:
    layer, shape = variant
    return setting(lambda m, x: m.a(torch.tanh(x * m.p)), torch.randn(5, *shape), a=layer(), p=numbers(shape[-1]))


@fast(
    variants={
        "batch norm": lambda: nn.BatchNorm2d(3),
        "instance norm": lambda: nn.InstanceNorm2d(3, affine=True),
        "instance norm with running statistics": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        "group norm": lambda: nn.GroupNorm(3, 3),
        "layer norm of two dims": lambda: nn.LayerNorm((3, 3)),
        "local response": lambda: nn.LocalResponseNorm(2),
    }
)
def norms(layer: Callable[[], nn.Module]) -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.n(m.c(x)))

    return setting(forward, torch.randn(5, 2, 4, 4), c=nn.Conv2d(2, 3, 2), n=layer())


# Hooks.


@slow("0.weight", variants={"to zero": lambda g: g * 0, "scaled": lambda g: g * 3, "masked": lambda g: g * (g > 0)})
def a_hook_on_a_parameter(hook: Callable[[Tensor], Tensor]) -> Setting:
    model = mlp()
    model[0].weight.register_hook(hook)
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@refused("a hook on the parameter", methods=("outer", "vmap", "implicit"))
def a_hook_on_a_parameter_that_a_method_would_ignore() -> Setting:
    return a_hook_on_a_parameter(lambda g: g * 3)


@fast()
def a_hook_on_a_hidden_tensor() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g * 2)
        return m.b(torch.tanh(h))

    return setting(forward, torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


@fast()
def hooks_on_modules() -> Setting:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: out * 1.5)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[2].register_full_backward_hook(lambda module, into, out: (into[0] * 3,))
    return Setting(model, waves, {"x": torch.randn(5, 3)})


_NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "of unit length": lambda g: g / g.norm(),
    "clipped": lambda g: g.clamp(-1e-3, 1e-3).cumsum(0),
}


@refused("backward hook of '2'", variants=_NOT_LINEAR, methods=("auto", "loop"))
def hooks_on_modules_that_mix_examples(change: Callable[[Tensor], Tensor]) -> Setting:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].register_full_backward_hook(lambda module, into, out: (change(into[0]),))
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@refused("post-accumulate hook")
def a_post_accumulate_hook() -> Setting:
    model = mlp()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    return Setting(model, waves, {"x": torch.randn(5, 3)})


# Losses that differentiate.


def _penalty(m: Any, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_(True)
    y = m(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y[:, 0] ** 2 + (g.norm(dim=1) - 1) ** 2


def _forces(m: Any, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_(True)
    return (torch.autograd.grad(m(x).sum(), x, create_graph=True)[0] + 1).square().sum(1)


def _adversarial(m: Any, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_(True)
    (g,) = torch.autograd.grad((m(x) ** 2).sum(), x)
    return m((x + 0.1 * g.sign()).detach())[:, 0] ** 2


def _adversarial_by_backward(m: Any, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_(True)
    (m(x) ** 2).sum().backward()
    assert x.grad is not None
    return m((x + 0.1 * x.grad).detach())[:, 0] ** 2


def _by_functional_jacobian(m: Any, batch: Any) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacrev(m))(batch["x"])
    return jacobian.square().sum((1, 2))


def _along_a_direction(m: Any, batch: Any) -> Tensor:
    _, slope = torch.func.jvp(m, (batch["x"],), (torch.ones_like(batch["x"]),))
    return slope.square().sum(1)


@slow("*", variants={"gradient penalty": _penalty, "forces": _forces})
def differentiates_its_own_gradient(losses: Losses) -> Setting:
    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


@slow("0.*", "2.weight")
def differentiates_by_jacrev() -> Setting:
    return Setting(mlp(), _by_functional_jacobian, {"x": torch.randn(5, 3)})


@slow("*")
def differentiates_by_jvp() -> Setting:
    return Setting(mlp(), _along_a_direction, {"x": torch.randn(5, 3)})


@fast(variants={"autograd.grad": _adversarial, "backward": _adversarial_by_backward})
def runs_backward_on_the_way(losses: Losses) -> Setting:
    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


@slow("*")
def takes_a_step_on_each_example_first() -> Setting:
    """A loss after one step of training on the same example, as meta-learning has it."""

    def losses(m: Any, batch: Any) -> Tensor:
        def one(x: Tensor) -> Tensor:
            own = dict(m.named_parameters())
            inner = m(x[None]).square().sum()
            steps = torch.autograd.grad(inner, list(own.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(own.items(), steps, strict=True)}
            return torch.func.functional_call(m, moved, (x[None],)).sin().sum()

        return torch.stack([one(x) for x in batch["x"]])

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


# Functions with a backward pass of their own.


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return functional.linear(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ x.flatten(0, -2)


@slow("a")
def a_function_that_uses_a_parameter() -> Setting:
    return setting(
        lambda m, x: m.o(Product.apply(x, m.a).tanh()), torch.randn(5, 4), a=numbers(5, 4), o=nn.Linear(5, 3)
    )


class Reversed(torch.autograd.Function):
    """Turns gradients round, as domain-adversarial training does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -2 * g


@fast()
def a_function_that_turns_gradients_round() -> Setting:
    return setting(
        lambda m, x: m.b(Reversed.apply(m.a(x)).tanh()), torch.randn(5, 4), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    )


class Reversible(torch.autograd.Function):
    """A residual pair that keeps no activations: its backward runs forward again and differentiates that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, g: nn.Module) -> Tensor:
        ctx.f, ctx.g = f, g
        a, b = x.chunk(2, -1)
        with torch.no_grad():
            a = a + f(b)
            b = b + g(a)
        out = torch.cat([a, b], -1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        a, b = (t.detach() for t in out.chunk(2, -1))
        da, db = grad.chunk(2, -1)
        with torch.enable_grad():
            a.requires_grad_(True)
            g = ctx.g(a)
            g.backward(db)
        da = da + a.grad
        with torch.no_grad():
            b = (b - g).detach()
        with torch.enable_grad():
            b.requires_grad_(True)
            f = ctx.f(b)
            f.backward(da)
        db = db + b.grad
        return torch.cat([da, db], -1), None, None


@slow("f.*", "g.*")
def reversible_layers() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.i(x)
        return m.o(Reversible.apply(Reversible.apply(h, m.f, m.g), m.g, m.f))

    parts = {"i": nn.Linear(3, 4), "f": nn.Linear(2, 2), "g": nn.Linear(2, 2), "o": nn.Linear(4, 2)}
    return setting(forward, torch.randn(5, 3), **parts)


@slow("f.*", "g.*")
def reversible_layers_that_are_used_beside_as_well() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.i(x)
        return m.o(Reversible.apply(h, m.f, m.g)) + m.g(torch.tanh(m.f(h[..., :2])))

    parts = {"i": nn.Linear(3, 4), "f": nn.Linear(2, 2), "g": nn.Linear(2, 2), "o": nn.Linear(4, 2)}
    return setting(forward, torch.randn(5, 3), **parts)


# What is kept for backward.

_HALF: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of a function": lambda m, x: checkpoint.checkpoint(lambda z: torch.tanh(m.a(z)), x, use_reentrant=False),
    "of a module": lambda m, x: torch.tanh(checkpoint.checkpoint(m.a, x, use_reentrant=False)),
    "sequential": lambda m, x: checkpoint.checkpoint_sequential([m.a, nn.Tanh()], 2, x, use_reentrant=False),
    "without early stop": lambda m, x: _without_early_stop(m, x),
    "within a checkpoint": lambda m, x: checkpoint.checkpoint(
        lambda z: torch.tanh(checkpoint.checkpoint(m.a, z * 2, use_reentrant=False)), x, use_reentrant=False
    ),
}


def _without_early_stop(m: Any, x: Tensor) -> Tensor:
    with checkpoint.set_checkpoint_early_stop(False):
        return checkpoint.checkpoint(lambda z: torch.tanh(m.a(z)), x, use_reentrant=False)


@fast(variants=_HALF)
def checkpointed(half: Callable[[Any, Tensor], Tensor]) -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(half(m, m.i(x)))

    return setting(forward, torch.randn(5, 4), i=nn.Linear(4, 4), a=nn.Linear(4, 5), o=nn.Linear(5, 3))


@fast()
def writes_to_a_buffer_that_the_next_pass_reads() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.o(x * m.scale)
        m.scale += 0.5
        m.count = m.count + len(x)
        return out * m.scale

    made = setting(forward, torch.randn(5, 4), o=nn.Linear(4, 3))
    made.model.register_buffer("scale", torch.ones(4)[:1])
    made.model.register_buffer("count", torch.zeros(1))
    return made


@refused("together and")
def buffers_that_depend_on_the_longest_of_the_batch() -> Setting:
    """As dynamic RoPE: what a long row leaves in a buffer decides the others, also in the passes that follow."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > float(m.longest):
            m.longest = x.detach().abs().max()
        return m.o(x / m.longest)

    made = setting(forward, torch.randn(5, 4), o=nn.Linear(4, 3))
    made.model.register_buffer("longest", torch.tensor(0.1))
    return made


@slow("*")
def checkpointed_outside_modules() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(checkpoint.checkpoint(lambda z: torch.tanh(z @ m.a.T), m.i(x), use_reentrant=False))

    return setting(forward, torch.randn(5, 4), i=nn.Linear(4, 4), a=numbers(5, 4), o=nn.Linear(5, 3))


def _selectively(m: Any, x: Tensor) -> Tensor:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        must = op == torch.ops.aten.addmm.default
        return checkpoint.CheckpointPolicy.MUST_SAVE if must else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(checkpoint.create_selective_checkpoint_contexts, policy)
    return checkpoint.checkpoint(lambda z: torch.tanh(m.a(z)), x, use_reentrant=False, context_fn=contexts)


@slow("*")
def checkpointed_selectively() -> Setting:
    return setting(
        lambda m, x: m.o(_selectively(m, m.i(x))),
        torch.randn(5, 4),
        i=nn.Linear(4, 4),
        a=nn.Linear(4, 5),
        o=nn.Linear(5, 3),
    )


@refused("use_reentrant=True", methods=("auto", "outer"))
def checkpointed_with_reentry() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(checkpoint.checkpoint(lambda z: torch.tanh(m.a(z)), m.i(x), use_reentrant=True))

    return setting(forward, torch.randn(5, 4), i=nn.Linear(4, 4), a=nn.Linear(4, 5), o=nn.Linear(5, 3))


@fast()
def activations_kept_on_the_cpu() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return waves(m, batch)

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


@fast()
def activations_packed_by_hooks() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            return waves(m, batch)

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


# Compiled.


@fast()
def a_compiled_model() -> Setting:
    return Setting(torch.compile(mlp(), backend="eager"), waves, {"x": torch.randn(5, 3)})  # type: ignore[arg-type]


@fast()
def a_model_compiled_in_place() -> Setting:
    model = mlp()
    model.compile(backend="eager")
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@fast()
def a_compiled_submodule() -> Setting:
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@fast()
def a_compiled_forward_method() -> Setting:
    model = mlp()
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@fast()
def a_compiled_function() -> Setting:
    function = torch.compile(lambda x, w, b: torch.tanh(functional.linear(x, w, b)), backend="eager")
    return setting(
        lambda m, x: m.b(function(x, m.a.weight, m.a.bias)), torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )


# Precision.


@fast(tolerance=2e-2)
def in_autocast() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return waves(m, batch).float()

    return Setting(mlp().float(), losses, {"x": torch.randn(5, 3).float()})


@fast(tolerance=3e-2)
def in_bfloat16() -> Setting:
    return Setting(mlp().bfloat16(), waves, {"x": torch.randn(5, 3).bfloat16()})


@fast(tolerance=1e-5)
def in_float32() -> Setting:
    return Setting(mlp().float(), waves, {"x": torch.randn(5, 3).float()})


@fast(tolerance=1e-6)
def with_a_parameter_cast() -> Setting:
    return setting(lambda m, x: functional.linear(x.float(), m.a.float()).double(), torch.randn(5, 4), a=numbers(3, 4))


@fast(tolerance=1e-5)
def in_two_precisions() -> Setting:
    parts = {"a": nn.Linear(3, 4).float(), "b": nn.Linear(4, 2)}
    return setting(lambda m, x: m.b(torch.tanh(m.a(x.float())).double()), torch.randn(5, 3), **parts)


# Where no gradient is recorded.


@fast(variants={"no_grad": torch.no_grad, "inference_mode": torch.inference_mode})
def called_where_no_gradient_is_recorded(around: Any) -> Setting:
    return Setting(mlp(), waves, {"x": torch.randn(5, 3)}, around)


@fast()
def a_batch_made_in_inference_mode() -> Setting:
    with torch.inference_mode():
        x = torch.randn(5, 3)
    return Setting(mlp(), waves, {"x": x})


@refused("made in inference mode")
def a_model_made_in_inference_mode() -> Setting:
    with torch.inference_mode():
        return Setting(mlp(), waves, {"x": torch.randn(5, 3)})


@fast()
def a_part_that_records_no_gradient() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.a(x)
        return m.b(torch.tanh(m.a(x) + h))

    return setting(forward, torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def _unrecorded(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
    return m.b(torch.tanh(h))


@fast()
def a_part_that_never_records_a_gradient() -> Setting:
    return setting(_unrecorded, torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


@slow("a.*")
def a_part_that_never_records_a_gradient_beside_a_function_that_might() -> Setting:
    function = lambda m, x: Reversed.apply(_unrecorded(m, x))  # noqa: E731
    return setting(function, torch.randn(5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


@fast()
def examples_whose_loss_is_constant() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        return (batch["y"] != 1) * classes(m, batch)

    return Setting(nn.Linear(3, 3), losses, {"x": torch.randn(5, 3), "y": torch.arange(5) % 3})


@refused(
    "carry no gradient",
    variants={
        "detached": lambda m, b: waves(m, b).detach(),
        "no_grad": torch.no_grad()(waves),
        "counted": lambda m, b: m(b["x"]).argmax(1).double(),
    },
)
def losses_without_a_graph(losses: Losses) -> Setting:
    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


@refused("not the model's own")
def losses_of_another_model() -> Setting:
    other = mlp()
    return Setting(mlp(), lambda m, b: waves(other, b), {"x": torch.randn(5, 3)})


@refused("use none of the", methods=("auto", "outer"))
def losses_of_the_inputs_alone() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        return batch["x"].detach().requires_grad_(True).square().sum(1)

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


# Parameters that are not the model's own.


@refused("not the model's own")
def foreign_parameters_by_functional_call() -> Setting:
    model = mlp()
    copies = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}

    def losses(m: Any, batch: Any) -> Tensor:
        return waves(lambda x: torch.func.functional_call(m, copies, (x,)), batch)

    return Setting(model, losses, {"x": torch.randn(5, 3)})


@refused("not the model's own")
def a_foreign_parameter_for_one() -> Setting:
    model = mlp()
    copy = {"0.weight": model[0].weight.detach().clone().requires_grad_(True)}

    def losses(m: Any, batch: Any) -> Tensor:
        return waves(lambda x: torch.func.functional_call(m, copy, (x,)), batch)

    return Setting(model, losses, {"x": torch.randn(5, 3)})


@refused("not the model's own")
def parameters_put_in_by_a_hook() -> Setting:
    """As offloading and sharding do: other Parameters for the forward pass, the old ones back behind it."""
    model = mlp()
    own = model[0].weight

    def put_in(module: Any, args: Any) -> None:
        module.register_parameter("weight", nn.Parameter(own.detach().clone()))

    def put_back(module: Any, args: Any, out: Any) -> None:
        module.register_parameter("weight", own)

    model[0].register_forward_pre_hook(put_in)
    model[0].register_forward_hook(put_back)
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@fast()
def frozen_parameters_beside() -> Setting:
    model = mlp()
    model[0].requires_grad_(False)
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@fast()
def a_batch_that_requires_gradients() -> Setting:
    return Setting(mlp(), waves, {"x": torch.randn(5, 3).requires_grad_(True)})


@refused("complex")
def complex_parameters() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.einsum("bti,io->bto", torch.fft.rfft(x, dim=1), m.w), n=6, dim=1)

    return setting(forward, torch.randn(5, 6, 4), w=nn.Parameter(torch.randn(4, 4, dtype=torch.complex128)))


@refused("on the meta device")
def parameters_without_memory() -> Setting:
    model = mlp()
    model[0].to("meta")
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@refused(
    "on the meta device|not the model's own", variants={"to the cpu": "cpu", "to the disk": "disk", "of a part": "part"}
)
def parameters_that_are_offloaded(where: str) -> Setting:
    import accelerate

    model, folder = mlp(), tempfile.mkdtemp()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    else:
        places = {"0": "disk", "1": "cpu", "2": "cpu"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return Setting(model, waves, {"x": torch.randn(5, 3)})


@fast()
def parameters_dispatched_to_where_they_are() -> Setting:
    import accelerate

    model = accelerate.dispatch_model(mlp(), {"": "cpu"}, force_hooks=True, main_device="cpu")
    return Setting(model, waves, {"x": torch.randn(5, 3)})


# Examples that see each other.


@refused("together and")
def divided_by_the_tokens_of_the_batch() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        return tokens(m, batch) / (batch["y"] != -100).sum()

    model = Model(lambda m, x: m.o(m.e(x)), e=nn.Embedding(7, 6), o=nn.Linear(6, 7))
    return Setting(model, losses, {"x": ids(5, 4), "y": ids(5, 4)})


@refused("together and")
def divided_by_the_size_of_the_batch() -> Setting:
    return Setting(mlp(), lambda m, b: waves(m, b) / len(b["x"]), {"x": torch.randn(5, 3)})


@refused("together and")
def rows_of_a_parameter_by_the_size_of_the_batch() -> Setting:
    return setting(lambda m, x: x * m.a[: len(x)].mean(0), torch.randn(5, 4), a=numbers(9, 4))


@refused("together and")
def negatives_from_the_batch() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        h = functional.normalize(m(batch["x"]), dim=-1)
        return functional.cross_entropy(
            h @ functional.normalize(batch["z"], dim=-1).T, torch.arange(len(h)), reduction="none"
        )

    return Setting(mlp(), losses, {"x": torch.randn(5, 3), "z": torch.randn(5, 2)})


@refused("together and")
def compared_with_the_mean_of_the_batch() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        out = m(batch["x"])
        return (out - out.mean(0)).square().sum(1)

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


@refused("together and", methods=("auto", "outer", "loop", "vmap"))
def statistics_of_the_batch_under_a_head_of_zeros() -> Setting:
    """The losses do not show it, the head's gradients do."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.o((h - h.mean(0)) / (h.var(0, unbiased=False) + 1).sqrt())

    made = setting(forward, torch.randn(5, 3), classes, a=nn.Linear(3, 4), o=nn.Linear(4, 3))
    nn.init.zeros_(made.model.o.weight)
    nn.init.zeros_(made.model.o.bias)
    return made


@refused("together and|one example at a time")
def statistics_of_the_batch_that_carry_no_gradient() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.o(h / h.detach().abs().max())

    return setting(forward, torch.randn(5, 3), a=nn.Linear(3, 4), o=nn.Linear(4, 3))


@refused("cannot be run alone", methods=("auto", "loop"))
def batch_norm_by_hand_in_training_under_a_head_of_zeros() -> Setting:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(functional.batch_norm(m.a(x), None, None, m.w, training=True))

    made = setting(forward, torch.randn(5, 3), classes, a=nn.Linear(3, 4), o=nn.Linear(4, 3), w=numbers(4))
    nn.init.zeros_(made.model.o.weight)
    nn.init.zeros_(made.model.o.bias)
    return made


@refused("batch_norm|BatchNorm")
def batch_norm_without_running_statistics() -> Setting:
    layers = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()).eval()
    return Setting(layers, waves, {"x": torch.randn(5, 2, 4, 4)})


@refused("BatchNorm")
def batch_norm_in_training() -> Setting:
    return Setting(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train(), waves, {"x": torch.randn(5, 3)})


@fast()
def batch_norm_of_weights() -> Setting:
    """Weight standardisation: statistics of a weight, none of the batch."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = functional.batch_norm(m.c.weight.reshape(1, 3, -1), None, None, training=True).reshape_as(m.c.weight)
        return functional.conv2d(x, w, m.c.bias)

    return setting(forward, torch.randn(5, 2, 4, 4), c=nn.Conv2d(2, 3, 2))


@fast()
def a_penalty_in_each_loss() -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        return waves(m, batch) + 0.1 * sum(p.square().sum() for p in m.parameters())

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})


# Batches of every form.


@fast(variants={"tuple": tuple, "list": list, "nested": lambda b: {"in": {"x": b[0]}, "y": b[1]}})
def batches(form: Callable[[Any], Any]) -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        x, y = (batch["in"]["x"], batch["y"]) if isinstance(batch, dict) else batch
        return functional.cross_entropy(m(x), y, reduction="none")

    return Setting(nn.Linear(3, 3), losses, form((torch.randn(5, 3), torch.arange(5) % 3)))


_WRITES: dict[str, Callable[[Any], Any]] = {
    "a field is taken out": lambda b: (b.pop("x"), b.pop("y")),
    "a tensor is written to": lambda b: (b["x"].mul_(2).clamp_(-1, 1), b["y"]),
    "a part is written to": lambda b: (b["x"], b["x"][:, :1].zero_(), b["y"])[::2],
    "labels are moved": lambda b: (b["x"], b["y"].add_(1).remainder_(3)),
    "a field is added": lambda b: (b.setdefault("z", b["x"].exp()), b["y"]),
}


@fast(variants=_WRITES, methods=("auto", "outer", "loop", "vmap"))
def batches_that_are_changed(change: Callable[[Any], Any]) -> Setting:
    def losses(m: Any, batch: Any) -> Tensor:
        x, y = change(batch)
        return functional.cross_entropy(m(x), y, reduction="none")

    return Setting(mlp_of_three(), losses, {"x": torch.randn(5, 3), "y": torch.arange(5) % 3})


def mlp_of_three() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))


@fast()
def a_loss_computed_beside_the_model() -> Setting:
    """A loss that reads parameters without calling the model."""

    def losses(m: Any, batch: Any) -> Tensor:
        return (batch["x"] @ m[0].weight.T + m[0].bias).sin().sum(1)

    return Setting(mlp(), losses, {"x": torch.randn(5, 3)})
