"""Situations in which curvature is easily wrong, each one function that builds it; most are from public bug reports.

A situation is registered by what must come out: ``exact``, by differentiating twice, without a word; ``differences``,
as right, by central differences and with a warning that says why; ``said``, right or as autograd defines it, with a
warning; ``refused``, an InputError. A function with ``variants`` makes one situation for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gradsketch import Parameters

Losses = Callable[[Any, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().flatten(1).sum(1)


def points(count: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4), torch.randint(0, 3, (count,))


@dataclass
class Setting:
    """A model, its losses and data; and where the oracle must not see what is wrong, plain ones that are right."""

    model: nn.Module
    losses: Losses = cross_entropy
    data: Any = field(default_factory=points)
    plain_model: nn.Module | None = None
    plain_losses: Losses | None = None
    batch: Any = None  # all rows at once, where ``data`` is something else
    parameters: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    differences: bool = True  # the oracle differences gradients; otherwise it differentiates twice


@dataclass(frozen=True)
class Situation:
    name: str
    make: Callable[[], Setting]
    outcome: str
    words: str = ""
    tolerance: float = 1e-6
    gauss_newton: bool = False  # also taken of it, by the same outcome

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


def _register(outcome: str, words: str, variants: Any, **facts: Any) -> Callable[[Any], Any]:
    def register(make: Callable[..., Setting]) -> Callable[..., Setting]:
        named = variants if isinstance(variants, Mapping) else {str(v): v for v in variants or [""]}
        for variant, value in named.items():
            name = make.__name__ + (f"[{variant}]" if variant else "")
            assert name not in SITUATIONS
            SITUATIONS[name] = Situation(name, partial(make, value) if variant else make, outcome, words, **facts)
        return make

    return register


def exact(*, variants: Any = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what is right by differentiating twice, without a word."""
    return _register("exact", "", variants, **facts)


def differences(words: str, *, variants: Any = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what central differences must compute, with a warning of these words."""
    return _register("differences", words, variants, **facts)


def said(words: str, *, variants: Any = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what is right, with a warning of these words."""
    return _register("said", words, variants, **facts)


def refused(words: str, *, variants: Any = None, **facts: Any) -> Callable[[Any], Any]:
    """Register what is refused with these words."""
    return _register("refused", words, variants, **facts)


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation or nn.Tanh(), nn.Linear(5, 3))


