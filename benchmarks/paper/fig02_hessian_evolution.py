"""Figures 2, 5 and 6: the Hessian's outer spectrum in fine-tuning, and what small networks taught of it.

Two things are known of small networks trained from scratch, and [P] asks whether they hold for language models:

1. the negative eigenvalues fade early in training, so that R_NEG = |lowest negative| / largest positive becomes small;
2. a classifier with c classes has c − 1 outliers (eigenvalues above a fifth of the largest), and the gradient lies in
   their space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import gradsketch as gs
from benchmarks.paper.numbers import Interval, shown, table
from benchmarks.paper.table import Results, Size, Table, pick
from gradsketch.random import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How R_NEG went in fine-tuning, and how many outliers there were.
PAPER = (
    "[P]: R_NEG stays high for RoBERTa and decays for GPT-2 Large and BART; RoBERTa has six outliers for three classes."
)
SHARE = 0.5  # of the gradient's squared norm


@dataclass
class Tuning:
    """A model with rows to fine-tune it on; ``classes`` for a classifier."""

    model: nn.Module
    task: gs.Task
    rows: list[Any]
    parameters: gs.Parameters
    batch: int
    rate: float
    classes: int | None


def run(size: Size) -> Results:
    steps, products = pick(size, (0, 2), (0, 20), (0, 10, 50, 100, 200)), pick(size, 8, 20, 60)
    k, examples = pick(size, 3, 6, 10), pick(size, 4, 8, 8)
    makers = {
        "tiny": {"generation: a byte-level GPT": byte_gpt},
        "quick": {"classification: MiniLM, spam or ham": spam, "generation: a small GPT, facts of countries": facts},
        "full": {
            "classification: MiniLM, spam or ham": spam,
            "generation: SmolLM2-135M, the last 8 layers, facts of countries": countries,
        },
    }[size]
    tunings = {name: make() for name, make in makers.items()}  # first: what is not installed shows before the work
    return {"tasks": {name: evolution(tuning, steps, k, products, examples) for name, tuning in tunings.items()}}


def facts() -> Tuning:
    """A language model of a million parameters that knows one half of its facts, and learns the other."""
    import facts_lm

    rows = facts_lm.facts()[0]
    half = len(rows) // 2
    model, _ = facts_lm.trained(list(range(half)))
    model.set_attn_implementation("eager")  # second derivatives
    return Tuning(model, facts_lm.TASK, rows[half:], gs.Parameters(model), 16, 1e-3, None)


def byte_gpt() -> Tuning:
    from spectrum_dimension import pieces, trained

    model, _, _ = trained(1, 8)
    rows = [{"input_ids": ids, "labels": ids} for ids in pieces(16)["input_ids"].tolist()]
    return Tuning(model, gs.CausalLM(), rows, gs.Parameters(model), 4, 1e-3, None)


def spam() -> Tuning:
    import intrinsic_dimension

    found = intrinsic_dimension.spam(quick=False)
    return Tuning(found.model, found.task, found.train, found.parameters, found.batch_size, found.full_lr, 2)


def countries() -> Tuning:
    import intrinsic_dimension

    found = intrinsic_dimension.countries(quick=False)
    found.model.set_attn_implementation("eager")  # second derivatives
    return Tuning(found.model, found.task, found.train, found.parameters, found.batch_size, found.full_lr, None)


def evolution(tuning: Tuning, steps: tuple[int, ...], k: int, products: int, examples: int) -> Results:
    """Fine-tune in full, and take the spectrum of the loss on the first examples at some steps."""
    tuning.model.eval()  # no dropout, in training neither
    tuning.model.requires_grad_(False)
    for _, parameter in tuning.parameters:
        parameter.requires_grad_(True)
    data, rows = tuning.rows[:examples], []
    for step in trained(tuning, steps):
        common = (tuning.model, tuning.task, data, tuning.parameters)
        gradient = gs.loss_gradient(*common)
        found = gs.spectrum(gs.hessian(*common), k, which="both", steps=products, gradient=gradient, progress=False)
        with torch.no_grad():
            loss = float(tuning.task.losses(tuning.model, tuning.task.collate(data)).mean())
        rows.append({"step": step, "loss": loss} | summary(found))
        print(step, f"loss {loss:.4f}", found.summary(), flush=True)
    return {"n": tuning.parameters.n, "classes": tuning.classes, "examples": examples, "k": k, "rows": rows}


def trained(tuning: Tuning, steps: tuple[int, ...]) -> Iterator[int]:
    """Fine-tune with AdamW, and stop at each of the steps."""
    optimizer = torch.optim.AdamW([p for _, p in tuning.parameters], lr=tuning.rate, weight_decay=0.0)
    for step in range(steps[-1] + 1):
        if step in steps:
            yield step
        order = Stream(0, "tuning", str(step)).permutation(len(tuning.rows))[: tuning.batch].tolist()
        optimizer.zero_grad(set_to_none=True)
        tuning.task.losses(tuning.model, tuning.task.collate([tuning.rows[i] for i in order])).mean().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def summary(found: gs.Spectrum) -> dict[str, Any]:
    return {
        "positive": [[e.value, e.error] for e in found.positive],
        "negative": [[e.value, e.error] for e in found.negative],
        "r_neg": r_neg(found),
        "outliers": found.outliers,
        "gradient_in_outliers": found.gradient_in_outliers,
        "settled": int(found.converged.sum()),
        "asked": len(found.converged),
        "products": found.hvps,
        "method": found.method,
    }


def r_neg(found: gs.Spectrum) -> Interval:
    """Return R_NEG, between what the errors of its two eigenvalues leave open."""
    if not found.negative or not found.positive:
        return {"value": found.r_neg, "low": found.r_neg, "high": found.r_neg}
    top, lowest = found.positive[0], found.negative[0]
    low = max(0.0, -lowest.value - lowest.error) / (top.value + top.error)
    high = (-lowest.value + lowest.error) / max(top.value - top.error, 1e-30)
    return {"value": found.r_neg, "low": low, "high": high}


def show(results: Results) -> str:
    parts = [PAPER]
    for name, found in results["tasks"].items():
        header = ["step", "loss", "largest", "lowest", "R_NEG", "outliers", "of the gradient in their space", "settled"]
        rows = [
            [
                row["step"],
                f"{row['loss']:.3f}",
                *(shown(row[side][0][0]) if row[side] else "–" for side in ("positive", "negative")),
                shown(row["r_neg"], ".3f"),
                f"{row['outliers']}" + (" or more" if row["outliers"] >= len(row["positive"]) else ""),
                shown(inside(row), ".0%"),
                f"{row['settled']} of {row['asked']}",
            ]
            for row in found["rows"]
        ]
        parts.append(
            f"{name[0].upper()}{name[1:]}; n = {found['n']:,}, the loss on {found['examples']} examples, "
            f"{found['rows'][0]['products']} products a step at most; those unsettled are larger than shown, "
            "and shares are known to some per cent."
            f"\n\n{table(header, rows)}\n\n{verdict(found)}"
        )
    return "\n\n".join(parts)


def inside(row: dict[str, Any]) -> float | None:
    """Return the gradient's share in the outliers' space: eigenvectors' lengths come from sketches, to some percent."""
    share: float | None = row["gradient_in_outliers"]
    return None if share is None else min(share, 1.0)


