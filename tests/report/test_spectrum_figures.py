"""Figures of spectra can be drawn from awkward results too."""

import pytest
import torch

import gradsketch as gs

pytest.importorskip("matplotlib")


class Diagonal(gs.LinearMap):
    is_self_adjoint = True

    def __init__(self, values):
        self.values, self.shape = values, (len(values), len(values))

    def _apply(self, x):
        return x * self.values

    _apply_adjoint = _apply


CASES = {
    "both signs": torch.cat([torch.tensor([9.0, 5, 2, -4, -1]), torch.rand(200) - 0.5]),
    "positive": torch.cat([torch.tensor([9.0, 5, 2]), torch.rand(200)]),
    "zero": torch.zeros(50),
    "one": torch.ones(50),
}


@pytest.mark.parametrize("name", CASES)
def test_every_figure(name, tmp_path):
    operator = Diagonal(CASES[name])
    gs.spectrum(operator, 3, steps=6).plot(tmp_path / "new" / "spectrum.png")
    gs.density(operator, probes=1, steps=5).plot(tmp_path / "density.png")
    gs.spectrum_over({0: operator, 10: operator}, 3).plot(tmp_path / "evolution.png")
    for path in ("new/spectrum.png", "density.png", "evolution.png"):
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")
