"""Spectra over checkpoints: files, resumption, overlaps, and the Trainer's callback."""

import json

import numpy as np
import pytest
import torch
from matrices import Matrix, rotated, spectra

import gradsketch as gs


def turned(angle):
    """Return a map whose three leading eigenvectors turn out of their span by an angle."""
    basis = torch.eye(300)
    basis[0], basis[3] = (
        np.cos(angle) * torch.eye(300)[0] + np.sin(angle) * torch.eye(300)[3],
        np.cos(angle) * torch.eye(300)[3] - np.sin(angle) * torch.eye(300)[0],
    )
    eigenvalues = torch.cat([torch.tensor([9.0, 8.0, 7.0, -4.0]), torch.rand(296) / 10])
    return Matrix((basis.T * eigenvalues) @ basis)


def test_overlaps_are_squared_cosines():
    points = {step: turned(angle) for step, angle in [(0, 0.0), (10, 0.5), (20, np.pi / 2)]}
    evolution = gs.spectrum_over(points, 3)
    cosines = (2 + np.cos([0, 0.5, np.pi / 2]) ** 2) / 3
    np.testing.assert_allclose(evolution.overlaps(3)[0], cosines, atol=1e-4)
    np.testing.assert_allclose(evolution.r_neg, 4 / 9, atol=1e-4)
    assert evolution.outliers == (3, 3, 3)
    assert "R_NEG" in str(evolution)


def test_overlaps_from_sketches():
    n = 20_000
    values = torch.rand(n) / 10
    values[:4] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    maps = [Diagonal(values), Diagonal(values.roll(2))]
    evolution = gs.spectrum_over(dict(enumerate(maps)), 4, memory=0)
    assert evolution.spectra[0].d == 4096
    expected = [[1, 0.5], [0.5, 1]]
    np.testing.assert_allclose(evolution.overlaps(4), expected, atol=0.03)


class Diagonal(gs.LinearMap):
    is_self_adjoint = True

    def __init__(self, values):
        self.values, self.shape = values, (len(values), len(values))

    def _apply(self, x):
        return x * self.values

    _apply_adjoint = _apply


def test_finished_checkpoints_are_not_computed_again(tmp_path):
    loaded = []

    def load(step):
        def now():
            loaded.append(rotated(spectra()["two-sided"], seed=step))
            return loaded[-1], torch.ones(400, dtype=torch.float64)

        return now

    first = gs.spectrum_over(((s, load(s)) for s in (0, 10)), 3, directory=tmp_path)
    loaded.clear()
    again = gs.spectrum_over({s: load(s) for s in (20, 0, 10)}, 3, directory=tmp_path)
    new, *old = (operator.products for operator in loaded)
    assert new > 10
    assert old == [1, 1]  # one product each shows that the file is of this operator
    assert again.steps == (0, 10, 20)
    assert again.spectra[:2] == first.spectra
    assert again.spectra[0].gradient_in_outliers is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000000{s}.json" for s in ("00", "10", "20")]
    assert gs.saved_spectra(tmp_path).steps == (0, 10, 20)


def at(step):
    torch.manual_seed(step)
    return torch.nn.Linear(20, 2)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"model": 1}, "model is now"),
        ({"data": [(torch.ones(20), 1)] * 8}, "data is now"),
        ({"curvature": gs.fisher}, "curvature is now"),
        ({"include": "weight"}, "parameters is now"),
        ({"k": 3}, "k is now 3"),
        ({"seed": 1}, "seed is now 1"),
        ({"tolerance": 1e-2}, "tolerance is now"),
        ({"which": "both"}, "which is now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("new_step", [False, True], ids=["the same step", "another step"])
def test_a_directory_of_other_work_is_refused(change, differs, new_step, tmp_path):
    torch.manual_seed(5)
    data = [(torch.randn(20), i % 2) for i in range(8)]

    def over(step, *, model=0, data=data, curvature=gs.hessian, include="*", k=2, **options):
        net = at(model)
        operator = curvature(net, gs.Classification(), data, gs.Parameters(net, include))
        return gs.spectrum_over({step: operator}, k, directory=tmp_path, progress=False, **options)

    over(0)
    assert over(0) == over(0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if new_step and "model" in change:  # which is what a new step is for
        assert over(1, **change).steps == (1,)
        return
    with pytest.raises(gs.FingerprintError, match=f"{differs}.*delete .* to start again"):
        over(int(new_step), **change)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_directory_of_another_map_is_refused(tmp_path):
    gs.spectrum_over({0: turned(0.0)}, 3, directory=tmp_path)
    with pytest.raises(gs.FingerprintError, match="the first product is now"):
        gs.spectrum_over({0: Matrix(2 * turned(0.0).matrix)}, 3, directory=tmp_path)


def test_a_damaged_spectrum_is_told(tmp_path):
    gs.spectrum_over({0: turned(0.0)}, 3, directory=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"converged": true', '"converged": false', 1))
    for read in (lambda: gs.saved_spectra(tmp_path), lambda: gs.spectrum_over({0: turned(0.0)}, 3, directory=tmp_path)):
        with pytest.raises(gs.StoreError, match=r"step-00000000\.json is damaged.*delete it to start again"):
            read()


def test_a_killed_checkpoint_is_taken_up(tmp_path):
    class Mortal(Diagonal):
        left = 20

        def _apply(self, x):
            Mortal.left -= 1
            if Mortal.left < 0:
                raise KeyboardInterrupt
            return super()._apply(x)

        _apply_adjoint = _apply

    values = torch.cat([torch.linspace(26, 14, 40), torch.zeros(500)])
    with pytest.raises(KeyboardInterrupt):
        gs.spectrum_over({7: Mortal(values)}, 5, directory=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007.run"]
    Mortal.left = 1000
    resumed = gs.spectrum_over({7: Mortal(values)}, 5, directory=tmp_path)
    assert 1000 - Mortal.left == resumed.spectra[0].hvps - 20


def test_json_round_trip(tmp_path):
    evolution = gs.spectrum_over({0: turned(0.0), 5: turned(0.1)}, 3)
    again = gs.Evolution.from_json(evolution.to_json(tmp_path / "e.json"))
    assert again == evolution
    np.testing.assert_array_equal(again.overlaps(3), evolution.overlaps(3))
    assert json.loads((tmp_path / "e.json").read_text())["steps"] == [0, 5]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(gs.FingerprintError, match="different sketches"):
        gs.spectrum_over({0: turned(0.0), 1: rotated(spectra()["two-sided"].float())}, 3)
    with pytest.raises(gs.InputError, match="no checkpoints"):
        gs.spectrum_over({}, 3)
    with pytest.raises(gs.InputError, match="no step-"):
        gs.saved_spectra(tmp_path)
