"""What a user has made the default device and dtype decides nothing here."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsketch as gs
from gradsketch.transforms.hadamard import hadamard_matrix


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "device": lambda: torch.device("meta"),  # stands for any other device; nothing on it has numbers
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}


def setting() -> tuple[nn.Module, dict[str, Tensor], list[tuple[Tensor, int]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    batch = {"x": torch.randn(8, 4), "y": torch.arange(8) % 3}
    return model, batch, [(x, int(y)) for x, y in zip(batch["x"], batch["y"], strict=True)]


def sketched(method, kind):
    def work(model, batch, data, folder):
        parameters = gs.Parameters(model)
        sketch = kind(parameters) if kind is not gs.BlockSum else kind(parameters, 32)
        return gs.sketch_gradients(model, losses, batch, sketch, parameters=parameters, method=method)

    return work


def of_curvature(build, ask):
    return lambda model, batch, data, folder: ask(build(model, losses, batch))


def whitened(model, batch, data, folder):
    parameters, task = gs.Parameters(model), gs.Classification()
    factors = gs.kfac(model, task, data)
    return gs.sketch_gradients(model, losses, batch, gs.BlockSum(parameters, 32), precondition=factors)


def queried(model, batch, data, folder):
    index = gs.build_index(folder, model, gs.Classification(), data, d=32, progress=False)
    return torch.tensor([hit.score for hit in index.query(model, data[:1], k=5)[0]], dtype=torch.float64, device="cpu")


def in_subspace(model, batch, data, folder):
    parameters = gs.Parameters(model)
    subspace = gs.Subspace(model, parameters, gs.AFFD(parameters.n, 8))
    losses(subspace, batch).sum().backward()
    return subspace.w.grad


def number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


WORK = {
    "captured": sketched("auto", gs.BlockSum),
    "loop": sketched("loop", gs.BlockSum),
    "affd": sketched("auto", lambda parameters: gs.AFFD(parameters.n, 32)),
    "qk": sketched("auto", lambda parameters: gs.QK(parameters.n, 32)),
    "dense": sketched("auto", lambda parameters: gs.Dense(parameters.n, 32)),
    "hessian": of_curvature(gs.hessian, lambda H: H(torch.ones(H.n, dtype=torch.float32, device="cpu"))),
    "fisher": of_curvature(gs.fisher, lambda H: H(torch.ones(H.n, dtype=torch.float32, device="cpu"))),
    "spectrum": of_curvature(gs.hessian, lambda H: number(gs.spectrum(H, k=3).values[0])),
    "trace": of_curvature(gs.hessian, lambda H: number(gs.trace(H).value)),
    "kfac": whitened,
    "index": queried,
    "subspace": in_subspace,
}


# torch itself collates labels on the default device, from where they could not come back.
CASES = [
    pytest.param(DEFAULTS[default], WORK[work], id=f"{work}-{default}")
    for default in DEFAULTS
    for work in WORK
    if default != "device" or work not in ("kfac", "index")
]


@pytest.mark.parametrize(("default", "work"), CASES)
def test_no_default_decides(default, work, tmp_path) -> None:
    wanted = work(*setting(), tmp_path / "plain")
    hadamard_matrix.cache_clear()  # a table that is made where a default stands outlives it
    given = setting()
    with default():
        came = work(*given, tmp_path / "other")
    assert came.device.type == "cpu"
    torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(work(*setting(), tmp_path / "again"), wanted)
