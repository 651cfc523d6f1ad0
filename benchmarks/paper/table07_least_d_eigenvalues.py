"""Table 7: the least sketch size that keeps the top ten eigenvalues of the Hessian, by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spectrum_dimension import LIMITS, _least, floor, losses, one, trained

import gradsketch as gs
from benchmarks.paper.numbers import Interval, median, shown, table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Least log2 d for an error below .2, .1, .05.
PAPER = {"AFFD paper": (9, 10, 10), "AFJL paper": (12, 12, 12), "QK": (13, 13, 13)}
KINDS: dict[str, Callable[..., gs.Sketch]] = {
    "AFFD paper": lambda n, d, seed: gs.AFFD(n, d, seed=seed, form="paper"),
    "AFJL paper": lambda n, d, seed: gs.AFJL(n, d, seed=seed, form="paper"),
    "QK": gs.QK,
    "AFFD": gs.AFFD,
    "AFJL": gs.AFJL,
}
NEW = ("AFFD", "AFJL", "BlockSum")
K = 10


def run(size: Size) -> Results:
    steps, width, layers = pick(size, (1, 8, 1), (200, 24, 2), (1500, 96, 2))
    log_ds, seeds = pick(size, (6,), (8, 9, 10), tuple(range(7, 13))), pick(size, 1, 2, 3)
    model, batch, loss = trained(steps, width, layers)
    operator = gs.hessian(model, losses, batch)
    exact = gs.spectrum(
        operator, K, method="full", steps=pick(size, 20, 200, 200), tolerance=1e-3, progress=False
    ).values
    kinds = KINDS | {"BlockSum": lambda n, d, seed: gs.BlockSum(gs.Parameters(model), d, seed=seed)}
    rows = {}
    for kind in ("AFFD",) if size == "tiny" else kinds:
        rows[kind] = {str(k): errors(operator, kinds[kind], 1 << k, seeds, exact) for k in log_ds}
        print(kind, rows[kind], flush=True)
    return {
        "n": operator.n,
        "loss": loss,
        "seeds": seeds,
        "log2_ds": list(log_ds),
        "exact": exact.tolist(),
        "rows": rows,
    }


def errors(operator: gs.LinearMap, kind: Any, d: int, seeds: int, exact: Any) -> dict[str, Interval]:
    """Return the mean relative error of the ten, raw and corrected to first order: median and range over seeds."""
    runs = [one(operator, kind, d, seed, exact) for seed in range(seeds)]
    return {"raw": median([run[0] for run in runs]), "corrected": median([run[1] for run in runs])}


def leasts(results: Results, kind: str, form: str) -> list[int | None]:
    found = {k: row[form]["value"] for k, row in results["rows"][kind].items()}
    return [_least(found, limit) for limit in LIMITS]


def show(results: Results) -> str:
    log_ds = results["log2_ds"]
    header = ["least log2 d for an error below", *(f"{limit:g}" for limit in LIMITS), "[P]"]
    header += [f"error at 2^{k}" for k in (log_ds[0], log_ds[-1])]
    rows = []
    for kind in results["rows"]:
        for form in ("raw", "corrected"):
            name = f"**{kind}**" if kind in NEW or form == "corrected" else kind
            cells = ["–" if k is None else f"≤ {k}" if k == log_ds[0] else str(k) for k in leasts(results, kind, form)]
            paper = " / ".join(map(str, PAPER[kind])) if form == "raw" and kind in PAPER else "–"
            ends = [shown(results["rows"][kind][str(k)][form], ".0%") for k in (log_ds[0], log_ds[-1])]
            rows.append([name + (", corrected" if form == "corrected" else ""), *cells, paper, *ends])
    return (
        f"n = {results['n']:,}, d from 2^{log_ds[0]} to 2^{log_ds[-1]}, {results['seeds']} seeds; – means not "
        "within these "
        f'sizes. "Corrected" takes off the first-order bias of a sketched spectrum, which [P] does not. At '
        f"d = 2^{log_ds[-1]} the sketch's own noise is "
        f"{floor(log_ds[-1]):.1%}.\n\n{table(header, rows)}\n\n{_conclusion(results)}"
    )


def _conclusion(results: Results) -> str:
    last = str(results["log2_ds"][-1])
    value = {kind: row[last]["raw"]["value"] for kind, row in results["rows"].items()}
    fixed = {kind: row[last]["corrected"]["value"] for kind, row in results["rows"].items()}
    ours = [kind for kind in PAPER if kind in value]
    text = ""
    if ours:
        order, theirs = (sorted(ours, key=key) for key in (value.__getitem__, lambda kind: sum(PAPER[kind])))
        same = "the order of [P]" if order == theirs else f"in [P]: {', '.join(theirs)}"
        text = f"From the least error to the largest at the largest d: {', '.join(order)} ({same}). "
    helped = [kind for kind in value if fixed[kind] < value[kind]]
    return (
        f"{text}The correction lowers the error of {len(helped)} of {len(value)} kinds there: that of AFFD goes from "
        f"{value['AFFD']:.1%} to {fixed['AFFD']:.1%}."
    )


def short(results: Results) -> tuple[str, str]:
    last = results["log2_ds"][-1]
    rows = {kind: row[str(last)]["raw"]["value"] for kind, row in results["rows"].items()}
    here = ", ".join(f"{kind} {rows[kind]:.0%}" for kind in (*PAPER, "AFFD") if kind in rows)
    return "least log2 d for 20 % on the top ten eigenvalues: AFFD 9, AFJL 12, QK 13", f"error at 2^{last}: {here}"


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    figure, axes = style.new(2, 3.8, share_y=True)
    d = [2**k for k in results["log2_ds"]]
    for axis, form in zip(axes, ("raw", "corrected"), strict=True):
        for kind, look in style.styles(list(results["rows"])).items():
            style.series(axis, d, [row[form] for row in results["rows"][kind].values()], look)
        axis.plot(d, [floor(k) for k in results["log2_ds"]], color="grey", linewidth=1, label="noise of the sketch")
        axis.set(title=form, xlabel="sketch size d", yscale="log")
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("mean relative error of the top ten")
    return style.finished(figure, legend=axes[0])


TABLE = Table(
    "table07_least_d_eigenvalues",
    "Table 7: the least d for eigenvalues",
    "a byte-level GPT trained here, of a quarter of a million parameters in the full size, where [P] has GPT-2.",
    5,
    run,
    show,
    short,
    draw,
)
