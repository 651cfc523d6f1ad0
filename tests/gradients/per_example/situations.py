"""Situations in which per-example gradients are easily wrong; each is one function that returns a ``Situation``.

``situation(expect)`` registers it. "fast": exact, and nothing takes the exact path. "slow": exact, with the named
parameters formed one example after another. "refused": an InputError whose text holds the words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

B, T, D, C = 5, 6, 4, 3  # examples, positions, width, classes


@dataclass(frozen=True)
class Situation:
    """A model, its losses, and a batch; ``sizes`` are those of further batches cut from it."""

    model: nn.Module
    losses: Callable[[nn.Module, Any], Tensor]
    batch: Any
    around: Callable[[], Any] | None = None  # a context in which the sketch is taken


@dataclass(frozen=True)
class Entry:
    """What is expected of a situation."""

    make: Callable[[], Situation]
    outcome: str
    words: str = ""
    slow: frozenset[str] = field(default=frozenset())


SITUATIONS: dict[str, Entry] = {}


def situation(outcome: str, words: str = "", slow: tuple[str, ...] = ()) -> Callable[..., Any]:
    def register(make: Callable[[], Situation]) -> Callable[[], Situation]:
        SITUATIONS[make.__name__] = Entry(make, outcome, words, frozenset(slow))
        return make

    return register


# The usual parts.


class Lambda(nn.Module):
    """Modules and parameters by name, and what they compute."""

    def __init__(self, compute: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(self, *inputs)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.7)


def sequences() -> dict[str, Tensor]:
    return {"x": torch.randn(B, T, D), "y": torch.arange(B) % C}


def vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(B, D), "y": torch.arange(B) % C}


def tokens() -> dict[str, Tensor]:
    return {"x": torch.randint(0, 7, (B, T)), "y": torch.arange(B) % C}


def classes(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def of(
    compute: Callable[..., Tensor], batch: Callable[[], Any] = sequences, losses: Any = squares, **parts: Any
) -> Any:
    return Situation(Lambda(compute, **parts), losses, batch())


# In place on results.


def _in_place(layer: nn.Module, batch: Callable[[], Any]) -> Situation:
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x)
        h += 1.0
        h[..., :2] *= 0.5
        functional.relu(h, inplace=True)
        return h

    return of(compute, batch, layer=layer)


@situation("fast")
def in_place_on_linear_of_sequences():
    return _in_place(nn.Linear(D, 5), sequences)


@situation("fast")
def in_place_on_linear_of_vectors():
    return _in_place(nn.Linear(D, 5), vectors)


@situation("fast")
def in_place_on_layer_norm():
    return _in_place(nn.LayerNorm(D), sequences)


@situation("fast")
def in_place_on_convolution():
    return _in_place(nn.Conv1d(T, 5, 3), sequences)


@situation("fast")
def in_place_on_embedding():
    return _in_place(nn.Embedding(7, D), tokens)


@situation("fast")
def sigmoid_in_place():
    return of(lambda m, x: m.o(m.a(x).sigmoid_()), a=nn.Linear(D, 5), o=nn.Linear(5, 2))


@situation("fast")
def add_a_parameter_in_place():
    return of(lambda m, x: m.a(x).add_(m.b), a=nn.Linear(D, 5), b=param(5))


# Losses that run backward themselves.


def penalty(model: nn.Module, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square()


def fgsm(model: nn.Module, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x)
    return model((x + 0.1 * g.sign()).detach()).square().flatten(1).sum(1)


def backward_inside(model: nn.Module, batch: Any) -> Tensor:
    x = batch["x"].detach().requires_grad_()
    model(x).square().sum().backward()
    return (model(batch["x"]) * x.grad.sum(-1, keepdim=True)).flatten(1).sum(1)


def two_layers() -> dict[str, nn.Module]:
    return {"a": nn.Linear(D, 8), "o": nn.Linear(8, 2)}


def tanh_net(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.tanh(m.a(x)))


@situation("slow", slow=("a.weight", "a.bias", "o.weight", "o.bias"))
def gradient_penalty():
    return of(tanh_net, vectors, penalty, **two_layers())


@situation("fast")
def attack_inside_the_loss():
    return of(tanh_net, vectors, fgsm, **two_layers())


@situation("fast")
def backward_inside_the_loss():
    return of(tanh_net, vectors, backward_inside, **two_layers())


# Hooks, and uses of parameters that rules do not see.


@situation("slow", slow=("a.weight",))
def hook_on_a_parameter():
    made = of(tanh_net, vectors, **two_layers())
    made.model.a.weight.register_hook(lambda g: g * 0.5)
    return made


@situation("refused", "post-accumulate hook")
def post_accumulate_hook():
    made = of(tanh_net, vectors, **two_layers())
    made.model.a.weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    return made


@situation("fast")
def hook_on_a_module_that_changes_gradients():
    made = of(tanh_net, vectors, **two_layers())
    made.model.a.register_full_backward_hook(lambda m, gi, go: tuple(2 * g if g is not None else None for g in gi))
    return made


@situation("slow", slow=("base", "other"))
def weight_assembled_in_place():
    def compute(m: Any, x: Tensor) -> Tensor:
        w = m.base.clone()
        w[0] = m.other
        return x @ w.T

    return of(compute, vectors, base=param(3, D), other=param(D))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ x.flatten(0, -2)


@situation("slow", slow=("w",))
def function_with_a_backward_pass_of_its_own():
    return of(lambda m, x: m.o(_Product.apply(x, m.w).tanh()), w=param(5, D), o=nn.Linear(5, 2))


class _Reversible(torch.autograd.Function):
    """Runs its layer without a graph, and again in backward, as reversible residual layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.layer(x)
        torch.autograd.backward(y, g)
        return x.grad, None


