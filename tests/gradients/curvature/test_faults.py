"""What goes wrong is named, what cannot be is computed another way, and the model is as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, class_losses, gpt2, token_losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsketch import CausalLM, Parameters, fisher, gauss_newton, hessian, loss_gradient
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError

BUILDERS = (hessian, gauss_newton, fisher)
MODES = ("grad-of-grad", "jvp-of-grad", "central-difference")


def small(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


def data(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, generator=generator), torch.tensor(i % 3)) for i in range(count)]


class Reshuffled:
    """Examples in another order at every pass."""

    def __init__(self) -> None:
        self.examples = data()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Any:
        if i == 0:
            self.examples = self.examples[1:] + self.examples[:1]
        return self.examples[i]


@pytest.mark.parametrize("build", BUILDERS)
def test_what_changes_from_pass_to_pass_is_refused(build):
    with pytest.raises(InputError, match=r"train mode with 1 dropout layers, '2' first.*model\.eval\(\)"):
        build(small(dropout=0.5).train(), class_losses, data())
    with pytest.raises(InputError, match="order of the data changes"):
        build(small(), class_losses, Reshuffled())
    with pytest.raises(InputError, match="loss or the model is random"):
        build(small().eval(), lambda m, b: class_losses(m, b) * torch.rand(()), data())
    build(small(dropout=0.5).train(), class_losses, data(), check=False)


def of_the_batch(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy over the tokens of the whole batch, as a Trainer divides it."""
    return class_losses(model, batch) * len(batch[0]) / (1 + batch[1].sum())


@pytest.mark.parametrize("build", BUILDERS)
def test_a_loss_that_depends_on_its_company_is_told_where_batches_are_made_here(build):
    """Then the products are others for every batch_size; a batch of the user's own is what it is."""
    with pytest.warns(GradsketchWarning, match="batch_size"):
        build(small().eval(), of_the_batch, data())
    with pytest.warns(GradsketchWarning, match="batch_size"):
        build(small(norm=True).train(), class_losses, data())
    quiet = (
        (of_the_batch, data(1)),
        (class_losses, data()),
        (of_the_batch, tuple(map(torch.stack, zip(*data(), strict=True)))),
    )
    for losses, examples in quiet:
        build(small().eval(), losses, examples)
    build(small().eval(), of_the_batch, data(), batch_size=1)
    build(small(norm=True).eval(), class_losses, data(3))


def test_the_company_of_padding_is_rounding():
    model = gpt2().model.bfloat16()
    rows = [{"input_ids": [1 + i % 3] * (2 + 4 * (i % 2))} for i in range(4)]
    hessian(model.eval(), CausalLM(), rows)


class LossInside(nn.Linear):
    """A model that returns its own loss, as those of transformers do where they are given labels."""

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return nn.functional.cross_entropy(logits, labels, reduction="none"), logits


@pytest.mark.parametrize("mode", ["auto", "jvp-of-grad", "central-difference"])
def test_a_gauss_newton_matrix_of_a_loss_made_in_the_model_is_told_to_be_zero(mode):
    torch.manual_seed(0)
    model, batch = LossInside(4, 3), tuple(map(torch.stack, zip(*data(), strict=True)))
    operator = gauss_newton(model, lambda m, b: m(*b)[0], batch, mode=mode)
    with pytest.warns(GradsketchWarning, match="linear in what the model returns"):
        product = operator(torch.ones(15))
    assert not product.any()
    operator(torch.ones(15))  # told once
    right = gauss_newton(model, lambda m, b: nn.functional.cross_entropy(m(*b)[1], b[1], reduction="none"), batch)
    assert right(torch.randn(15)).norm() > 0.01


