"""Tables 1 and 5: gradients and Hessians of single layers are no stand-in for those of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from spectrum_dimension import error, losses, pieces, trained
from torch import Tensor, nn

import gradsketch as gs
from benchmarks.paper.numbers import Interval, shown, table
from benchmarks.paper.table import Results, Size, Table, pick
from gradsketch.evaluation.quality import sketch_quality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# GPT-2: Pearson r and top-ten eigenvalue error, the embeddings and then layers.
PAPER = [(0.16, 0.72), (0.75, 0.24), (0.89, 0.31), (0.90, 0.19), (0.89, 0.24), (0.78, 0.37), (0.38, 0.40)]
K = 10


def run(size: Size) -> Results:
    models = {"byte-level GPT": byte_gpt(size)}
    if size == "full":
        models["SmolLM2-135M"] = smollm2()
    return {"models": models}


def byte_gpt(size: Size) -> dict[str, Any]:
    steps, width, layers, examples = pick(size, (1, 8, 1, 4), (300, 48, 4, 64), (1500, 96, 6, 92))
    model, batch, loss = trained(steps, width, layers)
    torch.manual_seed(1)
    together = pieces(examples)
    groups = {"embeddings": ["transformer.wte*", "transformer.wpe*"]}
    groups |= {f"layer {i}": [f"transformer.h.{i}.*"] for i in range(layers)}
    found = correlations(model, losses, together, groups, 64 if size == "tiny" else 1024)
    errors = eigenvalue_errors(model, batch, groups, steps=pick(size, 10, 60, 100))
    return {"n": sum(p.numel() for p in model.parameters()), "loss": loss, "examples": examples, **found, **errors}


def smollm2() -> dict[str, Any]:
    from gradient_workloads import smollm2 as load

    work = load()
    layers = len(work.model.model.layers)
    groups = {"embeddings": ["model.embed_tokens*"]}
    groups |= {f"layers {i} – {i + 4}": [f"model.layers.{j}.*" for j in range(i, i + 5)] for i in range(0, layers, 5)}
    batch = work.batches(len(work.ids))[0]
    found = correlations(work.model, work.task, batch, groups, 4096)
    return {"n": sum(p.numel() for p in work.model.parameters()), "examples": len(work.ids), **found}


def correlations(
    model: nn.Module, task: Any, batch: dict[str, Tensor], groups: dict[str, list[str]], d: int
) -> Results:
    """Return Pearson's r with the whole gradient's inner products, of each group's and of a sketch of the whole."""
    exact = gs.gradient_gram(model, task, batch)
    r = {}
    for name, globs in groups.items():
        quality = sketch_quality(exact, root(gs.gradient_gram(model, task, batch, parameters=globs)))
        r[name] = interval(quality)
    sketcher = gs.GradientSketcher(model, task, gs.BlockSum(gs.Parameters(model), d))
    parts = [{key: value[i : i + 8] for key, value in batch.items()} for i in range(0, len(exact), 8)]
    whole = sketch_quality(exact, torch.cat([sketcher(part).values for part in parts]))
    return {"pearson": r, "d": d, "sketch_of_the_whole": interval(whole)}


def interval(quality: gs.Quality) -> Interval:
    low, high = quality.pearson_interval
    return {"value": quality.pearson, "low": low, "high": high}


def root(gram: Tensor) -> Tensor:
    """Return vectors with these inner products."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


def eigenvalue_errors(model: nn.Module, batch: Any, groups: dict[str, list[str]], steps: int) -> Results:
    """Return the mean relative error of the top ten eigenvalues of each group's block of the Hessian."""

    def top(selection: Any) -> gs.Spectrum:
        operator = gs.hessian(model, losses, batch, selection)
        return gs.spectrum(operator, K, method="full", steps=steps, tolerance=1e-3, progress=False)

    exact = top(gs.Parameters(model)).values
    return {
        "exact": exact.tolist(),
        "eigenvalue_error": {name: error(top(globs).values.tolist(), exact) for name, globs in groups.items()},
    }