class Applies(nn.Module):
    """Any function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Plain models and losses.

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Hardswish, nn.PReLU)


@exact(variants={a.__name__: a for a in ACTIVATIONS}, gauss_newton=True)
def activations(kind: type[nn.Module]) -> Setting:
    return Setting(mlp(kind()))


@exact(variants=("float32", "bfloat16"), tolerance=2e-2)
def narrow_weights(kind: str) -> Setting:
    dtype = getattr(torch, kind)
    x, y = points()
    return Setting(mlp(nn.ReLU()).to(dtype), data=(x.to(dtype), y))


@exact(variants=("first", "last"), tolerance=1e-5, gauss_newton=True)
def a_layer_that_computes_in_float32(place: str) -> Setting:
    """As the norms of Llama do in a model of float64."""

    def model(dtype: torch.dtype) -> nn.Sequential:
        def norm(x: Tensor) -> Tensor:
            inside = x.to(dtype)
            return (inside * torch.rsqrt(inside.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
        layers.insert(1 if place == "first" else 3, Applies(norm))
        return nn.Sequential(*layers)

    narrow, plain = model(torch.float32), model(torch.float64)
    plain.load_state_dict(narrow.state_dict())
    return Setting(narrow, plain_model=plain)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label smoothing": lambda z, y: functional.cross_entropy(z, y, reduction="none", label_smoothing=0.1),
    "class weights": lambda z, y: functional.cross_entropy(z, y, torch.tensor([1.0, 2.0, 3.0]).to(z), reduction="none"),
    "binary": lambda z, y: functional.binary_cross_entropy_with_logits(z, _hot(z, y), reduction="none").sum(1),
    "huber": lambda z, y: functional.huber_loss(z, _hot(z, y), reduction="none").sum(1),
    "absolute": lambda z, y: functional.l1_loss(z, _hot(z, y), reduction="none").sum(1),
    "negative log-likelihood": lambda z, y: functional.nll_loss(z.log_softmax(-1), y, reduction="none"),
    "divergence": lambda z, y: functional.kl_div(z.log_softmax(-1), _hot(z, y), reduction="none").sum(1),
    "focal": lambda z, y: (
        (1 - z.softmax(-1).gather(1, y[:, None])[:, 0]) ** 2 * functional.cross_entropy(z, y, reduction="none")
    ),
    "linear": lambda z, y: z.sum(1),
}


def _hot(z: Tensor, y: Tensor) -> Tensor:
    return functional.one_hot(y, 3).to(z)


@exact(variants=LOSSES, gauss_newton=True)
def losses(loss: Callable[[Tensor, Tensor], Tensor]) -> Setting:
    return Setting(mlp(), lambda m, b: loss(m(b[0]), b[1]))


NORMS = {
    "layer": lambda: nn.LayerNorm(5),
    "layer without bias": lambda: nn.LayerNorm(5, bias=False),
    "group": lambda: nn.GroupNorm(1, 5),
    "root mean square": lambda: nn.RMSNorm(5),
    "batch": lambda: nn.BatchNorm1d(5),
    "batch in eval": lambda: nn.BatchNorm1d(5).eval(),
}


@exact(variants=NORMS)
def norms(norm: Callable[[], nn.Module]) -> Setting:
    return Setting(nn.Sequential(nn.Linear(4, 5), norm(), nn.Tanh(), nn.Linear(5, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.r, self.o = kind(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x.view(-1, 2, 2))[0][:, -1])


@exact(variants={"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN})
def recurrent_layers(kind: Any) -> Setting:
    return Setting(Recurrent(kind))


@exact(variants={"plain": {}, "padding": {"padding_idx": 0}, "scaled": {"scale_grad_by_freq": False}})
def embeddings(options: Mapping[str, Any]) -> Setting:
    model = nn.Sequential(nn.Embedding(6, 2, **options), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3))
    return Setting(model, data=(torch.randint(1, 6, (7, 3)), torch.arange(7) % 3))


@exact()
def tied_weights() -> Setting:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return Setting(model)


@exact()
def spectral_norm() -> Setting:
    return Setting(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).eval())


@exact()
def hooks_of_the_user() -> Setting:
    model = mlp()
    model[0].register_full_backward_hook(lambda *_: None)
    model[2].weight.register_hook(lambda g: g * 0)  # for the user's own backward passes
    model[2].bias.register_post_accumulate_grad_hook(lambda p: None)
    return Setting(model, plain_model=mlp_like(model))


def mlp_like(model: nn.Module) -> nn.Module:
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    return plain


# Numbers of examples.


@exact(variants=("list", "loader", "workers", "drop_last", "iterable", "numpy"))
def data_of_every_form(form: str) -> Setting:
    x, y = points()
    pairs = TensorDataset(x, y)
    data = {
        "list": list(zip(x, y, strict=True)),
        "loader": DataLoader(pairs, batch_size=4),
        "workers": DataLoader(pairs, batch_size=4, num_workers=1),
        "drop_last": DataLoader(pairs, batch_size=5, drop_last=True),
        "iterable": DataLoader(Stream(x, y), batch_size=4),
        "numpy": [(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)],
    }[form]
    kept = 10 if form == "drop_last" else 11
    return Setting(mlp(), data=data, batch=(x[:kept], y[:kept]), options={"batch_size": 4})


class Stream(IterableDataset[Any]):
    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*self.columns, strict=True)


@exact(gauss_newton=True)
def a_loss_per_token() -> Setting:
    """The mean is over tokens: N is the number of losses."""

    def per_token(model: Any, batch: Any) -> Tensor:
        z, y = model(batch[0]), batch[1]
        return functional.cross_entropy(z[y >= 0], y[y >= 0], reduction="none")

    x, y = torch.randn(4, 3, 4), torch.randint(-1, 3, (4, 3))
    return Setting(mlp(), per_token, (x, y))


@refused("a list whose items the loss takes as batches", variants=("one", "two", "dicts"), gauss_newton=True)
def a_list_of_batches(form: str) -> Setting:
    x, z = torch.randn(12, 4), torch.randn(12, 3)
    lists = {"one": [(x, z)], "two": [(x[:6], z[:6]), (x[6:], z[6:])], "dicts": [{0: x, 1: z}]}
    return Setting(mlp(), squares, lists[form])


@refused("a list whose items the loss takes as batches")
def a_list_of_batches_that_cannot_be_stacked() -> Setting:
    x, y = points(12)
    return Setting(mlp(), data=[(x[:8], y[:8]), (x[8:], y[8:])])


@refused("differ in shape.*tuple", gauss_newton=True)
def a_list_for_a_tuple() -> Setting:
    return Setting(mlp(), data=list(points()))


@exact()
def sequences_that_look_like_batches() -> Setting:
    """Examples [t, 4] with [t] targets: each is one example of a model that reads sequences."""

    def forward(x: Tensor) -> Tensor:
        return x.cumsum(1).flatten(1)

    model = nn.Sequential(Applies(forward), nn.Linear(12, 3), nn.Tanh())
    x, y = torch.randn(5, 3, 4), torch.randn(5, 3)
    return Setting(model, squares, list(zip(x, y, strict=True)), batch=(x, y))


# Operations whose double backward is missing or wrong.


class FusedCrossEntropy(torch.autograd.Function):
    """Keeps the softmax for its backward pass, which so is a constant when differentiated."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(-1)
        ctx.save_for_backward(p, labels)
        return -p.gather(1, labels[:, None]).log()[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, labels = ctx.saved_tensors
        d = p.clone()
        d[torch.arange(len(labels)), labels] -= 1
        return d * grad[:, None], None


class FusedSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.s = torch.sigmoid(x)
        ctx.save_for_backward(x)
        return x * ctx.s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * (ctx.s + x * ctx.s * (1 - ctx.s))


class FusedNorm(torch.autograd.Function):
    """A root-mean-square norm that keeps 1/rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x)
        return x * ctx.r

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.r * (grad - x * ctx.r**2 * (grad * x).mean(-1, keepdim=True))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Cube(torch.autograd.Function):
    """Right: its backward pass can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def fused_cross_entropy(model: Any, batch: Any) -> Tensor:
    return FusedCrossEntropy.apply(model(batch[0]), batch[1])


@differences("FusedCrossEntropyBackward", variants=("float64", "float32", "bfloat16"), gauss_newton=True)
def a_fused_loss(kind: str) -> Setting:
    dtype = getattr(torch, kind)
    x, y = points()
    return Setting(mlp().to(dtype), fused_cross_entropy, (x.to(dtype), y), plain_losses=cross_entropy)


@differences("FusedSwishBackward", variants=("float64", "float32", "bfloat16"))
def a_fused_activation(kind: str) -> Setting:
    dtype = getattr(torch, kind)
    x, y = points()
    model = mlp(Applies(FusedSwish.apply)).to(dtype)
    plain = mlp(nn.SiLU())
    plain.load_state_dict(model.state_dict())
    return Setting(model, data=(x.to(dtype), y), plain_model=plain)


@differences("FusedNormBackward")
def a_fused_norm() -> Setting:
    return Setting(nn.Sequential(nn.Linear(4, 5), Applies(FusedNorm.apply), nn.Linear(5, 3)))


@differences("SquareBackward")
def once_differentiable() -> Setting:
    return Setting(mlp(Applies(Square.apply)))


@exact(gauss_newton=True)
def a_hand_written_function_that_is_right() -> Setting:
    return Setting(mlp(Applies(Cube.apply)))


@differences("FusedSwishBackward")
def a_fused_activation_in_the_last_batch_alone() -> Setting:
    """The first batch has none of it: data choose the path."""

    def through(swish: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([swish(row) if row.abs().max() > 1.5 else torch.tanh(row) for row in x.split(1)])

    x, y = points()
    x = torch.cat([x[:8], 8 * x[8:]])
    model = mlp(Applies(through(FusedSwish.apply)))
    right = mlp(Applies(through(functional.silu)))
    right.load_state_dict(model.state_dict())
    rows = list(zip(x, y, strict=True))
    return Setting(model, data=rows, batch=(x, y), plain_model=right, options={"batch_size": 4})


@refused("mode='central-difference'")
def a_fused_activation_by_the_mode_asked_for() -> Setting:
    return Setting(mlp(Applies(FusedSwish.apply)), options={"mode": "grad-of-grad"})


def weight_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(layer)


@differences("WeightNormInterface", variants={"old": torch.nn.utils.weight_norm, "parametrised": weight_norm})
def weights_of_unit_norm(norm: Callable[[nn.Module], nn.Module]) -> Setting:
    with torch.no_grad():  # or the model could not be copied
        return Setting(nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)))


