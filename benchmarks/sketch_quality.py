"""How well inner products survive each sketch, on made-up and on real gradients.

* noise: RMS error of ⟨Phi x, Phi y⟩ times √d over ‖x‖‖y‖, mean and standard error over sketch seeds. A dense Gaussian
  sketch has √(1 + ρ²), about 1, for every input. Inputs: Gaussian, sparse, low rank (sums of two outer products with a
  common factor, as gradients of one layer are), and the per-example gradients of a trained masked language model
  (n = 735,567).
* table6: the least log2 d from which Pearson's r of sketched with exact inner products exceeds .95, .98, .99, over the
  pairs of real gradients: the protocol of Table 6 of Schioppa (arXiv 2402.03994).

The figure goes to results/sketch_quality.png. Run: python benchmarks/sketch_quality.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from record import write
from torch import Tensor

import gradsketch as gs
from gradsketch.demo.weights import albert

KINDS: dict[str, Callable[..., gs.Sketch]] = {
    "Dense": partial(gs.Dense, distribution="rademacher"),
    "AFFD": gs.AFFD,
    "AFFD gaussian": partial(gs.AFFD, form="global", diagonal="gaussian"),
    "AFJL": gs.AFJL,
    "AFJL gaussian": partial(gs.AFJL, diagonal="gaussian"),
    "SJLT": gs.SJLT,
    "FJL": gs.FJL,
    "FFD": gs.FFD,
    "QK": gs.QK,
}
N_MADE_UP = 1 << 16
THRESHOLDS = (0.95, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few examples, seeds and sizes")
    quick = parser.parse_args().quick
    families = {**made_up(16), "gradients": albert_gradients(12 if quick else 92)}
    seeds, log_ds = range(2 if quick else 8), (8,) if quick else (6, 8, 10, 12)
    noise = [
        measured
        for (family, x), log_d, name in itertools.product(families.items(), log_ds, KINDS)
        if name != "Dense" or log_d <= 10 or family != "gradients"
        for measured in [noise_row(family, x[:16], name, log_d, seeds)]
    ]
    table = list(table6(families["gradients"], range(6, 12, 2) if quick else range(6, 18), range(1 if quick else 3)))
    results = {"noise": noise, "table6": table, "examples": len(families["gradients"])}
    path = write("sketch_quality" + "_quick" * quick, results)
    plot(noise, path.with_suffix(".png"))
    print(path)


def noise_row(family: str, x: Tensor, name: str, log_d: int, seeds: range) -> dict[str, Any]:
    """Return the noise of one kind at one size, over all pairs of vectors, and its standard error over seeds."""
    norms = x.norm(dim=-1)
    scale, exact = norms[:, None] * norms, x @ x.T
    above = torch.ones_like(exact).triu(1).bool()
    values = []
    for seed in seeds:
        s = KINDS[name](x.shape[-1], 1 << log_d, seed=seed)(x)
        errors = ((s @ s.T - exact) / scale)[above]
        values.append(float(errors.square().mean() * (1 << log_d)))
    mean_square = torch.tensor(values, dtype=torch.float64)
    noise = float(mean_square.mean().sqrt())
    error = float(mean_square.std() / len(values) ** 0.5 / 2 / noise)  # of the square root, to first order
    print(f"{family:>10}  {name:>14}  d = 2^{log_d:<2}  noise·√d = {noise:.3f} ± {error:.3f}", flush=True)
    return {"family": family, "kind": name, "log2_d": log_d, "noise": noise, "standard_error": error}


def table6(
    x: Tensor, log_ds: range, seeds: range, kinds: dict[str, Callable[..., gs.Sketch]] = KINDS
) -> Iterator[dict[str, Any]]:
    """Yield, for each kind, Pearson's r over the pairs at every d, and the least log2 d that keeps each threshold."""
    exact = (x @ x.T)[torch.ones(len(x), len(x)).triu(1).bool()]
    for name, kind in kinds.items():
        if name == "Dense":
            continue  # n·d random numbers a call; AFFD shows what it would do
        r = {log_d: [pearson(x, exact, kind(x.shape[-1], 1 << log_d, seed=seed)) for seed in seeds] for log_d in log_ds}
        least = {str(t): least_size(r, t) for t in THRESHOLDS}
        print(f"{name:>14}  least log2 d for r > .95 / .98 / .99: {list(least.values())}", flush=True)
        yield {"kind": name, "pearson": {str(k): v for k, v in r.items()}, "least_log2_d": least}


