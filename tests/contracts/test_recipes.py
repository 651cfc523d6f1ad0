"""Every kind of sketch is made again from its recipe, wherever one is kept; and a kind from outside is one of them."""

import json

import pytest
import torch

import gradsketch as gs
from contracts.sketch_cases import CASES
from gradsketch.dimension.rotated import prefix_nested
from gradsketch.sketches import recipe
from gradsketch.sketches.recipe import made_from, recipe_of, register


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that toy kinds are forgotten after the test."""
    monkeypatch.setattr(recipe, "_KINDS", dict(recipe._KINDS))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Linear(8, 1, bias=False))


def saved_and_opened(sketch, folder):
    net = model()
    with gs.Subspace(net, gs.Parameters(net), sketch) as subspace:
        torch.nn.init.normal_(subspace.w)
        subspace.save_pretrained(folder)
        expected = subspace(torch.ones(1, 7))
    with gs.Subspace.from_pretrained(model(), folder) as again:
        assert torch.equal(again(torch.ones(1, 7)), expected)
        assert again.sketch.fingerprint == sketch.fingerprint


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_subspace_of_every_kind_is_saved_and_opened(case, tmp_path):
    saved_and_opened(case.build(72, 16, seed=3), tmp_path)


@pytest.mark.parametrize("sketch", [gs.SJLT(72, 16), gs.QK(72, 16)], ids=repr)
def test_a_subspace_in_another_basis_is_saved_and_opened(sketch, tmp_path):
    saved_and_opened(prefix_nested(sketch), tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recipes_are_plain_and_decide_the_map(case):
    written = recipe_of(case.build(64, 16, seed=3))
    assert json.loads(json.dumps(written)) == written
    assert recipe_of(made_from(written)) == written


def test_the_battery_has_every_kind():
    assert {case.kind for case in CASES} == {name for name in recipe._KINDS if not name.startswith("_")}


def toy_kind():
    class Sparse(gs.SJLT):
        """What a user may write."""

    return Sparse


def test_a_kind_from_outside_is_like_any_other(registry, tmp_path):
    kind = register(toy_kind())
    phi = gs.BlockSum({"a": (10, 20), "b": (5,)}, 8, kind="sparse")
    assert isinstance(phi.blocks["a"].phi, kind)
    assert torch.equal(made_from(recipe_of(phi))(torch.ones(205)), phi(torch.ones(205)))
    saved_and_opened(kind(72, 16), tmp_path)
    assert gs.BlockSum({"a": (4,)}, 2).options()["kind"] == "auto"


def test_a_class_defined_anew_takes_its_own_place_and_no_other(registry):
    register(toy_kind())
    newer = register(toy_kind())
    assert recipe.vector_kind("Sparse") is newer
    with pytest.raises(gs.InputError, match="Rename the class"):
        register(type("Dense", (gs.Dense,), {}))


def test_what_cannot_be_made_is_explained(monkeypatch):
    written = recipe_of(gs.Dense(20, 4))
    with pytest.raises(gs.InputError, match=r"a sketch of kind Sparse.*pass the sketch itself"):
        made_from(written | {"kind": "Sparse"})
    with pytest.raises(gs.InputError, match="kind, version and arguments"):
        made_from({"kind": "Dense"})
    with pytest.raises(gs.FingerprintError, match="a Dense of version 0"):
        made_from(written | {"version": 0})
    with pytest.raises(gs.InputError, match="one of AFFD, AFJL, Dense, FFD, FJL, QK, SJLT"):
        recipe.vector_kind("TiledSRHT")
