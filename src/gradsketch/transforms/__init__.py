"""Orthonormal maps R^n to R^n."""

from gradsketch.transforms.fourier import Fourier
from gradsketch.transforms.haar import Haar
from gradsketch.transforms.hadamard import Hadamard, LocalHadamard

__all__ = ["Fourier", "Haar", "Hadamard", "LocalHadamard"]
