"""Whatever breaks the capture, the audit finds it: the parameters go to the exact path and the numbers stay right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.per_example import capture, provenance, rules
from gradsketch.gradients.per_example.audit import Audit, failed
from gradsketch.gradients.per_example.capture import Capture, Schedule
from gradsketch.gradients.per_example.contributions import (
    Contribution,
    Direct,
    IndexedRows,
    Inside,
    Outer,
    Placed,
    Sum,
)
from gradsketch.gradients.per_example.interception import Interception
from gradsketch.gradients.per_example.owners import InOrder, Measured


class Turned(nn.Module):
    """An embedding, a norm, a layer, and a head over the batch in another order; long rows have a layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.n, self.l, self.o = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.more = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(self.n(self.e(x)))
        if x.shape[1] > 4:
            h = h + self.more(h)
        return self.o(h.tanh().flip(0)).flip(0)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]).mT, batch["y"], reduction="none").sum(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Turned().double()


@pytest.fixture
def never_by_chance(monkeypatch):
    monkeypatch.setattr(capture, "SCHEDULE", Schedule(share=0.0))


def batch(tokens: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 7, (5, tokens), generator=generator) for name in "xy"}


def sketcher_of(model: nn.Module) -> gs.GradientSketcher:
    return gs.GradientSketcher(model, losses, gs.BlockSum(gs.Parameters(model), 32))