class NotInFloat64(nn.Module):
    """As a mask that is added twice: beyond the numbers of float64, and so NaN, though not of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan") if x.dtype == torch.float64 else x


@pytest.mark.parametrize("mode", ["auto", "central-difference"])
def test_differences_are_taken_in_the_precision_in_which_a_model_is_finite(mode):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    v, batch = torch.randn(43), tuple(map(torch.stack, zip(*data(), strict=True)))
    product = hessian(nn.Sequential(body, NotInFloat64()), class_losses, batch, mode=mode)(v)
    torch.testing.assert_close(product, hessian(body, class_losses, batch)(v), rtol=1e-2, atol=1e-3)


def test_unusable_data_is_named():
    model = small()
    with pytest.raises(InputError, match="yields nothing"):
        hessian(model, class_losses, [])
    with pytest.raises(InputError, match="read only once"):
        hessian(model, class_losses, (example for example in data()))
    bad = data(7)
    bad[5] = (bad[5][0] * torch.nan, bad[5][1])
    with pytest.raises(NonFiniteError, match="example 1 in batch 2 is nan"):
        hessian(model, class_losses, bad, batch_size=2)
    with pytest.raises(NonFiniteError, match="example 1 in batch 2 is nan"):
        hessian(model, class_losses, bad, batch_size=2, check=False)(torch.ones(43))
    with pytest.raises(NonFiniteError, match="example 1 in batch 2 is nan"):
        loss_gradient(model, class_losses, bad, batch_size=2)


def test_a_second_derivative_that_is_not_finite_is_an_error():
    # |w|^1.5 at 0: loss and gradient are finite, the Hessian is not.
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    H = hessian(model, lambda m, b: (m.weight.abs() ** 1.5).sum() + b[1] * 0.0, data())
    with pytest.raises(NonFiniteError):
        H(torch.ones(15))


@pytest.mark.parametrize("build", BUILDERS)
def test_losses_must_be_one_per_example(build):
    with pytest.raises(InputError, match="reduction"):
        build(small(), lambda m, b: class_losses(m, b).mean(), data())


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", [False, True])
def test_a_loss_that_reaches_no_parameter_is_refused(build, mode, check):
    def detached(model: nn.Module, batch: Any) -> Tensor:
        return class_losses(lambda x: model(x).detach(), batch)  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"none of the 4 selected parameters, '0\.weight' first"):
        build(small(), detached, data(), mode=mode, check=check)(torch.ones(43))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("mode", MODES)
def test_parameters_the_loss_ignores_have_zero_rows(build, mode):
    model = small()
    model[1].register_module("spare", nn.Linear(2, 2))
    operator = build(model, class_losses, data(), mode=mode)
    product = operator(torch.ones(operator.n))
    assert operator.n == 43 + 6
    used = torch.tensor([True] * 25 + [False] * 6 + [True] * 18)
    assert (product[~used] == 0).all()
    alone = build(small(), class_losses, data(), mode=mode)
    torch.testing.assert_close(product[used], alone(torch.ones(43)), rtol=2e-3, atol=2e-4)


def test_parameters_of_another_model_are_refused():
    with pytest.raises(InputError, match=r"4 of 4 parameters that Sequential does not hold, '0\.weight' first"):
        hessian(small(), class_losses, data(), Parameters(small()))


def test_gauss_newton_needs_one_call_and_nothing_besides():
    def twice(model: nn.Module, batch: Any) -> Tensor:
        return class_losses(model, batch) + class_losses(model, batch)

    def decayed(model: nn.Module, batch: Any) -> Tensor:
        return class_losses(model, batch) + sum(p.square().sum() for p in model.parameters())

    with pytest.raises(InputError, match="called the model 2 times"):
        gauss_newton(small(), twice, data())(torch.ones(43))
    with pytest.raises(InputError, match="uses parameters of the model besides its output"):
        gauss_newton(small(), decayed, data())(torch.ones(43))
    hessian(small(), decayed, data())(torch.ones(43))


def test_frozen_parameters_can_be_asked_for_and_stay_frozen():
    model = small().requires_grad_(False)
    with pytest.raises(InputError):
        hessian(model, class_losses, data())
    H = hessian(model, class_losses, data(), Parameters(model, frozen=True))
    reference = hessian(small(), class_losses, data())
    v = torch.randn(43, generator=torch.Generator().manual_seed(2))
    assert torch.equal(H(v), reference(v))
    assert not any(p.requires_grad for p in model.parameters())


class Interrupted(nn.Module):
    """Raises at the given forward or backward pass."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error, self.armed = error, False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed == "forward":
            raise self.error
        if self.armed == "backward" and x.requires_grad:
            x.register_hook(self._raise)
        return x

    def _raise(self, gradient: Tensor) -> None:
        raise self.error


