"""Variances of ⟨Phi x, Phi y⟩ in closed form (x = y gives those of ‖Phi x‖²), for d dividing n, both powers of two.

x and y are unit vectors. Letters: P_h = mass of x in contiguous block h of length d, p_l = mass of the residue class l
mod d; Q, q for y; R, r for the product x·y; q4 = Σ x² y². The Gaussian AFFD, AFJL and Dense are those of the design
notes; the others follow by the same second moments of signs, places and Haar projections.
"""

from __future__ import annotations

import torch
from scipy.linalg import hadamard
from torch import Tensor


def dense_gaussian(x: Tensor, y: Tensor, d: int) -> float:
    return (1 + _rho(x, y) ** 2) / d


def dense_rademacher(x: Tensor, y: Tensor, d: int) -> float:
    return (1 + _rho(x, y) ** 2 - 2 * _q4(x, y)) / d


sjlt = dense_rademacher


def affd_gaussian(x: Tensor, y: Tensor, d: int) -> float:
    """Inner transform over blocks no shorter than d."""
    P, Q, R = (v.view(-1, d).sum(-1) for v in (x * x, y * y, x * y))
    return (1 + _rho(x, y) ** 2 + float(P @ Q) + 3 * float(R @ R) - 4 * _q4(x, y)) / d


def affd_signs(x: Tensor, y: Tensor, d: int) -> float:
    """The Gaussian one less twice E Σ z² w², where z and w are the images of x and y before G."""
    return affd_gaussian(x, y, d) - 2 * _fourth_moment(x, y, min(4096, len(x)))


def afjl_signs(x: Tensor, y: Tensor, d: int) -> float:
    p, q, r = (v.view(-1, d).sum(0) for v in (x * x, y * y, x * y))
    return float(p @ q) + float(r @ r) - 2 * _q4(x, y)


def afjl_gaussian(x: Tensor, y: Tensor, d: int) -> float:
    return afjl_signs(x, y, d) + 2 / d * (1 + 2 * _rho(x, y) ** 2 - 2 * _q4(x, y))


def fjl(x: Tensor, y: Tensor, d: int, nonzeros: int = 128) -> float:
    rho = _rho(x, y)
    return (1 + rho**2 + (2 + 4 * rho**2 - 6 * _q4(x, y)) / nonzeros) / d


def ffd(x: Tensor, y: Tensor, d: int) -> float:
    P, Q, R = (v.view(-1, d).sum(-1) for v in (x * x, y * y, x * y))
    h = torch.from_numpy(hadamard(d)).double() / d**0.5
    image = (x.view(-1, d) @ h) * (y.view(-1, d) @ h)
    return 2 * float(image.square().sum()) + (1 + _rho(x, y) ** 2 - float(P @ Q) - float(R @ R)) / d


def qk(x: Tensor, sizes: tuple[tuple[int, int], tuple[int, int]]) -> float:
    """Var ‖Phi x‖² for two factors, from the second moments of P = (B/d) QᵀQ with Haar-random Q."""
    (d1, b1), (_, b2) = sizes
    X = x.view(b1, b2)
    second = float((X @ X.T).square().sum())  # tr (XXᵀ)²; tr XXᵀ = 1
    c1, c2 = ((1 + 2 / d) / (1 + 2 / b) for d, b in sizes)
    # E (tr PA)² = a (tr A)² + b tr A² and E tr PAPA = e (tr A)² + f tr A², by A = I and A = eeᵀ.
    b_1, b_2 = (c1 - 1) / (1 - 1 / b1), (c2 - 1) / (1 - 1 / b2)
    f_1 = b1 * (c1 - 1 / d1) / (b1 - 1)
    a_1, a_2, e_1 = 1 - b_1 / b1, 1 - b_2 / b2, c1 - f_1
    return a_2 * (a_1 + b_1 * second) + b_2 * (e_1 + f_1 * second) - 1


def _rho(x: Tensor, y: Tensor) -> float:
    return float(x @ y)


def _q4(x: Tensor, y: Tensor) -> float:
    return float((x * y).square().sum())


def _fourth_moment(x: Tensor, y: Tensor, length: int) -> float:
    """E Σ z² w² for z, w the signed Hadamard transforms of x, y over blocks of that length."""
    P, Q, R = (v.view(-1, length).sum(-1) for v in (x * x, y * y, x * y))
    return (float(P @ Q) + 2 * float(R @ R) - 2 * _q4(x, y)) / length