def expected(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Sketches of gradients by autograd, one row alone at a time."""
    parameters = gs.Parameters(model)
    rows = []
    for i in range(len(given["x"])):
        alone = losses(model, {name: value[i : i + 1] for name, value in given.items()}).sum()
        parts = torch.autograd.grad(alone, [t for _, t in parameters], allow_unused=True)
        flat = [torch.zeros_like(t) if p is None else p for p, (_, t) in zip(parts, parameters, strict=True)]
        rows.append(torch.cat([p.flatten() for p in flat]))
    return gs.BlockSum(parameters, 32)(torch.stack(rows))


def _swap_rows_in_order(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    right = InOrder.__call__
    patch.setattr(InOrder, "__call__", lambda self, rows: right(self, rows)[[1, 0, *range(2, self.examples)]])


def _swap_rows_measured(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    right = Measured.__call__
    patch.setattr(Measured, "__call__", lambda self, rows: right(self, rows)[[1, 0, *range(2, self.examples)]])


def _drop_a_contribution(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    right = Interception._consume

    def dropping(self, name, contribution, examples):
        if name != "l.bias":
            right(self, name, contribution, examples)

    patch.setattr(Interception, "_consume", dropping)


def _ignore_a_hook(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    model.l.weight.register_hook(lambda gradient: 3 * gradient)
    patch.setattr(Capture, "heed_hooks", lambda self: None)


def _take_a_factor_of_two(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    right = rules.wide
    patch.setattr(rules, "wide", lambda x: 2 * right(x))  # norms only, here


def _believe_that_nothing_is_turned(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    patch.setitem(provenance._HANDLERS, "flip", provenance._same_dim)


BREAKS = {
    _swap_rows_in_order: {"e.weight", "n.weight", "n.bias", "l.weight", "l.bias"},
    _swap_rows_measured: {"o.weight", "o.bias"},
    _drop_a_contribution: {"l.bias"},
    _ignore_a_hook: {"l.weight"},
    _take_a_factor_of_two: {"n.weight", "n.bias"},
    _believe_that_nothing_is_turned: {"o.weight", "o.bias"},
}


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("audited_late", [False, True])
def test_a_broken_capture_is_found_and_the_numbers_stay_right(
    model, monkeypatch, never_by_chance, break_it, audited_late
):
    sketcher = sketcher_of(model)
    if audited_late:  # sound until a batch with a kind of call that is new
        sketcher(batch())
        assert not sketcher.slow
    break_it(monkeypatch, model)
    given = batch(6 if audited_late else 4, seed=1)
    with pytest.warns(GradsketchWarning, match="the audit found an error"):
        got = sketcher(given).values
    torch.testing.assert_close(got, expected(model, given), rtol=1e-9, atol=1e-12)
    assert set(sketcher.slow) - {"more.weight", "more.bias"} == BREAKS[break_it]
    again = batch(6 if audited_late else 4, seed=2)
    torch.testing.assert_close(sketcher(again).values, expected(model, again), rtol=1e-9, atol=1e-12)


def test_a_fault_that_comes_later_is_found_by_chance(model, monkeypatch):
    monkeypatch.setattr(capture, "SCHEDULE", Schedule(share=1.0))
    sketcher = sketcher_of(model)
    sketcher(batch())
    _drop_a_contribution(monkeypatch, model)
    with pytest.warns(GradsketchWarning, match="l.bias .the audit found"):
        got = sketcher(batch(seed=1)).values
    torch.testing.assert_close(got, expected(model, batch(seed=1)), rtol=1e-9, atol=1e-12)


def test_a_share_of_the_batches_is_audited(model, monkeypatch):
    monkeypatch.setattr(capture, "SCHEDULE", Schedule(share=0.3))
    sketcher = sketcher_of(model)
    for seed in range(40):
        sketcher(batch(seed=seed))
    assert sketcher.audits.batches == 40
    assert 5 < sketcher.audits.audited < 20
    assert sketcher.audits.largest_error < 1e-12


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Every backward pass puts the number of its rows into it."""
    counted: list[int] = []
    run = torch.autograd._engine_run_backward

    def counting(roots, *args, **kwargs):
        counted.append(roots[0].numel())
        return run(roots, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", counting)
    return counted


def count(passes: list[int], work) -> float:
    """Return how many times all five rows of a batch went backwards."""
    passes.clear()
    work()
    return sum(passes) / 5


def test_proofs_are_made_once_for_a_model(model, never_by_chance, passes):
    first = sketcher_of(model)
    # The captured pass, the measuring one for the head, and the proof: against autograd, of rows in other company.
    assert count(passes, lambda: first(batch())) == 3
    assert count(passes, lambda: first(batch(seed=1))) == 2
    assert count(passes, lambda: sketcher_of(model)(batch(seed=2))) == 2
    assert count(passes, lambda: gs.gradient_gram(model, losses, batch(seed=3))) == 2
    assert first.audits.audited == 1


def test_a_new_kind_of_call_is_audited_again(model, never_by_chance, passes):
    sketcher = sketcher_of(model)
    sketcher(batch())
    assert count(passes, lambda: sketcher(batch(tokens=6))) == 3
    assert sketcher.audits.audited == 2
    assert count(passes, lambda: sketcher(batch(tokens=6, seed=1))) == 2


class Along(nn.Module):
    """Runs its layer over [b, t, i], or over [t, b, i] where rows are long."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        return self.l(h) if x.shape[1] < 5 else self.l(h.transpose(0, 1)).transpose(0, 1)


def test_a_new_dim_of_examples_in_a_known_call_is_audited_again(monkeypatch, never_by_chance):
    torch.manual_seed(0)
    model = Along().double()
    sketcher = sketcher_of(model)
    sketcher(batch())
    right = InOrder.__call__
    swapped = [1, 0, 2, 3, 4]
    monkeypatch.setattr(InOrder, "__call__", lambda self, rows: right(self, rows)[swapped if self.axis else slice(5)])
    with pytest.warns(GradsketchWarning, match="the audit found an error"):
        got = sketcher(batch(6)).values
    torch.testing.assert_close(got, expected(model, batch(6)), rtol=1e-9, atol=1e-12)


class Switching:
    """Losses that couple the examples once a switch is set."""

    def __init__(self) -> None:
        self.coupled, self.batches = False, 0

    def losses(self, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        self.batches += 1  # numbers that a task counts with are no switch
        out = model(given["x"])
        if self.coupled:
            out = out - out.mean(0)
        return functional.cross_entropy(out.mT, given["y"], reduction="none").sum(1)


def test_a_task_that_is_switched_is_proved_anew(model, never_by_chance, passes):
    task = Switching()
    sketcher = gs.GradientSketcher(model, task.losses, gs.BlockSum(gs.Parameters(model), 32))
    sketcher(batch())
    assert count(passes, lambda: sketcher(batch(seed=1))) == 2
    task.coupled = True
    with pytest.raises(InputError, match="together and"):
        sketcher(batch(seed=2))


def run_on(sketcher: gs.GradientSketcher, odd: Tensor) -> None:
    for seed in range(1, 12):
        sketcher({**batch(seed=seed), "odd": odd})


@pytest.mark.parametrize("method", ["auto", "loop", "vmap"])
def test_coupling_that_begins_with_the_data_is_found_by_chance(model, monkeypatch, method):
    monkeypatch.setattr(capture, "SCHEDULE", Schedule(share=0.5))

    def losses_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        out = model(given["x"])
        mean = out.detach().mean(0)  # which the gradients alone do not show
        return functional.cross_entropy((out - mean * given["odd"].sum()).mT, given["y"], reduction="none").sum(1)

    sketcher = gs.GradientSketcher(model, losses_of, gs.BlockSum(gs.Parameters(model), 32), method=method)
    plain, odd = torch.zeros(5).double(), torch.tensor([0, 0, 1, 0, 0]).double()
    sketcher({**batch(), "odd": plain})
    with pytest.raises(InputError, match="together and"):
        run_on(sketcher, odd)


def test_random_audits_look_at_any_two_rows(model, monkeypatch):
    """The third row alone is coupled; the first and the last never show it."""
    monkeypatch.setattr(capture, "SCHEDULE", Schedule(share=1.0))

    def losses_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        each = losses(model, given)
        return each + given["odd"] * (each.detach().sum() - each.detach())

    sketcher = gs.GradientSketcher(model, losses_of, gs.BlockSum(gs.Parameters(model), 32))
    sketcher({**batch(), "odd": torch.zeros(5).double()})
    with pytest.raises(InputError, match="example 2 of the batch"):
        run_on(sketcher, torch.tensor([0, 0, 1, 0, 0]).double())


def test_the_loop_is_audited_as_well(model, never_by_chance, monkeypatch):
    sketcher = gs.GradientSketcher(model, losses, gs.BlockSum(gs.Parameters(model), 32), method="loop")
    sketcher(batch())
    sketcher(batch(seed=1))
    assert (sketcher.audits.batches, sketcher.audits.audited) == (2, 1)
    assert sketcher.audits.largest_error < 1e-12


def test_what_decides_otherwise_is_proved_anew(model, never_by_chance):
    assert sketcher_of(model)(batch()) is not None
    head = gs.GradientSketcher(model, losses, gs.BlockSum(gs.Parameters(model, "o.*"), 32))
    head(batch())
    assert head.audits.audited == 1
    other = gs.GradientSketcher(model, lambda m, b: losses(m, b) * 2, gs.BlockSum(gs.Parameters(model), 32))
    other(batch())
    assert other.audits.audited == 1


def test_a_batch_that_is_not_finite_proves_nothing(model, never_by_chance):
    sketcher = gs.GradientSketcher(
        model, lambda m, b: losses(m, b) / b["w"], gs.BlockSum(gs.Parameters(model), 32), on_non_finite="skip"
    )
    sketcher({**batch(), "w": torch.tensor([1.0, 0, 1, 1, 1], dtype=torch.float64)})
    assert sketcher.audits.audited == 0
    sketcher({**batch(), "w": torch.ones(5, dtype=torch.float64)})
    assert sketcher.audits.audited == 1


def hardest_half_is_learnt(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    each = losses(model, given)
    return torch.where(each >= each.median(), each, each.detach())


def test_a_gradient_that_depends_on_company_is_refused_though_no_loss_does(model, never_by_chance):
    """And though the two rows that run alone have the gradients that they have in company."""
    given = batch()
    hardest = losses(model, given).argsort(descending=True)
    order = torch.cat([hardest[:1], hardest[2:], hardest[1:2]])
    sketcher = gs.GradientSketcher(model, hardest_half_is_learnt, gs.BlockSum(gs.Parameters(model), 32))
    with pytest.raises(InputError, match="together and in parts of it"):
        sketcher({name: value[order] for name, value in given.items()})


def test_other_kernels_in_other_company_have_more_room(model, never_by_chance, monkeypatch):
    """Rounding that the batch's own graph does not show is no fault of the capture, nor of the loss."""
    task = gs.GradientSketcher(model, rounded_by_company, gs.BlockSum(gs.Parameters(model), 32))
    task(batch())
    assert task.audits.audited == 1
    assert not task.slow
    assert task.audits.largest_error < 1e-12  # against the batch's own graph


def rounded_by_company(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    each = losses(model, given)
    return each + (each - each.detach()) * 1e-7 * len(each)


CONTRIBUTIONS: dict[str, Contribution] = {
    "outer": Outer(torch.randn(5, 3, 40).double(), torch.randn(5, 3, 36).double()),
    "rows": IndexedRows(torch.randint(0, 40, (5, 3)), torch.randn(5, 3, 36).double()),
    "direct": Direct(torch.randn(5, 40, 36).double()),
    "sum": Sum(torch.randn(5, 3, 40, 36).double()),
    "placed": Placed(torch.randn(5, 8, 36).double()),
    "inside": Inside(Outer(torch.randn(5, 3, 4).double(), torch.randn(5, 3, 9).double()), 7, 4),
    "transposed": IndexedRows(torch.randint(0, 36, (5, 3)), torch.randn(5, 3, 40).double()).transposed(),
}


@pytest.mark.parametrize("contribution", CONTRIBUTIONS.values(), ids=CONTRIBUTIONS)
@pytest.mark.parametrize("piece", [36, 9], ids=["rows", "pieces of rows"])
def test_a_weighted_sum_along_directions_is_that_of_the_matrices(contribution, piece):
    weights, along = torch.randn(5).double(), torch.randn(piece, 3).double()
    expected = torch.einsum("b,brc->rc", weights, contribution.dense(40, 36))
    torch.testing.assert_close(contribution.weighted(weights, 40, 36), expected)
    found = contribution.weighted_along(weights, 40, 36, along)
    torch.testing.assert_close(found, expected.reshape(-1, piece) @ along)


@pytest.mark.statistical
def test_a_residual_seen_along_directions_is_found_at_what_is_allowed():
    """Of rank one, as a single row's is: the hardest to see."""
    left, right = torch.randn(2, 1, 40).double(), torch.randn(2, 1, 200).double()
    weights = torch.tensor([1.0, -2.0]).double()
    given = Outer(left, right)
    exact = given.weighted(weights, 40, 200)
    fault = 1.05e-3 * (exact.norm() + given.magnitude(weights)) / (left[0].norm() * right[0].norm())
    shown = []
    for seed in range(1000):
        audit = Audit(weights, {"w": torch.zeros(40, 200).double()}, seed)
        audit.add("w", given, slice(None))
        shown.append(audit.errors({"w": audit.seen("w", exact + fault * left[0].mT @ right[0])}, 1e-3))
    assert sum(not failed(errors, 1e-3) for errors in shown) <= 3
    assert abs(sum(errors["w"] for errors in shown) / len(shown) - 1.05e-3) < 5e-5


def test_contributions_of_another_precision_are_added_up():
    """As where a model computes a part of its pass in float32, whatever its weights are."""
    weights, given = torch.randn(5).double(), Outer(torch.randn(5, 3, 40), torch.randn(5, 3, 36))
    audit = Audit(weights, {"w": torch.zeros(40, 36).double()}, 0)
    audit.add("w", given, slice(None))
    audit.add("w", Outer(given.left.double(), given.right.double()), slice(None))
    exact = 2 * torch.einsum("b,brc->rc", weights, given.dense(40, 36).double())
    assert audit.errors({"w": audit.seen("w", exact)}, 1e-6)["w"] < 1e-6