def state_of(model: nn.Module) -> Any:
    return (
        [(n, id(p), p.requires_grad, id(p.grad), p.detach().clone(), p._version) for n, p in model.named_parameters()],
        [(n, id(b), b.clone()) for n, b in model.named_buffers()],
        [(m.training, dict(m._forward_hooks), dict(m._backward_hooks), set(m.__dict__)) for m in model.modules()],
    )


@pytest.mark.filterwarnings("ignore:the loss of example")  # BatchNorm in training mode compares them
@pytest.mark.parametrize("build", [*BUILDERS, "gradient"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moment", [None, "forward", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(build, mode, moment, error):
    model = small(norm=True).append(trap := Interrupted(error)).train()
    model[0].weight.requires_grad_(False)
    model[1].weight.grad = torch.ones(5)
    model.register_forward_hook(lambda *_: None)
    before = state_of(model)

    def work() -> None:
        if build == "gradient":
            loss_gradient(model, class_losses, data())
        else:
            operator = build(model, class_losses, data(), mode=mode, batch_size=4)
            trap.armed = moment
            operator(torch.ones(operator.n))

    if moment is None or build == "gradient":
        work()
    else:
        with pytest.raises(error):
            work()
    trap.armed = False
    assert str(state_of(model)) == str(before)


@pytest.mark.parametrize("build", BUILDERS)
def test_one_batch_is_evaluated_once_until_the_model_changes(build):
    model, calls = small().double(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    whole = tuple(torch.stack(column) for column in zip(*data(), strict=True))
    whole = (whole[0].double(), whole[1])
    operator = build(model, class_losses, whole, check=False)
    v = torch.ones(43, dtype=torch.float64)
    first = operator(v)
    assert torch.equal(operator(v), first)
    assert len(calls) == 1
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    second = operator(v)
    assert len(calls) == 2
    torch.testing.assert_close(second, build(model, class_losses, whole, check=False)(v))
    assert not torch.allclose(second, first)
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # no gradients: nothing changes
    assert torch.equal(operator(v), second)


def test_a_kept_graph_goes_with_its_operator():
    model, seen = small(), []
    model[2].register_forward_hook(lambda m, i, output: seen.append(weakref.ref(output)))
    whole = tuple(torch.stack(column) for column in zip(*data(), strict=True))
    H = hessian(model, class_losses, whole, check=False)
    H(torch.ones(43))
    gc.disable()  # references, not the collector, must free it
    try:
        del H
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_weights_accumulate_in_float32(build, mode):
    model = small().bfloat16()
    examples = [(x.bfloat16(), y) for x, y in data(3)] * 100

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")

    wide = small().bfloat16().float()
    v = torch.randn(43, generator=torch.Generator().manual_seed(2)).bfloat16()
    came = build(model, losses, examples, mode=mode, batch_size=3)(v)
    wanted = build(wide, losses, [(x.float(), y) for x, y in examples[:3]], mode="grad-of-grad")(v.float())
    assert came.dtype == torch.float32
    # 100 equal batches: a sum kept in bfloat16 would stall after 256 units in the last place and be off by half.
    assert (came - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("mode", MODES)
def test_results_have_the_vector_dtype(mode):
    H = hessian(small(), class_losses, data(), mode=mode)
    v = torch.ones(43)
    assert H(v).dtype == torch.float32
    assert H(v.double()).dtype == torch.float64
    torch.testing.assert_close(H(v.double()).float(), H(v), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", BUILDERS)
def test_works_under_no_grad_and_inference_mode(build):
    v = torch.ones(43)
    wanted = build(small(), class_losses, data())(v)
    with torch.no_grad():
        assert torch.equal(build(small(), class_losses, data())(v), wanted)
    model = small()
    with torch.inference_mode():
        assert torch.equal(build(model, class_losses, data())(torch.ones(43)), wanted)


def test_attention_kernels_without_double_backward_take_another_path_and_say_so():
    eager, sdpa = gpt2(), gpt2("sdpa")
    v = torch.randn(hessian(eager.model, eager.losses, eager.batch).n, dtype=torch.float64)
    wanted = hessian(eager.model, eager.losses, eager.batch)(v)
    with pytest.warns(GradsketchWarning, match="math path"):
        H = hessian(sdpa.model, sdpa.losses, sdpa.batch)
    torch.testing.assert_close(H(v), wanted, rtol=1e-9, atol=1e-9)
    flash = hessian(sdpa.model, sdpa.losses, sdpa.batch, mode="central-difference")
    assert (flash(v) - wanted).norm() < 1e-6 * wanted.norm()


class Opaque(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("build", [hessian, gauss_newton])
def test_operations_without_double_backward_fall_back_to_differences(build):
    def losses_with(square: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        class Squared(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[3](square(self[1](self[0](x))))

        model = Squared(*small().double())
        return lambda kind, mode="auto": kind(
            model, class_losses, [(x.double(), y) for x, y in data()], mode=mode, check=False
        )

    v = torch.randn(43, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = losses_with(torch.square)(build)(v)
    operator = losses_with(Opaque.apply)(build)
    with pytest.warns(GradsketchWarning, match="central differences"):
        came = operator(v)
    assert (came - wanted).norm() < 1e-7 * wanted.norm()
    assert torch.equal(operator(v), came)  # says it once
    with pytest.raises(InputError, match="mode='central-difference'"):
        losses_with(Opaque.apply)(build, "grad-of-grad")(v)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("streamed", [False, True])
def test_checkpointed_layers_are_right(build, mode, streamed):
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    examples = [(x.double(), y) for x, y in data()]
    whole = tuple(torch.stack(column) for column in zip(*examples, strict=True))
    v = torch.randn(2, 43, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = build(small().double(), class_losses, whole)(v)
    operator = build(
        Checkpointed(*small().double()), class_losses, examples if streamed else whole, mode=mode, batch_size=4
    )
    torch.testing.assert_close(operator(v), wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(operator(v), wanted, rtol=1e-6, atol=1e-8)


def test_large_outputs_are_differentiated_twice_a_few_examples_at_a_time(monkeypatch):
    case = CASES["gpt2"]()
    v = torch.randn(2, sum(p.numel() for p in case.model.parameters()), dtype=torch.float64)
    wanted = gauss_newton(case.model, case.losses, case.batch)(v)
    monkeypatch.setattr("gradsketch.gradients.curvature.outer_products._HEAD_ENTRIES", 2 * 5 * 11)
    torch.testing.assert_close(gauss_newton(case.model, case.losses, case.batch)(v), wanted)


def test_outputs_the_loss_ignores_cost_nothing():
    case = CASES["gpt2"]()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return token_losses(lambda **kw: model(**kw, output_hidden_states=True), batch)  # type: ignore[arg-type]

    v = torch.randn(sum(p.numel() for p in case.model.parameters()), dtype=torch.float64)
    wanted = gauss_newton(case.model, case.losses, case.batch)(v)
    torch.testing.assert_close(gauss_newton(case.model, losses, case.batch)(v), wanted)


class WithTable(nn.Module):
    """Answers with logits and a constant of another shape; its own flags and parts are for losses to read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scale = nn.Linear(4, 3).double(), 2.0
        self.register_buffer("table", torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x).tanh(), self.table

    def __len__(self) -> int:
        return 5


def at_table(model: Any, batch: Any) -> Tensor:
    outputs, table = model(batch[0])
    return (outputs.square() * table).sum(1)


def over_tokens(model: Any, batch: Any) -> Tensor:
    outputs, _ = model(batch[0])
    return outputs.square().sum(1) / batch[1].sum()


def by_examples(model: Any, batch: Any) -> Tensor:
    outputs, _ = model(batch[0])
    return nn.functional.cross_entropy(outputs @ outputs.mT, torch.arange(len(outputs)), reduction="none")


def counted(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.arange(1, count + 1)


@pytest.mark.parametrize("losses", [at_table, over_tokens, by_examples])
@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_examples_are_cut_apart_only_where_their_losses_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, losses: Any, count: int, mode: Any
) -> None:
    model, v = WithTable(), torch.linspace(-1, 1, 15, dtype=torch.float64)
    wanted = gauss_newton(model, losses, counted(count), mode=mode)(v)
    monkeypatch.setattr("gradsketch.gradients.curvature.outer_products._HEAD_ENTRIES", 3)
    torch.testing.assert_close(gauss_newton(model, losses, counted(count), mode=mode)(v), wanted)


READ: dict[str, Callable[[Any], Any]] = {
    "mode": lambda model: 1 + model.training,
    "class": lambda model: 1 + isinstance(model, WithTable),
    "length": len,
    "attribute": lambda model: model.scale,
    "module": lambda model: len(list(model.modules())),
    "buffer": lambda model: dict(model.named_buffers())["table"][2],
    "state": lambda model: len(model.state_dict()),
    "dtype": lambda model: next(model.parameters()).itemsize,
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_may_read_the_model_that_answered(read: Callable[[Any], Any], mode: Any) -> None:
    model, v = WithTable().eval(), torch.linspace(-1, 1, 15, dtype=torch.float64)
    factor = float(read(model))
    wanted = factor * gauss_newton(model, at_table, counted(4), mode=mode)(v)
    product = gauss_newton(model, lambda m, batch: at_table(m, batch) * read(m), counted(4), mode=mode)(v)
    torch.testing.assert_close(product, wanted, rtol=1e-6, atol=1e-8)


def test_a_loss_that_tells_the_model_from_its_stand_in_is_refused() -> None:
    def losses(model: Any, batch: Any) -> Tensor:
        return at_table(model, batch) * (2 if type(model) is WithTable else 1)

    with pytest.raises(InputError, match="same output again"):
        gauss_newton(WithTable(), losses, counted(4))(torch.ones(15, dtype=torch.float64))


@pytest.mark.parametrize("builder", BUILDERS)
def test_an_autocast_around_a_product_is_for_the_forward_pass_alone(builder: Any) -> None:
    def wide(model: nn.Module, batch: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return class_losses(model, batch)

    model, batch, v = small(), (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(43)
    wanted = builder(model, wide, batch)(v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(builder(model, wide, batch)(v), wanted)


STOPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "in part": lambda h: h.tanh() * h.detach(),
    "straight through": lambda h: h + (h.round() - h).detach(),
    "normed": lambda h: h / h.norm(dim=1, keepdim=True).detach(),
}


@pytest.mark.parametrize("stop", STOPPED.values(), ids=STOPPED)
@pytest.mark.parametrize("builder", BUILDERS)
def test_differences_of_gradients_that_belong_to_no_function_say_so(
    stop: Callable[[Tensor], Tensor], builder: Any
) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    model = nn.Sequential(first, Applied(stop), last)
    rows, classes = counted(4)
    operator = builder(model, class_losses, (rows, classes % 3), mode="central-difference")
    with pytest.warns(GradsketchWarning, match="asymmetric.*belong to no function"):
        operator(torch.ones(35, dtype=torch.float64))
    assert not operator.check.conclusive


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
