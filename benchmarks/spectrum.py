"""The top ten eigenvalues of H1 by each route, and what the sketch of a Krylov vector costs beside a product.

    python benchmarks/spectrum.py               # about 6 minutes on 2 cores; --quick: about 2

H1 is GPT2Config(n_layer=4, n_head=4, n_embd=128, vocab_size=2048, n_positions=64) with random weights (seed 0), one
batch of 16 x 64 tokens, eager attention, float32. Residuals are computed afresh, |H y - l y| / |l| with y from a
second pass, and stand beside those reported. Writes benchmarks/results/spectrum.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from record import interleaved_seconds, peak_bytes, write
from scipy.sparse.linalg import eigsh
from transformers import GPT2Config, GPT2LMHeadModel

import gradsketch as gs
from gradsketch.spectra.lanczos import dot, start_vector

K = 10


def h1() -> tuple[torch.nn.Module, Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=128, vocab_size=2048, n_positions=64, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    return model, losses, {"input_ids": torch.randint(0, 2048, (16, 64))}


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    return each.view(len(logits), -1).mean(1)


def residuals(operator: gs.LinearMap, vectors: torch.Tensor, values: np.ndarray) -> np.ndarray:
    """|H y - l y| / |l|, one vector at a time."""
    found = []
    for y, value in zip(vectors, values, strict=True):
        r = operator(y).sub_(y, alpha=float(value))
        found.append(float(r.norm()) / abs(float(value)))
    return np.array(found)


def one_route(operator: gs.LinearMap, method: str, steps: int, tolerance: float) -> dict[str, Any]:
    """Run one route with a limit on its products and check the residuals by a second pass."""
    kept: list[gs.Spectrum] = []
    start = time.perf_counter()
    peak = peak_bytes(
        lambda: kept.append(
            gs.spectrum(operator, K, method=method, steps=steps, tolerance=tolerance, progress=False)  # type: ignore[arg-type]
        )
    )
    seconds = time.perf_counter() - start
    result = kept[0]
    checked = residuals(operator, gs.eigenvectors(operator, result), result.values)
    return {
        "hvps": result.hvps,
        "seconds": seconds,
        "vectors_held": result.vectors_held,
        "peak_mb_beyond_operator": peak / 1e6,
        "values": result.values.tolist(),
        "residual_median": float(np.median(checked)),
        "residual_max": float(checked.max()),
        "reported_residual_median": float(np.median(result.residuals)),
        "copies_dropped": result.copies,
    }


def arpack(operator: gs.LinearMap) -> dict[str, Any]:
    """SciPy's eigsh on the same operator."""
    count = [0]

    class Counted(gs.LinearMap):
        is_self_adjoint, shape, dtype = True, operator.shape, operator.dtype

        def _apply(self, x: torch.Tensor) -> torch.Tensor:
            count[0] += len(x)
            return operator(x)

        _apply_adjoint = _apply

    start = time.perf_counter()
    values, vectors = eigsh(Counted().to_scipy(), k=K, which="LM", tol=1e-3)
    seconds = time.perf_counter() - start
    checked = residuals(operator, torch.from_numpy(vectors.T.copy()), values)
    order = np.argsort(-np.abs(values))
    return {
        "hvps": count[0],
        "seconds": seconds,
        "vectors_held": 2 * K + 1,
        "values": values[order].tolist(),
        "residual_median": float(np.median(checked)),
        "residual_max": float(checked.max()),
    }


def recurrence_costs(sizes: list[int], product_seconds: float) -> dict[str, Any]:
    """Milliseconds of the parts of a step that are not the product, beside a copy of the vector."""
    rows = {}
    for n in sizes:
        x = start_vector(n, 0, "start", torch.float32, "cpu")
        y, phi = x.clone(), gs.AFFD(n, 4096)
        jobs = {
            "sketch": lambda x=x, phi=phi: phi(x),
            "clone": lambda x=x: x.clone(),
            "dot": lambda x=x, y=y: dot(x, y),
            "dot_float32": lambda x=x, y=y: torch.dot(x, y),
            "axpy": lambda x=x, y=y: y.sub_(x, alpha=1e-9),
        }
        rows[str(n)] = {k: 1e3 * v["best"] for k, v in interleaved_seconds(jobs, 3 if n > 10**8 else 7).items()}
        rows[str(n)]["dot_error"] = abs(float(torch.dot(x, y)) - dot(x, y))
        print(n, rows[str(n)])
    first = rows[str(sizes[0])]
    first["sketch_share_of_h1_product"] = first["sketch"] / (1e3 * product_seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    model, task, batch = h1()
    operator = gs.hessian(model, task, batch)
    x = start_vector(operator.n, 0, "start", torch.float32, "cpu")
    phi = gs.AFFD(operator.n, 4096)
    jobs = {
        "gradient": lambda: gs.loss_gradient(model, task, batch),
        "product": lambda: operator(x),
        "sketch": lambda: phi(x),
    }
    step = interleaved_seconds(jobs, 3 if quick else 9)
    product = step["product"]["best"]
    results: dict[str, Any] = {
        "n": operator.n,
        "seconds": step,
        "product_over_gradient": product / step["gradient"]["best"],
        "sketch_over_product": step["sketch"]["best"] / product,
    }
    print(results)
    runs = {"sketched-basis, 59 steps": ("sketched-basis", 59, 1e-12)}
    if not quick:
        runs["sketched-basis, to 1e-3"] = ("sketched-basis", 200, 1e-3)
        runs["full, to 1e-3"] = ("full", 200, 1e-3)
    for name, (method, steps, tolerance) in runs.items():
        results[name] = one_route(operator, method, steps, tolerance)
        print(name, results[name])
    if not quick:
        results["scipy eigsh"] = arpack(operator)
        print("eigsh", results["scipy eigsh"])
    sizes = [operator.n, 10**7] if quick else [operator.n, 10**7, 134_515_008]
    results["step"] = recurrence_costs(sizes, product)
    print(write("spectrum_quick" if quick else "spectrum", results))


if __name__ == "__main__":
    main()