@refused("mode='central-difference'", variants={"weight norm": weight_norm, "fused": None}, gauss_newton=True)
def no_forward_mode(norm: Any) -> Setting:
    layer = nn.Linear(4, 5) if norm is None else norm(nn.Linear(4, 5))
    activation = Applies(FusedSwish.apply) if norm is None else nn.Tanh()
    return Setting(nn.Sequential(layer, activation, nn.Linear(5, 3)), options={"mode": "jvp-of-grad"})


@differences("central differences", variants=("mean", "sum", "max"))
def bags_of_embeddings(mode: str) -> Setting:
    model = nn.Sequential(nn.EmbeddingBag(6, 4, mode=mode), nn.Tanh(), nn.Linear(4, 3))
    return Setting(model, data=(torch.randint(0, 6, (7, 3)), torch.arange(7) % 3))


@differences("central differences")
def distances() -> Setting:
    centres = torch.randn(4, 5)
    return Setting(
        nn.Sequential(nn.Linear(4, 5), Applies(lambda x: torch.cdist(x, centres.to(x))), nn.Tanh(), nn.Linear(4, 3))
    )


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, [5], None, self.b, 1e-5)[0]


@differences("central differences")
def a_layer_norm_without_weight() -> Setting:
    return Setting(nn.Sequential(nn.Linear(4, 5), Biased(), nn.Tanh(), nn.Linear(5, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(-1, 1, 2, 2)
        return self.o(functional.scaled_dot_product_attention(q, q, q).flatten(1))


@said("math path")
def attention_kernels() -> Setting:
    return Setting(Attention())


@exact()
def attention_kernels_by_differences() -> Setting:
    return Setting(Attention(), options={"mode": "central-difference"})


# Compiled, checkpointed, narrowed.


@exact(variants={"relu": nn.ReLU, "tanh": nn.Tanh}, gauss_newton=True)
def compiled(activation: type[nn.Module]) -> Setting:
    return Setting(torch.compile(mlp(activation()), backend="aot_eager"), plain_model=None)


@exact()
def a_compiled_layer() -> Setting:
    model = mlp(nn.ReLU())
    model[0].compile(backend="aot_eager")
    return Setting(model, plain_model=mlp_relu_like(model))


def mlp_relu_like(model: nn.Module) -> nn.Module:
    plain = mlp(nn.ReLU())
    plain.load_state_dict(model.state_dict())
    return plain


class Narrowed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


class Whole(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@exact(variants=("inside", "compiled"), tolerance=3e-2)
def autocast(form: str) -> Setting:
    inner = mlp().float()
    x, y = points()
    model: nn.Module = Narrowed(inner)
    if form == "compiled":
        model = torch.compile(model, backend="aot_eager")
    return Setting(model, data=(x.float(), y), plain_model=Whole(inner))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@exact(gauss_newton=True)
def checkpointed() -> Setting:
    return Setting(Checkpointed(mlp(), False).train())


@refused("use_reentrant", variants=("auto", "jvp-of-grad", "central-difference"), gauss_newton=True)
def checkpointed_in_the_reentrant_way(mode: str) -> Setting:
    x, y = points()
    # As in a Trainer, inputs require gradients, or nothing of a re-entrant layer would.
    return Setting(Checkpointed(mlp(), True).train(), data=(x.requires_grad_(), y), options={"mode": mode})


@exact()
def made_in_inference_mode() -> Setting:
    with torch.inference_mode():
        model = mlp()
        x, y = points()
    plain = mlp()
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    return Setting(model, data=(x, y), plain_model=plain, batch=(x.clone(), y.clone()))


# Adapters and quantised weights.


class Int8(nn.Parameter):
    """A parameter with an attribute of its own, as bitsandbytes has."""

    CB: Tensor


class Quantised(nn.Module):
    """A frozen layer of 8-bit weights."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-127, 127, (5, 4), dtype=torch.int8)
        self.weight = torch.Tensor._make_subclass(Int8, codes, False)
        self.weight.CB = torch.full((1,), 1 / 127)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x) * self.weight.CB.to(x)).T


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))
        self.scaling, self._disable_adapters = {"default": 0.5}, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self._disable_adapters else y + x @ self.A.T @ self.B.T * self.scaling["default"]


def adapted(base: nn.Module) -> nn.Module:
    return nn.Sequential(LoRA(base), nn.Tanh(), nn.Linear(5, 3))


@exact(gauss_newton=True, variants=("auto", "jvp-of-grad", "central-difference"))
def adapters_on_quantised_weights(mode: str) -> Setting:
    model = adapted(Quantised())
    plain = adapted(nn.Linear(4, 5, bias=False))
    with torch.no_grad():
        plain[0].base.weight.copy_(model[0].base.weight * model[0].base.weight.CB)
        for p, q in zip(_trained(plain), _trained(model), strict=True):
            p.copy_(q)
    return Setting(model, plain_model=plain, options={"mode": mode})


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@exact()
def frozen_integers_are_no_parameters() -> Setting:
    setting = adapters_on_quantised_weights("auto")
    return Setting(setting.model, plain_model=setting.plain_model, parameters=Parameters(setting.model, frozen=True))


@refused("only integers", gauss_newton=True)
def integers_asked_for_by_name() -> Setting:
    return Setting(adapted(Quantised()), parameters="0.base.weight")


# What is no function, or not the same one twice.


@said("belong to no function")
def a_part_without_gradients() -> Setting:
    def half(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            h = model[0](batch[0])
        return functional.cross_entropy(model[2](torch.tanh(h)), batch[1], reduction="none")

    model = mlp()
    # By autograd's definition the first layer is a constant: H is that of the last alone.
    return Setting(model, half, differences=False)


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> Any:
        return torch.randn(4, dtype=torch.float64), place % 3


@refused("another at every reading", variants=("train", "eval"), gauss_newton=True)
def random_augmentation(mode: str) -> Setting:
    return Setting(mlp().train(mode == "train"), data=Noisy())


@refused("dropout layers")
def dropout_in_training() -> Setting:
    return Setting(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).train())


@refused("shuffle=False")
def shuffled() -> Setting:
    return Setting(mlp(), data=DataLoader(TensorDataset(*points()), batch_size=4, shuffle=True))


@refused("loss or the model is random")
def noise_of_one_percent() -> Setting:
    return Setting(mlp(Applies(lambda x: x * (1 + 0.01 * torch.randn(())))).eval())


@refused("positive integer")
def no_rows_per_batch() -> Setting:
    return Setting(mlp(), data=list(zip(*points(), strict=True)), options={"batch_size": 0})