def pearson(x: Tensor, exact: Tensor, phi: gs.Sketch) -> float:
    s = phi(x)
    sketched = (s @ s.T)[torch.ones(len(x), len(x)).triu(1).bool()]
    return float(torch.corrcoef(torch.stack([exact, sketched]))[0, 1])


def least_size(r: dict[int, list[float]], threshold: float) -> int | None:
    """Return the least log2 d from which on every larger size keeps a mean r above the threshold."""
    enough = [log_d for log_d, values in r.items() if sum(values) / len(values) > threshold]
    missed = max(set(r) - set(enough), default=-1)
    return min((log_d for log_d in enough if log_d > missed), default=None)


def made_up(count: int) -> dict[str, Tensor]:
    """Return vectors of three families; the sparse ones have one entry in 64, the low-rank ones a common factor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    side = int(N_MADE_UP**0.5)
    places = torch.rand(count, N_MADE_UP, generator=generator) < 1 / 64
    return {
        "gaussian": normal(count, N_MADE_UP),
        "sparse": normal(count, N_MADE_UP) * places,
        "low rank": (normal(1, side, 2) @ normal(count, 2, side)).flatten(1),
    }


def albert_gradients(count: int) -> Tensor:
    """Return gradients of the masked-token loss of esterifications, every seventh token masked, [count, n]."""
    model, encode = albert()
    parameters = [p.requires_grad_() for p in model.parameters()]
    mask = encode("")[:1]  # stands in for the mask token: a token that never occurs inside a reaction
    rows = []
    for reaction in itertools.islice(esterifications(), count):
        ids = torch.tensor([encode(reaction)])
        hidden = torch.arange(ids.shape[1]) % 7 == 3
        logits = model(input_ids=torch.where(hidden, mask[0], ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[0, hidden], ids[0, hidden])
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
            )
        )
    return torch.stack(rows)


def esterifications() -> Iterator[str]:
    """Yield reactions of an acid and an alcohol to an ester, as SMILES."""
    acids = ("C", "CC", "CCC", "CC(C)", "c1ccccc1", "Cc1ccc(", "ClC", "N#CC", "COC", "C=C")
    alcohols = ("C", "CC", "CCC", "C(C)C", "Cc1ccccc1", "C1CCCCC1", "CCCl", "CC#C", "CCOC", "CCCCC")
    for acid, alcohol in itertools.product(acids, alcohols):
        left = f"{acid}cc1)" if acid.endswith("(") else acid
        yield f"{left}C(=O)O.O{alcohol}>>{left}C(=O)O{alcohol}"


def plot(noise: list[dict[str, Any]], path: Path) -> None:
    families = list(dict.fromkeys(row["family"] for row in noise))
    figure, axes = plt.subplots(1, len(families), figsize=(13, 3.8), sharey=True, layout="constrained")
    for axis, family in zip(axes, families, strict=True):
        for position, name in enumerate(KINDS):
            rows = [r for r in noise if (r["family"], r["kind"]) == (family, name)]
            aside = 2 ** ((position - len(KINDS) / 2) / 16)  # so that error bars do not cover one another
            sizes, values, errors = ([r[key] for r in rows] for key in ("log2_d", "noise", "standard_error"))
            axis.errorbar([aside * 2**k for k in sizes], values, errors, fmt="o-", ms=3, lw=1, capsize=2, label=name)
        axis.axhline(1, color="black", linewidth=0.5, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_yticks([1, 2, 4], labels=["1", "2", "4"])
        axis.set_ylim(0.8, 6)
        axis.set(title=family, xlabel="sketch size d")
    axes[0].set_ylabel("RMS error · √d / (‖x‖‖y‖)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