@situation("slow", slow=("r.weight", "r.bias"))
def reversible_layer():
    return of(lambda m, x: m.o(_Reversible.apply(m.a(x), m.r)), a=nn.Linear(D, D), r=nn.Linear(D, D), o=nn.Linear(D, 2))


# Rows that data chooses, batch dims that move.


def _sorts(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    h = m.o(torch.tanh(m.a(x[order])))
    return h[order.argsort()]


@situation("fast")
def sorts_its_batch():
    return of(_sorts, **two_layers())


@situation("fast")
def flips_its_batch():
    return of(lambda m, x: m.o(torch.tanh(m.a(x.flip(0)))).flip(0), **two_layers())


@situation("fast")
def rolls_its_batch():
    return of(lambda m, x: m.o(torch.tanh(m.a(x.roll(1, 0)))).roll(-1, 0), **two_layers())


@situation("fast")
def time_major():
    return of(lambda m, x: m.o(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1), **two_layers())


@situation("fast")
def time_major_and_flat():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x.transpose(0, 1).reshape(-1, D)))
        return m.o(h).view(x.shape[1], len(x), -1).transpose(0, 1)

    return of(compute, **two_layers())


@situation("fast")
def packed_into_one_row():
    return of(lambda m, x: m.o(torch.tanh(m.a(x.reshape(1, -1, D)))).view(len(x), -1), **two_layers())


@situation("fast")
def pairs_joined_in_the_batch():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.o(torch.tanh(m.a(torch.cat([x, -2 * x]))))
        return h[: len(x)] - h[len(x) :]

    return of(compute, **two_layers())


@situation("fast")
def windows():
    return of(lambda m, x: m.o(torch.tanh(m.a(x.reshape(-1, 2, D)))).view(len(x), -1), **two_layers())


