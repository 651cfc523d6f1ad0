"""Table 6: the least sketch size that keeps inner products of gradients, by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sketch_quality import KINDS, THRESHOLDS, albert_gradients, table6
from spectrum_dimension import losses, pieces, trained
from torch import Tensor

import gradsketch as gs
from benchmarks.paper.numbers import Interval, median, shown, table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# GPT-2: the least log2 d for r above .95, .98, .99.
PAPER = {
    "FJL": (10, 12, 13),
    "AFFD gaussian": (10, 12, 13),
    "AFJL gaussian": (12, 13, 15),
    "QK": (14, 16, 17),
    "FFD": (10, 12, 14),
}
NEW = ("AFFD", "AFJL", "SJLT", "BlockSum")


def run(size: Size) -> Results:
    steps, width, layers, examples = pick(size, (1, 8, 1, 5), (300, 32, 4, 64), (1500, 96, 4, 92))
    log_ds, seeds = pick(size, range(4, 6), range(6, 13), range(6, 15)), pick(size, 1, 2, 3)
    model, _, _ = trained(steps, width, layers)
    kinds = KINDS | {"BlockSum": lambda n, d, seed=0: gs.BlockSum(gs.Parameters(model), d, seed=seed)}
    found = {"byte-level GPT": swept(gradients(model, examples), log_ds, seeds, kinds)}
    if size == "full":
        found["ALBERT, masked language model of reactions"] = swept(albert_gradients(examples), log_ds, seeds, KINDS)
    return {"models": found}


def gradients(model: torch.nn.Module, count: int) -> Tensor:
    """Return the gradients of single examples, [count, n]."""
    torch.manual_seed(1)
    ids = pieces(count)["input_ids"]
    parameters = gs.Parameters(model)
    return torch.stack([gs.loss_gradient(model, losses, {"input_ids": row[None]}, parameters) for row in ids])


def swept(x: Tensor, log_ds: range, seeds: int, kinds: dict[str, Any]) -> dict[str, Any]:
    rows = list(table6(x, log_ds, range(seeds), kinds))
    return {"n": x.shape[1], "examples": len(x), "seeds": seeds, "log2_d": [log_ds[0], log_ds[-1]], "rows": rows}


def show(results: Results) -> str:
    parts = []
    for name, found in results["models"].items():
        header = ["least log2 d for r >", *(f"{t:g}" for t in THRESHOLDS), "r at its largest d", "[P], GPT-2"]
        low, high = found["log2_d"]
        rows = [
            [
                f"**{row['kind']}**" if row["kind"] in NEW else row["kind"],
                *(least(row, t, low, high) for t in THRESHOLDS),
                shown(median(row["pearson"][str(high)]), ".3f"),
                " / ".join(map(str, PAPER[row["kind"]])) if row["kind"] in PAPER else "–",
            ]
            for row in found["rows"]
        ]
        pairs = found["examples"] * (found["examples"] - 1) // 2
        parts.append(
            f"{name}, n = {found['n']:,}, {pairs:,} pairs, {found['seeds']} seeds, d from 2^{low} to 2^{high}:\n\n"
            f"{table(header, rows)}"
        )
    return "\n\n".join([*parts, _conclusion(results)])


def least(row: dict[str, Any], threshold: float, low: int, high: int) -> str:
    found = row["least_log2_d"][str(threshold)]
    if found is None:
        return f"> {high}"
    return f"≤ {low}" if found == low else str(found)


def _conclusion(results: Results) -> str:
    lines = []
    for name, found in results["models"].items():
        last = str(found["log2_d"][1])
        r = {row["kind"]: sum(row["pearson"][last]) / len(row["pearson"][last]) for row in found["rows"]}
        ours, theirs = sorted(PAPER, key=r.__getitem__)[::-1], sorted(PAPER, key=lambda kind: sum(PAPER[kind]))
        lines.append(
            f"{name}: from the best of [P]'s kinds to the worst, by r at the largest d: {', '.join(ours)}; in "
            f"[P]: {', '.join(theirs)}."
        )
        if ours[-1] != theirs[-1]:
            lines.append(f"So [P]'s last, {theirs[-1]}, is not last here; {ours[-1]} is.")
        best = max(NEW, key=lambda kind: r.get(kind, -1.0))
        lines.append(
            f"Of the forms that are not in [P], {best} is best (r = {r[best]:.3f}); signs instead of Gaussians take "
            f"AFJL from r = {r['AFJL gaussian']:.3f} to {r['AFJL']:.3f}."
        )
    return " ".join(lines)


def short(results: Results) -> tuple[str, str]:
    found = next(iter(results["models"].values()))
    low, high = found["log2_d"]
    rows = {row["kind"]: row for row in found["rows"]}
    chosen = ("AFFD gaussian", "AFJL gaussian", "QK", "AFFD")
    here = ", ".join(f"{kind} {least(rows[kind], 0.95, low, high)}" for kind in chosen)
    return "least log2 d for r > .95: AFFD 10, AFJL 12, QK 14", here


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    models = results["models"]
    figure, axes = style.new(len(models), 3.8, share_y=True)
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        for row, look in zip(found["rows"], style.styles([r["kind"] for r in found["rows"]]).values(), strict=True):
            style.series(
                axis, [2 ** int(k) for k in row["pearson"]], [missing(r) for r in row["pearson"].values()], look
            )
        for threshold in THRESHOLDS:
            axis.axhline(1 - threshold, color="grey", linewidth=0.5, linestyle=":")
        axis.set_title(name, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="sketch size d", yscale="log")
    axes[0].set_ylabel("1 − Pearson r of inner products")
    return style.finished(figure, legend=axes[0])


def missing(r: list[float]) -> Interval:
    """Return what r lacks of one: median and range over seeds."""
    return median([1 - value for value in r])


TABLE = Table(
    "table06_least_d",
    "Table 6: the least d for gradients",
    "a byte-level GPT trained on Python's own source text, and an ALBERT of chemical reactions, where [P] has "
    "GPT-2: with "
    "far fewer parameters. [P]'s kinds have Gaussians; AFFD and AFJL without the word have signs.",
    12,
    run,
    show,
    short,
    draw,
)
