"""Situations that once gave wrong numbers without an error, or left marks, when gradients were captured."""

import contextlib
import copy
import functools
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError


def losses_of(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * batch.get("weight", 1)


def some(b, *shape, dtype=torch.float64):
    torch.manual_seed(b)
    return {"x": torch.randn(b, *shape).to(dtype), "y": torch.randint(0, 3, (b,))}


def exact(model, batch):
    """Return flat gradients of one example alone at a time, by whole backward passes in the model's own dtype."""
    rows = []
    for i in range(len(batch["y"])):
        losses_of(model, {name: value[i : i + 1] for name, value in batch.items()}).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    return torch.stack(rows)


def sketcher_of(model, losses=losses_of, **options):
    parameters = gs.Parameters(model)
    return gs.GradientSketcher(model, losses, gs.BlockSum(parameters, parameters.n), **options)


def assert_right(sketcher, batch, tolerance=1e-9):
    """Hold each row against the exact one, relative to its own length; being slow is no fault here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradsketchWarning)
        got = sketcher(batch).values.double()
    expected = sketcher.sketch(exact(sketcher.model, batch).double()).double()
    assert bool(((got - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all())


class Shuffled(nn.Module):
    """Puts the examples in another order meanwhile, so that the owners of rows must be measured."""

    def __init__(self, between=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(5, 6), nn.Linear(6, 3), between

    def forward(self, x):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return self.last(self.between(self.first(x[order])))[order.argsort()]


@pytest.mark.parametrize("small", [1e-3, 1e-9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float64, 1e-9)])
def test_an_example_of_small_gradient_among_large_ones_is_kept(dtype, tolerance, small):
    batch = some(6, 5, dtype=dtype)
    batch["weight"] = torch.ones(6, dtype=dtype).index_fill(0, torch.tensor(2), small)
    assert_right(sketcher_of(Shuffled().to(dtype)), batch, tolerance)


@pytest.mark.parametrize("b", [32, 128, 256, 400])
def test_many_examples_are_measured_within_the_range_of_float16(b):
    assert_right(sketcher_of(Shuffled().half()), some(b, 5, dtype=torch.float16), 0.05)


def test_a_gradient_that_is_not_finite_does_not_hide_where_rows_are_measured():
    model = Shuffled(lambda x: x.abs().sqrt()).double()
    nn.init.zeros_(model.first.bias)
    batch = some(6, 5)
    batch["x"][3] = 0
    with pytest.raises(NonFiniteError, match="example 3"):
        sketcher_of(model)(batch)
    sketcher = sketcher_of(model, on_non_finite="skip")
    sketched = sketcher(batch)
    assert list(sketched.skipped) == [3]
    assert not sketcher.slow  # one such batch says nothing of others
    others = [0, 1, 2, 4, 5]
    expected = sketcher_of(model).sketch(exact(model, {name: value[others] for name, value in batch.items()}))
    torch.testing.assert_close(sketched.values[others], expected)


def centred(model, batch, coupled=False):
    logits = model(batch["x"])
    return functional.cross_entropy(logits - logits.mean(0) * coupled, batch["y"], reduction="none")


class Holder:
    def __init__(self, coupled):
        self.coupled = coupled

    def losses(self, model, batch):
        return centred(model, batch, self.coupled)


@pytest.mark.parametrize(
    "make",
    [
        lambda coupled: lambda model, batch: centred(model, batch, coupled),
        lambda coupled: functools.partial(centred, coupled=coupled),
        lambda coupled: Holder(coupled).losses,
    ],
    ids=["closure", "partial", "method"],
)
def test_a_task_is_not_trusted_for_what_another_of_the_same_code_proved(make):
    model = nn.Linear(5, 3).double()
    first = sketcher_of(model, make(False))
    first(some(5, 5))
    with pytest.raises(InputError, match="together"):
        sketcher_of(model, make(True))(some(5, 5))
    if make(False).__class__ is not type(Holder(False).losses):
        assert sketcher_of(model, make(False)).audits.audited == first.audits.audited == 1


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x).tanh().clone()
        hidden.transpose_(0, 1)
        return self.last(hidden).sum(0)


class Listed(nn.Module):
    """Sorts its examples by a list of places, where as many numbers an example has as there are examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(1, 6), nn.Linear(6, 3)

    def forward(self, x):
        order = sorted(range(len(x)), key=lambda i: float(x[i, 0]))
        hidden = self.first(x[:, :1][order]).tanh()
        return self.last(hidden[[order.index(i) for i in range(len(x))]])


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(functional.unfold(x, 2, stride=2).mT).tanh().sum(1))


@pytest.mark.parametrize(
    ("model", "sizes", "shape"),
    [(Turned, (1, 4, 5), (4, 5)), (Listed, (1, 3, 5, 5), (5,)), (Patches, (1, 8, 4), (1, 4, 4))],
    ids=["transpose_", "list", "unfold"],
)
def test_copies_and_turned_tensors_are_not_taken_for_views(model, sizes, shape):
    """And what a batch of one proved is proved again in company."""
    sketcher = sketcher_of(model().double())
    for b in sizes:
        assert_right(sketcher, some(b, *shape))
    assert not sketcher.slow
    assert sketcher.audits.audited >= 2


