"""Curvature of a model that FSDP2 shares out between two ranks; run as a module with the variables torchrun sets."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

import gradsketch as gs
from launch import as_rank
from ranks import IDS, Net, as_found, losses, net, refused

BATCH = {"ids": IDS}


def rank() -> int:
    return dist.get_rank()


def sharded(make: Callable[[], nn.Module] = Net, *, root: bool = True, **options: Any) -> Any:
    model, mesh = net(make).double(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options) if root else model


def own_rows() -> DataLoader:
    """Return what this rank has: five rows in two batches, or three in one."""
    rows = [IDS[:3], IDS[3:5]] if rank() == 0 else [IDS[5:]]
    return DataLoader([{"ids": ids} for ids in rows], batch_size=None)


def vectors(n: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(came: torch.Tensor, wanted: torch.Tensor) -> float:
    came, wanted = came.detach(), wanted.detach()
    return float((came - wanted).abs().max() / wanted.abs().max())


def differentiated_twice(model: nn.Module, x: torch.Tensor, names: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient and Hessian-vector products of the mean loss over all rows, by autograd alone."""
    chosen = [p for name, p in model.named_parameters() if name.startswith(names)]
    grads = torch.autograd.grad(losses(model, BATCH).mean(), chosen, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    products = [torch.autograd.grad(flat, chosen, v, retain_graph=True) for v in x]
    return flat.detach(), torch.stack([torch.cat([g.reshape(-1) for g in product]) for product in products])


def products_are_those_of_one_process() -> None:
    for make, root, names in ((Net, True, ""), (partial(Net, checkpoints=True), True, "blocks.1."), (Net, False, "")):
        whole, model = net(make).double(), sharded(make, root=root)
        include = f"{names}*"
        before = as_found(model) if root else []
        H = gs.hessian(model, losses, own_rows(), include, check=not names)
        x = vectors(H.n)
        gradient, wanted = differentiated_twice(whole, x, names)
        assert error(H(x), wanted) < 1e-14
        assert error(H(x), wanted) < 1e-14
        assert error(gs.loss_gradient(model, losses, own_rows(), include), gradient) < 1e-14
        assert not root or as_found(model) == before
        assert names or (H.mode == "auto" and H.check.error < 1e-6)
        model(IDS)  # FSDP2 works as before, and leaves the last layers gathered
        assert error(H(x), wanted) < 1e-14


def every_kind_and_mode_is_right() -> None:
    whole, model = net().double(), sharded()
    ways: list[tuple[Any, str, str, float]] = [
        (gs.gauss_newton, "*", "auto", 1e-14),
        (gs.gauss_newton, "blocks.0.*weight", "jvp-of-grad", 1e-14),
        (gs.fisher, "blocks.0.*weight", "auto", 1e-14),
        (gs.hessian, "*", "jvp-of-grad", 1e-14),
        (gs.hessian, "*", "central-difference", 1e-6),
    ]
    for kind, include, mode, bound in ways:
        wanted = kind(whole, losses, BATCH, include, check=False)
        x = vectors(wanted.n, 1)
        assert error(kind(model, losses, own_rows(), include, mode=mode, check=False)(x), wanted(x)) < bound


def changed_weights_are_seen_by_all() -> None:
    """Products keep graphs; the row that one rank changes lies in that rank's share alone."""
    whole, model = net().double(), sharded()
    rows, calls = {"ids": IDS[:5] if rank() == 0 else IDS[5:]}, []

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return losses(model, batch)

    H = gs.hessian(model, counted, rows, check=False)
    x = vectors(H.n)
    H(x), H(x)
    assert len(calls) == 1
    with torch.no_grad():
        whole.blocks[0].up.weight[0] += 1
        if rank() == 0:
            model.blocks[0].up.weight.to_local()[0] += 1
    assert error(H(x), differentiated_twice(whole, x)[1]) < 1e-14
    if rank() == 1:
        rows["ids"] = IDS[5:].flip(1)
    flipped = torch.cat([IDS[:5], IDS[5:].flip(1)])
    assert error(H(x), gs.hessian(whole, losses, {"ids": flipped}, check=False)(x)) < 1e-14


def a_failure_on_one_rank_ends_all() -> None:
    model = sharded()

    def fails(model: nn.Module, batch: Any) -> torch.Tensor:
        each = losses(model, batch)
        if rank() == 1:
            raise ZeroDivisionError("no such word")
        return each

    def infinite(model: nn.Module, batch: Any) -> torch.Tensor:
        each = losses(model, batch)
        return each / (0.0 if rank() == 1 else 1.0)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, place: int) -> Any:
            if rank() == 1 and place == 1:
                raise OSError("the disk is gone")
            return {"ids": IDS[place : place + 1]}

    class Gone(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.words(ids)
            return self.head(self.blocks[0](h) if rank() == 0 else h)

    ways: dict[str, Callable[[], object]] = {
        "no such word": lambda: gs.hessian(model, fails, own_rows()),
        "is inf": lambda: gs.hessian(model, infinite, own_rows()),
        "the disk is gone": lambda: gs.loss_gradient(model, losses, DataLoader(Rows(), batch_size=None)),
        "went different ways": lambda: gs.hessian(sharded(Gone), losses, own_rows()),
        "other vectors on each rank": lambda: H(torch.full((H.n,), float(rank()))),
        "matches no parameter": lambda: gs.hessian(model, losses, own_rows(), "none.*" if rank() else "*"),
        "other parameters on each rank": lambda: gs.hessian(model, losses, own_rows(), f"blocks.{rank()}.*"),
        "one of auto": lambda: gs.hessian(model, losses, own_rows(), mode="fast" if rank() else "auto"),  # type: ignore[arg-type]
        "of an operator of n": lambda: gs.spectrum(H, k=1 - rank()),
        "vectors of length": lambda: H(torch.ones(H.n + rank())),
    }
    H = gs.hessian(model, losses, own_rows(), check=False)
    for words, way in ways.items():
        with pytest.raises(Exception, match=words):
            way()
    assert error(H(x := vectors(H.n)), differentiated_twice(net().double(), x)[1]) < 1e-14


def raw_rows_are_shared_out_unevenly() -> None:
    """One rank has a row alone, which has no company to be compared in."""
    rows = [{"ids": ids} for ids in (IDS[:-1] if rank() == 0 else IDS[-1:])]
    H = gs.hessian(sharded(), losses, rows)
    assert error(H(x := vectors(H.n)), differentiated_twice(net().double(), x)[1]) < 1e-14


def what_cannot_be_right_is_refused() -> None:
    def squares(model: nn.Module, batch: Any) -> torch.Tensor:
        return losses(model, batch) + sum(p.full_tensor().square().sum() for p in model.parameters())

    model = sharded()
    refused("as FSDP2 keeps it, in shards", lambda: gs.hessian(model, squares, own_rows()))
    cast = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refused("fully_shard casts", lambda: gs.hessian(cast, losses, own_rows()))
    columns = sharded(shard_placement_fn=lambda p: torch.distributed.tensor.Shard(p.ndim - 1))
    refused("shared out as", lambda: gs.hessian(columns, losses, own_rows()))
    other = sharded(root=False)
    if rank() == 1:
        other.head.weight.data += 1
    refused("other values on each rank", lambda: gs.hessian(other, losses, own_rows()))
    model.register_buffer("statistics", torch.full((2,), float(rank())))
    refused("'statistics', which has other values", lambda: gs.hessian(model, losses, own_rows()))


def spectra_are_those_of_one_process() -> None:
    whole, model = net().double(), sharded()
    rows = {"ids": IDS[:5] if rank() == 0 else IDS[5:]}
    alone, together = gs.hessian(whole, losses, BATCH, check=False), gs.hessian(model, losses, rows, check=False)
    sketch = gs.BlockSum(gs.Parameters(whole), 256)
    gradient = gs.loss_gradient(whole, losses, BATCH)
    for options in ({"method": "full"}, {"method": "sketched-basis", "sketch": sketch, "gradient": gradient}):
        given: dict[str, Any] = {"k": 2, "steps": 20, "progress": False, **options}
        wanted, found = gs.spectrum(alone, **given), gs.spectrum(together, **given)
        assert found.n == wanted.n
        assert found.steps == wanted.steps
        for one, other in zip(found.eigenvalues, wanted.eigenvalues, strict=True):
            assert abs(one.value - other.value) < 1e-9 * abs(wanted.eigenvalues[0].value) + other.error
            assert one.converged == other.converged
            assert (one.gradient_share is None) == (other.gradient_share is None)
            assert abs((one.gradient_share or 0) - (other.gradient_share or 0)) < 1e-9
        for one, other in zip(found.sketches[:1], wanted.sketches[:1], strict=True):
            assert error(one * (one @ other).sign(), other) < 1e-5
    vector, value = gs.eigenvectors(together, found, first=1, gradient=gradient)[0], found.asked[0].value
    assert error(alone(vector), value * vector) < 1e-3
    assert gs.spectrum(-together, k=1, method="sketched-basis", steps=3).n == alone.n
    given = {"k": 1, "steps": 20, "method": "sketched-basis", "sketch": sketch, "progress": False}
    with tempfile.TemporaryDirectory() as scratch:
        shared = gs.spectrum(together, scratch=scratch, **given)
    assert abs(shared.asked[0].value - wanted.asked[0].value) < shared.asked[0].error
    assert shared.disk_bytes < 0.8 * alone.n * shared.steps
    wanted_nodes, nodes = (gs.density(h, probes=1, steps=5, progress=False).nodes[0] for h in (alone, together))
    assert nodes == pytest.approx(wanted_nodes, rel=1e-9)
    assert gs.trace(together, 4).value == pytest.approx(gs.trace(alone, 4).value, rel=1e-9)
    refused("for a model that ranks share out", lambda: gs.spectrum(together, resume="run"))


def main() -> None:
    products_are_those_of_one_process()
    every_kind_and_mode_is_right()
    changed_weights_are_seen_by_all()
    a_failure_on_one_rank_ends_all()
    raw_rows_are_shared_out_unevenly()
    what_cannot_be_right_is_refused()
    spectra_are_those_of_one_process()


if __name__ == "__main__":
    as_rank(main)
