"""Eigenvalues of Hessians: the outer ones by three Lanczos routes, with errors, costs and sketched eigenvectors.

The package is ``spectra`` because a submodule named like the function ``spectrum`` would shadow it.
"""

from gradsketch.spectra.density import Density, density
from gradsketch.spectra.eigenvectors import eigenvectors
from gradsketch.spectra.estimators import Diagonal, diagonal, squared_norm, trace
from gradsketch.spectra.evolution import Evolution, saved_spectra, spectrum_over
from gradsketch.spectra.recommend import Recommendation, recommend_d
from gradsketch.spectra.results import Eigenvalue, Estimate, Spectrum
from gradsketch.spectra.solve import spectrum

__all__ = [
    "Density",
    "Diagonal",
    "Eigenvalue",
    "Estimate",
    "Evolution",
    "Recommendation",
    "Spectrum",
    "density",
    "diagonal",
    "eigenvectors",
    "recommend_d",
    "saved_spectra",
    "spectrum",
    "spectrum_over",
    "squared_norm",
    "trace",
]