def test_functions_may_be_called_by_name():
    class Named(nn.Linear):
        def forward(self, x):
            hidden = torch.unsqueeze(input=super().forward(torch.flatten(input=x, start_dim=1)), dim=1)
            return torch.squeeze(input=hidden, dim=1)

    sketcher = sketcher_of(Named(20, 3).double())
    assert_right(sketcher, some(5, 4, 5))
    assert not sketcher.slow


def test_a_parameter_that_was_replaced_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    sketcher = sketcher_of(model)
    sketcher(some(5, 5))
    model[2] = nn.Linear(6, 3).double()
    with pytest.raises(InputError, match=r"2\.weight.*replaced"):
        sketcher(some(5, 5))


@pytest.mark.parametrize(
    "change",
    [lambda model: torch.nn.utils.parametrizations.weight_norm(model[2]), lambda model: model.pop(2)],
    ids=["parametrized", "removed"],
)
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_a_parameter_that_the_model_no_longer_has_is_refused(change, method):
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    sketcher = sketcher_of(model, method=method)
    sketcher(some(5, 5))
    change(model)
    with pytest.raises(InputError, match=r"2\.weight.*replaced"):
        sketcher(some(5, 5))


class Centres(nn.Module):
    """Compares examples with each other where training or asked to."""

    def __init__(self):
        super().__init__()
        self.coupled = False

    def forward(self, x):
        return x - x.mean(0) if self.training or self.coupled else x


def _coupled_forward(model):
    model[1].forward = lambda x: x - x.mean(0)


@pytest.mark.parametrize(
    "change",
    {
        "mode": lambda model: model.train(),
        "mode of a part": lambda model: model[1].train(),
        "flag": lambda model: setattr(model[1], "coupled", True),
        "module added": lambda model: model.append(Centres()),
        "module exchanged": lambda model: model.__setitem__(1, Centres()),
        "hook": lambda model: model[1].register_forward_hook(lambda m, x, y: y - y.mean(0)),
        "backward hook": lambda model: model[1].register_full_backward_hook(lambda m, x, y: (x[0] / x[0].norm(),)),
        "forward replaced": _coupled_forward,
    }.items(),
    ids=lambda item: item[0].replace(" ", "_"),
)
@pytest.mark.filterwarnings("ignore::gradsketch.GradsketchWarning")  # the exact path is tried first
@pytest.mark.parametrize("anew", [False, True], ids=["same_sketcher", "new_sketcher"])
def test_a_model_that_was_changed_is_not_trusted_for_what_it_was(change, anew):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), Centres()).double().eval()
    sketcher = sketcher_of(model)
    sketcher(some(5, 5))
    change[1](model)
    with pytest.raises(InputError, match="together"):
        (sketcher_of(model) if anew else sketcher)(some(5, 5))


def test_a_model_that_goes_to_and_fro_is_proved_once_for_each_mode():
    model = nn.Sequential(nn.Linear(5, 3), Centres()).double().eval()
    sketcher = sketcher_of(model)
    sketcher(some(5, 5))
    for _ in range(3):
        model[0].train()
        sketcher(some(5, 5))
        assert sketcher.audits.audited == 1
        model[0].eval()
    sketcher(some(5, 5))
    assert (sketcher.audits.audited, sketcher.audits.batches) == (1, 2)


def test_no_mark_stays_on_the_user_s_tensors():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.register_buffer("scale", torch.ones(1, 5))

        def forward(self, x):
            x = functional.dropout(input=x, training=False)
            x, scale = torch.atleast_2d((x, self.scale))
            return self.linear(x * scale)

    model, batch = Passing().double(), some(5, 5)
    sketcher_of(model)(batch)
    assert not any(vars(t) for t in (*batch.values(), *model.parameters(), *model.buffers()))