@situation("fast")
def counted_tokens_only():
    def losses(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"]
        mask = x[..., 0] > -0.5
        h = model(x[mask]).square().sum(-1)
        owner = mask.nonzero()[:, 0]
        return x.new_zeros(len(x)).index_add(0, owner, h)

    return of(tanh_net, sequences, losses, **two_layers())


class Experts(nn.Module):
    """Top-2 of three experts in a ModuleList, rows gathered for each."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.Linear(6, D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.view(x.shape)


@situation("fast")
def routed_experts():
    return Situation(Experts(), squares, sequences())


@situation("fast")
def experts_in_one_tensor():
    def compute(m: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        chosen = m.router(flat).argmax(-1)
        out = torch.zeros(len(flat), 5, dtype=x.dtype)
        for number in range(3):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, functional.linear(flat[rows], m.w[number], m.b[number]))
        return out.view(*x.shape[:-1], 5)

    return of(compute, router=nn.Linear(D, 3), w=param(3, 5, D), b=param(3, 5))


@situation("fast")
def no_gradient_in_the_first_rows():
    def losses(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"]
        h = model(x.transpose(0, 1).reshape(-1, D)).view(x.shape[1], len(x), -1)
        return h.square().sum((0, 2)) * batch["w"]

    made = of(tanh_net, sequences, losses, **two_layers())
    made.batch["w"] = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0])
    return made


@situation("fast")
def as_many_positions_as_examples():
    made = of(
        lambda m, x: m.o(torch.tanh(m.a(x) + m.p(torch.arange(x.shape[1])))).mean(1),
        a=nn.Linear(D, D),
        p=nn.Embedding(9, D),
        o=nn.Linear(D, 2),
    )
    return Situation(made.model, made.losses, {"x": torch.randn(B, B, D), "y": torch.arange(B) % C})


# Tables and tokens that all examples share.


@situation("fast")
def positions_and_a_class_token():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1)
        return m.o(torch.tanh(h + m.p[:, : h.shape[1]]))[:, 0]

    return of(compute, token=param(1, 1, D), a=nn.Linear(D, D), p=param(1, 9, D), o=nn.Linear(D, 2))


@situation("fast")
def relative_bias():
    def compute(m: Any, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1])
        bias = m.bias(t[:, None] - t + 8).permute(2, 0, 1)[None]
        q, k, v = m.qkv(x).view(len(x), -1, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    return of(compute, qkv=nn.Linear(D, 3 * D), bias=nn.Embedding(17, 2))


@situation("fast")
def mask_token():
    def compute(m: Any, x: Tensor) -> Tensor:
        mask = (x[..., :1] > 0).to(x)
        return m.o(torch.tanh(m.a(x) * (1 - mask) + m.token * mask))

    return of(compute, a=nn.Linear(D, D), token=param(1, 1, D), o=nn.Linear(D, 2))


# Forms of parameters.


@situation("fast")
def parameters_without_a_dim_and_without_entries():
    return of(lambda m, x: m.a(x) * m.scale + m.none.sum(), a=nn.Linear(D, 3), scale=param(), none=param(0))


@situation("fast")
def raw_products():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = torch.matmul(x, m.w) + torch.einsum("bti,ihk->bthk", x, m.e).flatten(2)
        return torch.addmm(input=m.b, mat1=h.flatten(0, 1), mat2=m.v).view(*h.shape[:2], -1)

    return of(compute, w=param(D, 6), e=param(D, 2, 3), b=param(3), v=param(6, 3))


@situation("fast")
def transposed_cast_and_tied():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.e(x))
        return functional.linear(h, m.e.weight) + h @ m.e.weight.T.contiguous() + h @ m.e.weight.to(h.dtype).t()

    return of(compute, tokens, e=nn.Embedding(7, D))


@situation("fast")
def gated_norm_by_hand():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h = m.w * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))
        return m.o((1 + m.g.float().to(h.dtype)) * h)

    return of(compute, a=nn.Linear(D, 5), w=param(5), g=param(5), o=nn.Linear(5, 2))


@situation("fast")
def normalised_weights():
    a = nn.utils.parametrizations.weight_norm(nn.Linear(D, 5))
    o = nn.utils.parametrizations.orthogonal(nn.Linear(5, 5))
    return of(tanh_net, vectors, a=a, o=o)


@situation("fast")
def sliced_stacked_and_in_lists():
    def compute(m: Any, x: Tensor) -> Tensor:
        w = torch.cat([m.a[:2], torch.stack([m.b, m.c])])
        return functional.linear(x, w)

    return of(compute, a=param(4, D), b=param(D), c=param(D))


@situation("fast")
def attention_of_torch():
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    return of(lambda m, x: m.o(m.h(x, x, x, need_weights=False)[0]), h=attention, o=nn.Linear(D, 2))


@situation("fast")
def convolutions_and_channel_norms():
    def compute(m: Any, x: Tensor) -> Tensor:
        return m.n(m.t(torch.tanh(m.g(m.c(x.mT)))))

    return of(
        compute,
        c=nn.Conv1d(D, 6, 3, padding=1, groups=2),
        g=nn.GroupNorm(2, 6),
        t=nn.ConvTranspose1d(6, D, 2),
        n=nn.InstanceNorm1d(D, affine=True),
    )


@situation("slow", slow=("r.weight_ih_l0", "r.weight_hh_l0", "r.bias_ih_l0", "r.bias_hh_l0"))
def recurrent_layer():
    return of(lambda m, x: m.o(m.r(x)[0]), r=nn.GRU(D, 5, batch_first=True), o=nn.Linear(5, 2))


@situation("fast")
def sparse_gradients():
    return of(lambda m, x: m.o(m.e(x).tanh()), tokens, e=nn.Embedding(7, D, sparse=True), o=nn.Linear(D, 2))


# Checkpoints, compilation, modes.


@situation("fast")
def checkpointed_layers():
    def compute(m: Any, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False)
        return m.o(x.tanh())

    return of(compute, **two_layers())


@situation("slow", slow=("a.weight", "a.bias"))
def reentrant_checkpoints():
    def compute(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.utils.checkpoint.checkpoint(m.a, x.requires_grad_(), use_reentrant=True).tanh())

    return of(compute, **two_layers())


@situation("fast")
def compiled_model():
    made = of(tanh_net, **two_layers())
    return Situation(torch.compile(made.model, backend="eager"), made.losses, made.batch)


@situation("fast")
def in_inference_mode():
    made = of(tanh_net, **two_layers())
    return Situation(made.model, made.losses, made.batch, torch.inference_mode)


@situation("fast")
def where_gradients_are_off():
    made = of(tanh_net, **two_layers())
    return Situation(made.model, made.losses, made.batch, torch.no_grad)


@situation("slow", slow=("head.weight", "head.bias"))
def encoder_that_is_faster_without_interception():
    layer = nn.TransformerEncoderLayer(D, 2, 8, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)

    def compute(m: Any, x: Tensor) -> Tensor:
        padding = torch.arange(T) >= (T - (x[:, 0, 0] > 0).long() * 2)[:, None]
        return m.head(m.e(x, src_key_padding_mask=padding).mean(1))

    made = of(compute, e=encoder, head=nn.Linear(D, 2))
    made.model.eval()
    return made


# Refused.


@situation("refused", "carry no gradient")
def loss_without_a_graph():
    return of(tanh_net, vectors, lambda m, b: squares(m, b).detach(), **two_layers())


@situation("refused", "none of the 4 chosen parameters")
def loss_of_another_model():
    other = nn.Linear(D, 2).requires_grad_(False)
    return of(
        tanh_net, vectors, lambda m, b: (other(b["x"]) * b["x"].clone().requires_grad_()[:, :2]).sum(1), **two_layers()
    )


@situation("refused", "not the model's own")
def parameters_put_in_by_functional_call():
    def losses(model: nn.Module, batch: Any) -> Tensor:
        own = {name: nn.Parameter(p.detach() * 1.0) for name, p in model.named_parameters()}
        return torch.func.functional_call(model, own, (batch["x"],)).square().sum(1)

    return of(tanh_net, vectors, losses, **two_layers())


@situation("refused", "torch.view_as_real")
def complex_parameters():
    w = nn.Parameter(torch.randn(D, 2, dtype=torch.complex128))
    return of(lambda m, x: (x.to(w.dtype) @ m.w).abs(), vectors, w=w)


@situation("refused", "meta")
def parameters_on_meta():
    return of(tanh_net, vectors, a=nn.Linear(D, 8, device="meta"), o=nn.Linear(8, 2))


@situation("refused", "together and")
def loss_divided_by_the_tokens_of_the_batch():
    return of(tanh_net, vectors, lambda m, b: squares(m, b) / len(b["x"]), **two_layers())


@situation("refused", "together and")
def negatives_from_the_batch():
    def losses(model: nn.Module, batch: Any) -> Tensor:
        h = model(batch["x"])
        return functional.cross_entropy(h @ h.T, torch.arange(len(h)), reduction="none")

    return of(tanh_net, vectors, losses, **two_layers())


@situation("refused", "together and")
def batch_statistics_behind_a_head_of_zeros():
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.o(torch.tanh(h - h.mean(0)))

    made = of(compute, vectors, classes, a=nn.Linear(D, 8), o=nn.Linear(8, C))
    nn.init.zeros_(made.model.o.weight)
    nn.init.zeros_(made.model.o.bias)
    return made


@situation("refused", "BatchNorm in training mode")
def batch_norm_in_training_mode():
    return of(lambda m, x: m.n(m.a(x)), vectors, a=nn.Linear(D, 5), n=nn.BatchNorm1d(5))
