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
    calls = []

    def load(step):
        def now():
            calls.append(step)
            return rotated(spectra()["two-sided"], seed=step), torch.ones(400, dtype=torch.float64)

        return now

    first = gs.spectrum_over(((s, load(s)) for s in (0, 10)), 3, directory=tmp_path)
    again = gs.spectrum_over({s: load(s) for s in (20, 0, 10)}, 3, directory=tmp_path)
    assert calls == [0, 10, 20]
    assert again.steps == (0, 10, 20)
    assert again.spectra[:2] == first.spectra
    assert again.spectra[0].gradient_in_outliers is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000000{s}.json" for s in ("00", "10", "20")]
    assert gs.saved_spectra(tmp_path).steps == (0, 10, 20)


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