class Own(torch.autograd.Function):
    """Runs a module, and its backward pass by itself, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(gradient)
        return x.grad, None


def test_a_use_that_a_function_begins_to_hide_beside_an_ordinary_one_counts():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.shared, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.hides = False

        def forward(self, x):
            hidden = self.first(x)
            again = Own.apply(hidden, self.shared) if self.hides else self.shared(hidden.tanh())
            return self.last((again + self.shared(hidden)).tanh())

    model = Both().double()
    sketcher = sketcher_of(model)
    assert_right(sketcher, some(5, 5))
    model.hides = True
    assert_right(sketcher, some(4, 5))
    assert "shared.weight" in sketcher.slow


def test_rows_that_examples_share_cost_one_more_attempt_and_not_all_of_them():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.runs = nn.Linear(5, 6), nn.Linear(6, 3), 0

        def forward(self, x):
            self.runs += 1
            hidden = self.first(torch.cat([x.new_ones(1, 5), x])).tanh()
            return self.last(hidden[1:] + hidden[:1])

    model = Shared().double()
    sketcher = sketcher_of(model)
    assert_right(sketcher, some(5, 5))
    assert set(sketcher.slow) == {"first.weight", "first.bias"}
    model.runs = 0
    sketcher(some(5, 5))
    assert model.runs == 1 + 5  # one captured, and each example alone


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_error_in_a_loss_keeps_no_tensors_alive(place):
    """Not until the garbage collector runs, for a batch that did not fit is tried again at once."""
    model, hidden = nn.Linear(5, 3).double(), []

    def losses(model, batch):
        out = model(batch["x"])
        hidden.append(weakref.ref(out))
        if place == "forward":
            raise ValueError("no such label")
        out.register_hook(failing)
        return out.sum(1)

    def failing(gradient):
        raise ValueError("no such label")

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            sketcher_of(model, losses)(some(5, 5))
        assert hidden
        assert not [out for out in hidden if out() is not None]
    finally:
        gc.enable()


def in_full_precision(model, batch):
    with torch.autocast("cpu", enabled=False):
        return losses_of(model, batch)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop", "implicit"])
@pytest.mark.parametrize("formed", [False, True], ids=["captured", "formed"])
def test_an_autocast_around_a_call_narrows_what_the_forward_pass_lets_it_and_no_more(method, formed):
    """Backward passes and sketches of a loss that switches autocast off are in its own precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    parameters, batch = gs.Parameters(model), some(5, 5, dtype=torch.float32)
    sketch = gs.AFFD(parameters.n, 16) if formed else gs.BlockSum(parameters, 16)
    sketcher = gs.GradientSketcher(model, in_full_precision, sketch, parameters=parameters, method=method)
    expected = sketcher(batch).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sketcher(batch).values, expected)


def hardest_half(model, batch):
    losses = losses_of(model, batch)
    return torch.where(losses >= losses.median(), losses, 0 * losses)


@pytest.mark.parametrize("b", [3, 5, 8])
def test_coupling_that_spares_the_two_rows_that_ran_alone_is_refused(b):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    batch = some(b, 5)
    hardest = losses_of(model, batch).argsort(descending=True)
    order = [hardest[0], *hardest[2:], hardest[1]]  # both ends are kept
    with pytest.raises(InputError, match="together and"):
        sketcher_of(model, hardest_half)({name: value[torch.tensor(order)] for name, value in batch.items()})


def test_threads_that_sketch_and_differentiate_one_model_wait_for_each_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    other, batch = nn.Linear(5, 3).double(), some(6, 5)
    expected, found = sketcher_of(model)(batch).values, []
    vector = torch.ones(gs.Parameters(model).n, dtype=torch.float64)
    product = gs.hessian(model, losses_of, batch)(vector)

    def sketch():
        found.append(torch.allclose(sketcher_of(model)(batch).values, expected))

    def curve():
        found.append(torch.allclose(gs.hessian(model, losses_of, batch)(vector), product))

    def run_something_else():  # while hooks of the others may be on every module
        found.append(bool(losses_of(other, batch).isfinite().all()))

    def repeat(work):
        try:
            for _ in range(15):
                work()
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=repeat, args=(w,)) for w in (sketch, sketch, curve, run_something_else)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("chosen", ["*", "0.*"])
def test_a_copied_sketcher_gives_the_same_sketches_of_its_own_model(again, chosen):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    parameters, batch = gs.Parameters(model, include=chosen), some(5, 5, dtype=torch.float32)
    for sketch in (gs.AFFD(parameters.n, 16), gs.BlockSum(parameters, 16)):
        sketcher = gs.GradientSketcher(model, losses_of, sketch, parameters=parameters)
        expected, other = sketcher(batch).values, again(sketcher)
        assert torch.equal(other(batch).values, expected)
        with torch.no_grad():
            other.model[0].weight.mul_(2)
        assert not torch.equal(other(batch).values, expected)
        assert torch.equal(sketcher(batch).values, expected) != (other.model is model)


@pytest.mark.parametrize("method", ["auto", "loop", "vmap", "implicit"])
def test_inside_a_transform_of_torch_func_one_sentence_says_so(method):
    model = nn.Linear(5, 3)
    batch, sketch = some(5, 5, dtype=torch.float32), gs.BlockSum(gs.Parameters(model), 16)

    def scaled(x):
        return (gs.sketch_gradients(model, losses_of, batch, sketch, method=method) * x).sum()

    for transformed in (torch.vmap(scaled), torch.func.grad(lambda x: scaled(x[0]))):
        with pytest.raises(InputError, match=r"inside torch\.vmap"):
            transformed(torch.randn(3))


class Without(nn.Module):
    """Of some batches it uses one layer where no gradient is recorded: a call fewer, and none that is new."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = (nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x):
        scale = 1.0
        if len(x) == 4:  # as where a model looks at the whole batch before it takes a way
            scale = x.norm().detach()
        return self.head(self.second(x) * scale + (0 if len(x) == 4 else self.first(x)))


def test_a_batch_without_a_usual_use_is_audited():
    model = Without()
    sketcher = sketcher_of(model)
    sketcher(some(5, 3))
    with pytest.raises(InputError, match="together"):
        sketcher(some(4, 3))
    audited = sketcher.audits.audited
    for _ in range(3):
        sketcher(some(6, 3))
    assert sketcher.audits.audited - audited <= 1