def verdict(found: Results) -> str:
    """Return, in words, whether what is known of small networks holds here."""
    first, last = found["rows"][0]["r_neg"], found["rows"][-1]["r_neg"]
    fades = last["high"] < SHARE * first["low"]
    grows = last["low"] > first["high"]
    one = (
        f"*First conjecture (negative curvature fades):* {'holds' if fades else 'does not hold'} here. R_NEG "
        f"{'falls' if fades else 'grows' if grows else 'goes'} from {first['value']:.3f} to {last['value']:.3f}."
    )
    shares = [share for share in map(inside, found["rows"]) if share is not None]
    where = (
        f"between {min(shares):.0%} and {max(shares):.0%} of the gradient's squared norm lies in the outliers' space"
    )
    mostly = "as conjectured" if min(shares) > SHARE else "not most of it at every step, as would be expected"
    counts = [row["outliers"] for row in found["rows"]]
    most = [len(row["positive"]) for row in found["rows"]]
    more = " or more" if any(count >= limit for count, limit in zip(counts, most, strict=True)) else ""
    seen = f"from {min(counts)} to {max(counts)}{more} outliers; {where}, {mostly}."
    if found["classes"] is None:
        return f"{one}\n\n*Second conjecture:* there are no classes to count against. Here: {seen}"
    wanted = found["classes"] - 1
    holds = all(count == wanted for count in counts)
    number = f"{wanted} outlier{'s' * (wanted != 1)} for {found['classes']} classes"
    return f"{one}\n\n*Second conjecture ({number}):* {'holds' if holds else 'does not hold'} here: {seen}"


def short(results: Results) -> tuple[str, str]:
    parts = []
    for name, found in results["tasks"].items():
        first, last = (found["rows"][i]["r_neg"]["value"] for i in (0, -1))
        counts = [row["outliers"] for row in found["rows"]]
        parts.append(f"{name.split(',')[0]}: R_NEG {first:.2f} → {last:.2f}, {min(counts)} – {max(counts)} outliers")
    return "R_NEG stays high for RoBERTa, decays for GPT-2 Large and BART; 6 outliers of 3 classes", "; ".join(parts)


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    tasks = results["tasks"]
    figure, axes = style.new(2, 3.8)
    for (name, found), look in zip(tasks.items(), style.styles(list(tasks)).values(), strict=True):
        label = {"label": name.split(",")[0]}
        steps = [row["step"] for row in found["rows"]]
        style.series(axes[0], steps, [row["r_neg"] for row in found["rows"]], look | label)
        last = found["rows"][-1]["positive"]
        ratios = [
            {"value": v / last[0][0], "low": max(v - e, 0) / last[0][0], "high": (v + e) / last[0][0]} for v, e in last
        ]
        style.series(axes[1], range(1, len(ratios) + 1), ratios, look | label)
    axes[0].set(xlabel="step of fine-tuning", ylabel="R_NEG", ylim=(0, None))
    axes[1].axhline(0.2, color="grey", linewidth=1, linestyle=":")
    axes[1].set(xlabel="n", ylabel="R_n after the last step", ylim=(0, 1.1))
    return style.finished(figure, legend=axes[0])


TABLE = Table(
    "fig02_hessian_evolution",
    "Figures 2, 5 and 6: the Hessian's spectrum in fine-tuning",
    "MiniLM and SmolLM2-135M in the place of RoBERTa, GPT-2 Large and BART; few examples and steps; a Lanczos "
    "recurrence "
    "in R^n that keeps sketches of its vectors, which has no bias, in the place of the sketched operator.",
    21,
    run,
    show,
    short,
    draw,
)
