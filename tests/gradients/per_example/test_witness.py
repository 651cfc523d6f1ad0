"""Rows are held against the map of autograd's own gradients: what is lost on the way to a row does not go unseen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsketch as gs
from gradsketch.errors import InputError
from gradsketch.gradients.per_example import capture
from gradsketch.gradients.per_example.capture import Schedule
from gradsketch.gradients.per_example.contributions import IndexedRows, Outer
from gradsketch.gradients.per_example.directions import Directions
from gradsketch.gradients.per_example.sketcher import _Formed, _Sketches


class Net(nn.Module):
    """A layer of each form that contributions have: rows of a table, outer products, vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.last = nn.Embedding(50, 24), nn.LayerNorm(24), nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.embed(x)))


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]).mT, batch["y"], reduction="none").sum(1)


def drawn(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randint(50, (rows, 5), generator=generator),
        "y": torch.randint(20, (rows, 5), generator=generator),
    }


@pytest.fixture(autouse=True)
def _never_by_chance(monkeypatch):
    monkeypatch.setattr(capture, "SCHEDULE", Schedule(share=0.0))


def sketched(model: nn.Module, d: int = 64) -> Tensor:
    return gs.sketch_gradients(model, losses, drawn(), gs.BlockSum(gs.Parameters(model), d))


def preconditioned(model: nn.Module, d: int = 64) -> Tensor:
    factors = gs.kfac(model, losses, drawn(32), labels="empirical")
    return gs.sketch_gradients(model, losses, drawn(), gs.BlockSum(gs.Parameters(model), d), precondition=factors)


def formed(model: nn.Module, d: int = 64) -> Tensor:
    parameters = gs.Parameters(model)
    return gs.sketch_gradients(model, losses, drawn(), gs.AFFD(parameters.n, d), parameters=parameters)


def along(model: nn.Module, d: int = 64) -> Tensor:
    parameters = gs.Parameters(model)
    vectors = torch.randn(d, parameters.n, generator=torch.Generator().manual_seed(2))
    return gs.GradientSketcher(model, losses, Directions(parameters.shapes, vectors))(drawn()).values


def lost_part(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outer, "sketch", lambda self, phi, name, out: None)


def other_rows(patch: pytest.MonkeyPatch) -> None:
    right = IndexedRows.sketch
    patch.setattr(
        IndexedRows,
        "sketch",
        lambda self, phi, name, out: right(IndexedRows(self.index ^ 1, self.right), phi, name, out),
    )


def lost_vectors(patch: pytest.MonkeyPatch) -> None:
    for map_of in (gs.BlockSum, Directions):
        patch.setattr(map_of, "add_vectors", lambda self, out, gradients: None)


def swapped(patch: pytest.MonkeyPatch) -> None:
    right = _Sketches.result
    patch.setattr(_Sketches, "result", lambda self: right(self).roll(1, 0))


def misplaced(patch: pytest.MonkeyPatch) -> None:
    right = _Formed.result
    patch.setattr(_Formed, "result", lambda self: right(self).roll(1, 1))


MAPS: dict[str, Callable[..., Tensor]] = {"sketched": sketched, "preconditioned": preconditioned, "along": along}
FAULTS = {"lost part": lost_part, "other rows": other_rows, "lost vectors": lost_vectors, "swapped": swapped}


@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_is_lost_on_the_way_to_a_row_is_seen(make, fault, monkeypatch) -> None:
    fault(monkeypatch)
    with pytest.raises(InputError, match=r"rows that differ by .* from the sketch of autograd's own gradients"):
        make(Net())


def test_formed_gradients_are_held_too(monkeypatch) -> None:
    misplaced(monkeypatch)
    with pytest.raises(InputError, match="rows that differ"):
        formed(Net())


@pytest.mark.parametrize("make", [sketched, formed, along])
def test_another_kind_of_map_is_held_at_its_first_use_though_the_model_is_known(make, monkeypatch) -> None:
    model = Net()
    make(model)
    (misplaced if make is formed else swapped)(monkeypatch)
    first = {sketched: along, formed: sketched, along: sketched}[make]
    if make is formed:
        swapped(monkeypatch)
    with pytest.raises(InputError, match="rows that differ"):
        first(model)


def test_another_number_of_numbers_is_another_kind(monkeypatch) -> None:
    model = Net()
    sketched(model)
    swapped(monkeypatch)
    sketched(model)  # the same code on the same shapes: by chance only, which is off here
    with pytest.raises(InputError, match="rows that differ"):
        sketched(model, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [None, gs.kfac], ids=["plain", "preconditioned"])
def test_cancelling_terms_are_rounding_and_no_fault(dtype: torch.dtype, make) -> None:
    """Each example's terms cancel but for rounding and a millionth: its row is made of little else."""

    def difference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        each = functional.cross_entropy(model(batch["x"]).mT.double(), batch["y"], reduction="none")
        return (each[:, 0] - (1 + 1e-6) * each[:, 1]) * 1e3

    batch = {name: value[:, :1].expand(-1, 2) for name, value in drawn().items()}
    model = Net().to(dtype)
    factors = None if make is None else make(model, losses, drawn(32), labels="empirical")
    rows = gs.sketch_gradients(model, difference, batch, gs.BlockSum(gs.Parameters(model), 64), precondition=factors)
    assert torch.isfinite(rows).all()
