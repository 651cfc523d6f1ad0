"""The top ten eigenvalues of H1 by each route and by other libraries, and what the sketch of a Krylov vector costs.

    python benchmarks/spectrum.py               # about 5 minutes on 2 cores; --quick: about 1
    python benchmarks/spectrum.py --counts      # about 2 minutes: products until all ten settle and none is missing
    python benchmarks/spectrum.py --sketch      # about 2 minutes: the sketch beside a product at three n

H1 is GPT2Config(n_layer=4, n_head=4, n_embd=128, vocab_size=2048, n_positions=64) with random weights (seed 0), one
batch of 16 x 64 tokens, eager attention, float32. Residuals are computed afresh for every library with one and the
same exact product, |H y - l y| / |l|. Libraries that are not installed are listed as absent. The sketch is timed at
n = 1.06, 10 and 134.5 million, the last being SmolLM2-135M (where its package is installed), on 4 x 16 and 8 x 64
tokens. Writes benchmarks/results/spectrum.json,
spectrum_counts.json and spectrum_sketch.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import interleaved_seconds, write
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import gradsketch as gs
from gradsketch.space import dot
from gradsketch.spectra.lanczos import start_vector

K = 10
Batch = dict[str, torch.Tensor]


def gpt2(width: int = 128) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=width, vocab_size=2048, n_positions=64, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 2048, (16, 64))}


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)


class Logits(nn.Module):
    """Logits of every predicted token, one a row: what libraries with a fixed form of loss take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)