def show(results: Results) -> str:
    parts = []
    for name, found in results["models"].items():
        errors = found.get("eigenvalue_error")
        header = [
            "",
            "Pearson r of its inner products with the whole gradient's",
            *(["top-ten eigenvalue error"] if errors else []),
        ]
        rows = [
            [group, shown(r, ".2f"), *([shown(errors[group], ".0%")] if errors else [])]
            for group, r in found["pearson"].items()
        ]
        rows.append([f"**whole gradient, sketched to d = {found['d']:,}**", shown(found["sketch_of_the_whole"], ".2f"),
                     *(["–"] if errors else [])])  # fmt: skip
        parts.append(f"{name}, n = {found['n']:,}, {found['examples']} examples:\n\n{table(header, rows)}")
    return "\n\n".join([*parts, _paper(), _conclusion(results)])


def _paper() -> str:
    rows = [["embeddings" if i == 0 else f"{i}", f"{r:.2f}", f"{e:.0%}"] for i, (r, e) in enumerate(PAPER)]
    return "[P], GPT-2:\n\n" + table(["", "Pearson r", "top-ten eigenvalue error"], rows)


def _conclusion(results: Results) -> str:
    lines = []
    for name, found in results["models"].items():
        r = {group: value["value"] for group, value in found["pearson"].items()}
        low, high, whole = min(r, key=r.__getitem__), max(r, key=r.__getitem__), found["sketch_of_the_whole"]["value"]
        better = sum(value > whole for value in r.values())
        lines.append(
            f"{name}: r from {r[low]:.2f} ({low}) to {r[high]:.2f} ({high}), [P]: .16 to .91; a sketch of the "
            f"whole has {whole:.2f}, "
            + (f"which {better} of {len(r)} groups exceed." if better else "more than any group.")
        )
        if errors := found.get("eigenvalue_error"):
            least, most = min(errors.values()), max(errors.values())
            says = (
                "as in [P] no layer comes below 19 %"
                if least >= 0.19
                else "so one layer does better than any in [P] (19 %)"
            )
            lines.append(f"Errors of the eigenvalues: {least:.0%} to {most:.0%}, {says}.")
    return " ".join(lines)


def short(results: Results) -> tuple[str, str]:
    parts = []
    for name, found in results["models"].items():
        r = [value["value"] for value in found["pearson"].values()]
        whole = found["sketch_of_the_whole"]["value"]
        parts.append(f"{name}: {min(r):.2f} – {max(r):.2f}, a sketch of the whole {whole:.2f}")
    return "gradients of single layers: r .16 – .91 with the whole", "; ".join(parts)


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    models = results["models"]
    figure, axes = style.new(len(models), share_y=True)
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        groups = list(found["pearson"])
        looks = style.styles(["one group", "sketch of the whole"])
        style.series(
            axis, range(len(groups)), list(found["pearson"].values()), looks["one group"] | {"linestyle": "none"}
        )
        style.series(axis, [len(groups)], [found["sketch_of_the_whole"]], looks["sketch of the whole"])
        axis.set_xticks(range(len(groups) + 1), [*groups, "sketch"], rotation=45, ha="right", fontsize=8)
        axis.set_title(f"{name}, n = {found['n']:,}", fontsize=9)
        axis.set_ylim(-0.1, 1.05)
    axes[0].set_ylabel("Pearson r with the whole gradient")
    return style.finished(figure)


TABLE = Table(
    "table01_layers",
    "Tables 1 and 5: choosing layers distorts",
    "a byte-level GPT trained on Python's own source text and SmolLM2-135M (in groups of five layers, weights "
    "rounded to four "
    "bits, no eigenvalues), where [P] has GPT-2.",
    14,
    run,
    show,
    short,
    draw,
)
