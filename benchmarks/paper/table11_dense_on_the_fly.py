"""Table 11 and Figure 7: a dense projection drawn on the fly takes time in proportion to d; structured kinds do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from record import interleaved_rounds
from sketch_speed import DEVICE, sketch

import gradsketch as gs
from benchmarks.paper.numbers import median, shown, slope, table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = {  # milliseconds by log2 d
    "Dense gaussian": {12: 359, 14: 1078, 16: 3969, 18: 15500},
    "AFFD paper": {12: 213, 14: 207, 16: 219, 18: 209},
    "QK": {12: 84, 14: 91, 16: 82, 18: 90},
}
KINDS = ("AFFD paper", "AFJL paper", "QK", "AFFD", "AFJL", "SJLT")
NEW = ("AFFD", "AFJL", "SJLT", "Dense rademacher")


def run(size: Size) -> Results:
    log_n, log_ds, rounds = pick(size, (10, (4, 6), 1), (16, (6, 8, 10), 3), (20, (6, 8, 10, 12), 5))
    x = torch.randn(1 << log_n, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    rows = [{"log2_d": log_d, "ms": milliseconds(x, 1 << log_d, rounds)} for log_d in log_ds]
    powers = {
        name: slope([2.0 ** row["log2_d"] for row in rows], [row["ms"][name]["value"] for row in rows])
        for name in rows[0]["ms"]
    }
    return {"log2_n": log_n, "rounds": rounds, "rows": rows, "power_of_d": powers}


def milliseconds(x: torch.Tensor, d: int, rounds: int) -> dict[str, Any]:
    maps = {name: sketch(name, len(x), d) for name in KINDS}
    maps |= {
        f"Dense {distribution}": gs.Dense(len(x), d, distribution=distribution)
        for distribution in ("gaussian", "rademacher")
    }
    seconds = interleaved_rounds({name: lambda phi=phi: phi(x) for name, phi in maps.items()}, rounds)
    return {name: median(each, 1e3) for name, each in seconds.items()}


def show(results: Results) -> str:
    rows, names = results["rows"], list(results["power_of_d"])
    header = ["ms", *(f"d = 2^{row['log2_d']}" for row in rows), "time ∝ d to the power", "the same in [P]"]
    body = [
        [
            f"**{name}**" if name in NEW else name,
            *(shown(row["ms"][name]) for row in rows),
            power(results["power_of_d"][name]),
            power(paper_power(name)),
        ]
        for name in names
    ]
    last = rows[-1]["ms"]
    dense, flat = results["power_of_d"]["Dense gaussian"], results["power_of_d"]["AFFD paper"]
    times = last["Dense gaussian"]["value"] / last["AFFD paper"]["value"]
    fast = last["AFFD paper"]["value"] / last["AFFD"]["value"]
    paper = PAPER["Dense gaussian"][18] / PAPER["AFFD paper"][18]
    holds = "holds" if dense > 0.8 and flat < 0.2 else "does not hold"
    return (
        f"One vector of 2^{results['log2_n']} float32 numbers, {results['rounds']} interleaved rounds.\n\n"
        f"{table(header, body)}\n\n"
        f"[P]'s finding {holds}: the dense projection grows with d to the power {dense:.2f}, AFFD in [P]'s form with "
        f"{flat:.2f}. At d = 2^{rows[-1]['log2_d']} the dense projection takes {times:.0f} times as long as AFFD "
        "([P], at "
        f"2^18: {paper:.0f}). The local AFFD is {fast:.1f} times as fast as [P]'s form. A dense Rademacher matrix is "
        f"{last['Dense gaussian']['value'] / last['Dense rademacher']['value']:.1f} times as fast as a Gaussian "
        "one and "
        "just as linear in d."
    )


def power(number: float | None) -> str:
    return "–" if number is None else f"{round(number, 2) + 0.0:.2f}"  # never −0.00


def paper_power(name: str) -> float | None:
    numbers = PAPER.get(name)
    return None if numbers is None else slope([2.0**k for k in numbers], list(numbers.values()))


def short(results: Results) -> tuple[str, str]:
    found = results["power_of_d"]
    return (
        f"time ∝ d^{power(paper_power('Dense gaussian'))} for dense, d^{power(paper_power('AFFD paper'))} for AFFD",
        f"d^{power(found['Dense gaussian'])} and d^{power(found['AFFD paper'])}",
    )


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    figure, (axes,) = style.new()
    looks = style.styles(list(results["power_of_d"]))
    for name, look in looks.items():
        d = [2 ** row["log2_d"] for row in results["rows"]]
        style.series(axes, d, [row["ms"][name] for row in results["rows"]], look)
    axes.set(xlabel="sketch size d", ylabel=f"ms, n = 2^{results['log2_n']}", yscale="log")
    axes.set_xscale("log", base=2)
    return style.finished(figure, legend=axes)


TABLE = Table(
    "table11_dense_on_the_fly",
    "Table 11 and Figure 7: dense on the fly is linear in d, structured sketches are flat",
    "a shorter vector and smaller d, because a dense projection of [P]'s size takes hours on a CPU; [P] timed a CUDA "
    "kernel on a gradient of GPT-2, here it is the sketch alone.",
    11,
    run,
    show,
    short,
    draw,
)