class Counted(LinearOperator):
    """Any symmetric product as SciPy's operator, with its products counted."""

    def __init__(self, n: int, product: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(np.float32, (n, n))
        self.product, self.products = product, 0

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.products += 1
        return self.product(torch.from_numpy(x.reshape(-1).astype(np.float32))).numpy()


def checked(
    operator: gs.LinearMap, values: np.ndarray, vectors: torch.Tensor, hvps: int, held: int, seconds: float
) -> dict[str, Any]:
    """The record of one run, with |H y - l y| / |l| computed here, one vector at a time."""
    residuals = []
    for y, value in zip(vectors, values, strict=True):
        y = y / y.norm()
        residuals.append(float(operator(y).sub_(y, alpha=float(value)).norm()) / abs(float(value)))
    return {
        "hvps": hvps,
        "vectors_held": held,
        "seconds": seconds,
        "residual_median": float(np.median(residuals)),
        "residual_max": max(residuals),
        "values": sorted((float(v) for v in values), key=lambda v: -abs(v)),
    }


def routes(operator: gs.LinearMap, quick: bool) -> dict[str, Any]:
    """The route that keeps sketches, looked at on its way, and the one that keeps vectors, to all ten at 1e-3."""
    rows: dict[str, Any] = {"history": []}
    with tempfile.TemporaryDirectory() as folder:

        def run(steps: int, tolerance: float) -> gs.Spectrum:
            return gs.spectrum(
                operator, K, method="sketched-basis", steps=steps, tolerance=tolerance, progress=False,
                resume=Path(folder) / "run",
            )  # fmt: skip

        for steps in (30, 35, 40, 45, 50, 55, 59):
            s = run(steps, 1e-12)
            rows["history"].append(
                {"hvps": s.hvps, "median": float(np.median(s.residuals)), "max": float(s.residuals.max())}
            )
        rows["sketched-basis, 60 products"] = record(operator, s)
        if not quick:
            rows["sketched-basis, all ten to 1e-3"] = record(operator, run(200, 1e-3))
            full = gs.spectrum(operator, K, method="full", steps=200, tolerance=1e-3, progress=False)
            rows["full, all ten to 1e-3"] = record(operator, full)
    return rows


def counts(operator: gs.LinearMap, gradient: torch.Tensor) -> list[dict[str, Any]]:
    """Products of each route until all ten have settled to 1e-3, and until no copy of one is missing any more."""
    vector, rows = 4 * operator.n, []
    runs: tuple[dict[str, Any], ...] = (
        {"gradient": gradient},
        {},
        {"gradient": gradient, "memory": 40 * vector},
        {"gradient": gradient, "method": "sketched-basis", "steps": 200},
    )
    for options in runs:
        s = gs.spectrum(operator, K, progress=False, **options)
        rows.append(
            {
                "begins_with_gradient": "gradient" in options,
                "method": s.method,
                "room": s.room,
                "vectors_held": s.vectors_held,
                "settled_after": s.settled_after,
                "hvps": s.hvps,
                "confidence": s.confidence,
                "copies_dropped": s.copies,
                "values": s.values.tolist(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def record(operator: gs.LinearMap, s: gs.Spectrum) -> dict[str, Any]:
    row = checked(operator, s.values, gs.eigenvectors(operator, s), s.hvps, s.vectors_held, s.seconds)
    row |= {"reported_residual_median": float(np.median(s.residuals)), "copies_dropped": s.copies}
    print(row, flush=True)
    return row


def scipy_eigsh(operator: gs.LinearMap, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """SciPy's eigsh on our product, in float32, with its default basis."""
    return _eigsh(operator, Counted(operator.n, operator))


def curvlinops(operator: gs.LinearMap, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The Hessian of curvlinops under the same eigsh."""
    from curvlinops import HessianLinearOperator

    data, size = [(batch, batch["input_ids"][:, 1:].flatten())], len(batch["input_ids"])
    peer = HessianLinearOperator(
        Logits(model), nn.CrossEntropyLoss(), list(model.parameters()), data, batch_size_fn=lambda _: size
    )
    return _eigsh(operator, Counted(operator.n, lambda x: (peer @ x).detach()))


def _eigsh(operator: gs.LinearMap, counted: Counted) -> dict[str, Any]:
    start = time.perf_counter()
    values, vectors = eigsh(counted, k=K, which="LM", tol=1e-3)
    seconds = time.perf_counter() - start
    return checked(operator, values, torch.from_numpy(vectors.T.copy()), counted.products, 2 * K + 1, seconds)


def hessian_eigenthings(operator: gs.LinearMap, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """60 steps of its Lanczos with full re-orthogonalisation, on its own Hessian."""
    from hessian_eigenthings import HessianOperator, lanczos

    peer = HessianOperator(model, [batch], lambda model, batch: losses(model, batch).mean())
    start = time.perf_counter()
    found = lanczos(peer, k=K, max_iter=60, which="LM", reorthogonalize=True, seed=0)
    seconds = time.perf_counter() - start
    values, vectors = found.eigenvalues.numpy(), found.eigenvectors
    return checked(operator, values, vectors, found.iterations, found.iterations + K, seconds)


def pyhessian(operator: gs.LinearMap, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Its power iteration with deflation, at its own defaults (100 iterations each, tolerance 1e-3)."""
    import pyhessian

    module, count = sys.modules["pyhessian.hessian"], [0]
    product = module.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return product(*arguments)

    module.hessian_vector_product = counted
    try:
        torch.manual_seed(0)
        data = (Movable(batch), batch["input_ids"][:, 1:].flatten())
        peer = pyhessian.hessian(Logits(model), nn.CrossEntropyLoss(), data=data, cuda=False)
        start = time.perf_counter()
        values, vectors = peer.eigenvalues(top_n=K)
        seconds = time.perf_counter() - start
    finally:
        module.hessian_vector_product = product
        model.zero_grad(set_to_none=True)
    flat = torch.stack([torch.cat([p.detach().reshape(-1) for p in vector]) for vector in vectors])
    return checked(operator, np.array(values), flat, count[0], K + 3, seconds)


class Movable(dict):  # type: ignore[type-arg]
    """A batch with the method ``to`` that PyHessian calls."""

    def to(self, _: Any) -> Movable:
        return self


PEERS = (scipy_eigsh, curvlinops, hessian_eigenthings, pyhessian)


def sketch_beside_product(model: nn.Module, batch: Batch, rounds: int) -> dict[str, Any]:
    """Seconds of a product on one batch, of a Krylov vector's sketch, and of a step's other parts."""
    operator = gs.hessian(model, losses, batch)
    x = start_vector(operator.space, 0, "start", torch.float32, "cpu")
    y, phi = x.clone(), gs.AFFD(operator.n, 4096)
    jobs = {
        "product": lambda: operator(x),
        "sketch": lambda: phi(x),
        "dot": lambda: dot(x, y),
        "axpy": lambda: y.sub_(x, alpha=1e-9),
        "copy": lambda: y.copy_(x),
    }
    seconds = {name: times["best"] for name, times in interleaved_seconds(jobs, rounds).items()}
    share = seconds["sketch"] / seconds["product"]
    record = {"n": operator.n, "tokens": list(batch["input_ids"].shape), "sketch_over_product": share}
    print(record | seconds, flush=True)
    return record | {"seconds": seconds}


def sketch_costs(quick: bool) -> list[dict[str, Any]]:
    rows = [sketch_beside_product(*gpt2(), 3 if quick else 9), sketch_beside_product(*gpt2(432), 3)]
    if quick:
        return rows
    try:
        from gradsketch.demo.weights import smollm2

        model, _ = smollm2("eager")
    except gs.InputError as error:
        return [*rows, {"absent": str(error)}]
    for shape in ((4, 16), (8, 64)):
        generator = torch.Generator().manual_seed(0)
        rows.append(sketch_beside_product(model, {"input_ids": torch.randint(0, 49152, shape, generator=generator)}, 2))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sketch", action="store_true")
    parser.add_argument("--counts", action="store_true")
    arguments = parser.parse_args()
    ending = "_quick" if arguments.quick else ""
    if arguments.sketch:
        print(write(f"spectrum_sketch{ending}", sketch_costs(arguments.quick)))
        return
    model, batch = gpt2()
    operator = gs.hessian(model, losses, batch)
    if arguments.counts:
        print(write("spectrum_counts", counts(operator, gs.loss_gradient(model, losses, batch))))
        return
    results = {"n": operator.n, "absent": []} | routes(operator, arguments.quick)
    for peer in PEERS[:1] if arguments.quick else PEERS:
        try:
            results[peer.__name__] = peer(operator, model, batch)
            print(peer.__name__, results[peer.__name__], flush=True)
        except ImportError as error:
            results["absent"].append(f"{peer.__name__}: {error}")
    print(write(f"spectrum{ending}", results))


if __name__ == "__main__":
    main()
