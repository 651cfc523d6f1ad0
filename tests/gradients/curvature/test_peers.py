"""Agreement with SciPy's eigsh and with other curvature libraries, where installed, on a model all get right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES, Case
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from gradsketch import fisher, gauss_newton, hessian

KINDS = {"hessian": hessian, "gauss_newton": gauss_newton, "fisher": fisher}


@pytest.fixture
def case() -> Case:
    return CASES["mlp"]()


def loader(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Two batches of equal length: one of the peers gives every batch the same weight."""
    x, y = case.batch
    return [(x[:4], y[:4]), (x[4:], y[4:])]


@pytest.mark.parametrize("name", KINDS)
def test_scipy_finds_the_dense_eigenvalues_through_the_operator(case, name):
    operator = KINDS[name](case.model, case.losses, case.examples, batch_size=3)
    dense = np.linalg.eigvalsh(operator.dense().numpy())
    top = eigsh(operator.to_scipy(torch.float64), k=6, which="LA", return_eigenvectors=False, v0=np.ones(operator.n))
    np.testing.assert_allclose(np.sort(top), dense[-6:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_curvlinops_agrees(case, name):
    curvlinops = pytest.importorskip("curvlinops")
    build = {
        "hessian": curvlinops.HessianLinearOperator,
        "gauss_newton": curvlinops.GGNLinearOperator,
        "fisher": curvlinops.EFLinearOperator,
    }[name]
    # Their 3.0 takes parameters by list, later versions by name.
    peer = build(case.model, nn.CrossEntropyLoss(), list(case.model.parameters()), loader(case))
    ours = KINDS[name](case.model, case.losses, case.examples, batch_size=4)
    v = torch.randn(ours.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(v), (peer @ v).detach(), rtol=1e-10, atol=1e-12)


def test_hessian_eigenthings_agrees(case):
    peers = pytest.importorskip("hessian_eigenthings")
    peer = peers.HessianOperator(case.model, loader(case), peers.supervised_loss(nn.CrossEntropyLoss()))
    ours = hessian(case.model, case.losses, case.examples, batch_size=4)
    v = torch.randn(ours.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(v), peer.matvec(v), rtol=1e-10, atol=1e-12)
    top = peers.lanczos(peer, k=3, max_iter=60, reorthogonalize=True, which="LA", seed=0).eigenvalues
    dense = torch.linalg.eigvalsh(ours.dense())
    torch.testing.assert_close(torch.as_tensor(top).double().sort().values, dense[-3:], rtol=1e-6, atol=1e-8)
