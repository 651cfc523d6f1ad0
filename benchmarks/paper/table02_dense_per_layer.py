"""Table 2: a dense projection for each layer costs memory in proportion to its size, and soon more than there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from record import interleaved_rounds, peak_bytes
from torch import Tensor

import gradsketch as gs
from benchmarks.paper.costs import case
from benchmarks.paper.numbers import median, shown, table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_MS, PAPER_LIMIT, PAPER_LIMIT_EMBEDDING = 23, 128, 32
GPT2 = 124_439_808
V100 = 16 * 2**30


def run(size: Size) -> Results:
    here = case(size)
    directions, rounds = pick(size, (8,), (32, 128), (32, 128)), pick(size, 1, 3, 6)
    groups: dict[str, int] = {}
    for name, parameter in here.model.named_parameters():
        key = f"layer {name.split('.')[2]}" if ".h." in name else "embeddings and final norm"
        groups[key] = groups.get(key, 0) + parameter.numel()
    chosen = {key: groups[key] for key in ("embeddings and final norm", "layer 0")}
    rows = [measured(name, n, d, rounds) for name, n in chosen.items() for d in directions]
    return {"n": here.n, "groups": groups, "rounds": rounds, "rows": rows, "whole": whole(here.n, here.d, rounds)}


def measured(group: str, n: int, d: int, rounds: int) -> dict[str, Any]:
    """Return what a matrix of d × n held in memory costs, beside one drawn anew, for one gradient of a group."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    peak = peak_bytes(lambda: matrix(d, n) @ x)
    held, drawn = matrix(d, n), gs.Dense(n, d)
    seconds = interleaved_rounds({"held": lambda: held @ x, "drawn": lambda: drawn(x)}, rounds)
    times = {f"{name}_ms": median(each, 1e3) for name, each in seconds.items()}
    return {"group": group, "n": n, "d": d, "peak_bytes": peak, **times}


def matrix(d: int, n: int) -> Tensor:
    return torch.randn(d, n, generator=torch.Generator().manual_seed(1)) / d**0.5


def whole(n: int, d: int, rounds: int) -> dict[str, Any]:
    """Return what sketches of the whole gradient cost, with far more directions."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    maps: dict[str, gs.Sketch] = {"AFFD paper": gs.AFFD(n, d, form="paper"), "QK": gs.QK(n, d), "AFFD": gs.AFFD(n, d)}
    seconds = interleaved_rounds({name: lambda phi=phi: phi(x) for name, phi in maps.items()}, rounds)
    peaks = {name: peak_bytes(lambda phi=phi: phi(x)) for name, phi in maps.items()}
    return {"d": d, "ms": {name: median(each, 1e3) for name, each in seconds.items()}, "peak_bytes": peaks}


def show(results: Results) -> str:
    header = ["", "directions", "matrix held, ms", "memory, MB", "matrix drawn anew, ms"]
    rows = [
        [
            row["group"] + f", {row['n']:,}",
            row["d"],
            shown(row["held_ms"]),
            megabytes(row["peak_bytes"]),
            shown(row["drawn_ms"]),
        ]
        for row in results["rows"]
    ]
    found = results["whole"]
    rows += [
        [f"whole gradient, {results['n']:,}: {'**AFFD**' if kind == 'AFFD' else kind}", f"{found['d']:,}", shown(ms),
         megabytes(found["peak_bytes"][kind]), "–"]
        for kind, ms in found["ms"].items()
    ]  # fmt: skip
    fits = V100 // (4 * GPT2)
    return (
        f"[P] finds about {PAPER_MS} ms for {PAPER_LIMIT} directions a layer of GPT-2 on a V100 and no memory for more "
        f"({PAPER_LIMIT_EMBEDDING} for the embeddings); {results['rounds']} rounds here.\n\n{table(header, rows)}\n\n"
        f"A dense matrix takes four bytes for every parameter and direction. So for all of GPT-2's {GPT2:,} "
        f"parameters {fits} "
        f"directions fill the 16 GB of a V100, and {found['d']:,} directions would take "
        f"{4 * GPT2 * found['d'] / 1e12:.2f} TB. "
        "[P]'s finding holds, for it is arithmetic: what a dense matrix costs grows with the number of "
        "directions, and the "
        f"whole gradient in {found['d']:,} structured directions takes {shown(found['ms']['AFFD'])} ms."
    )


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"


def short(results: Results) -> tuple[str, str]:
    found = results["whole"]
    dense = results["rows"][-1]
    return (
        f"dense: at most {PAPER_LIMIT} directions a layer",
        f"{dense['d']} dense directions of one layer {shown(dense['held_ms']['value'])} ms; AFFD, {found['d']:,} "
        "of the whole "
        f"gradient, {shown(found['ms']['AFFD']['value'])} ms",
    )


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    figure, (axes,) = style.new()
    groups = list(dict.fromkeys(row["group"] for row in results["rows"]))
    for group, look in style.styles(groups).items():
        rows = [row for row in results["rows"] if row["group"] == group]
        style.series(
            axes, [row["d"] for row in rows], [row["held_ms"] for row in rows], look | {"label": f"{group}, dense"}
        )
    look = style.styles([*groups, "whole"])["whole"] | {"label": "whole gradient, AFFD"}
    style.series(axes, [results["whole"]["d"]], [results["whole"]["ms"]["AFFD"]], look)
    axes.set(xlabel="directions", ylabel="ms", yscale="log")
    axes.set_xscale("log", base=2)
    return style.finished(figure, legend=axes)


TABLE = Table(
    "table02_dense_per_layer",
    "Table 2: dense projections of single layers",
    "a GPT-2 of random weights with a smaller embedding, on a CPU.",
    2,
    run,
    show,
    short,
    draw,
)
