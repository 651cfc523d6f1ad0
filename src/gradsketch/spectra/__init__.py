"""Eigenvalues of Hessians: the outer ones by three Lanczos routes, with errors, costs and sketched eigenvectors."""

from gradsketch.spectra.eigenvectors import eigenvectors
from gradsketch.spectra.results import Eigenvalue, Estimate, Spectrum
from gradsketch.spectra.solve import spectrum

__all__ = ["Eigenvalue", "Estimate", "Spectrum", "eigenvectors", "spectrum"]
