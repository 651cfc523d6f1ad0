"""Tables 3 and 8: time and memory of a sketched gradient by each kind and transform, explicit and implicit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.paper.costs import KINDS, measured, milliseconds, named, times_plain
from benchmarks.paper.numbers import ratio, shown, table
from benchmarks.paper.table import Results, Size, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# GPT-2 on a V100: milliseconds and gigabytes; TPUv2: milliseconds.
PAPER = {
    "FJL": (123, 6.9, 8997),
    "AFFD H": (205, 3.2, 134),
    "FFD": (197, 4.1, 8694),
    "AFJL H": (116, 2.9, 89),
    "QK": (82, 1.7, 64),
}


def run(size: Size) -> Results:
    return measured(size, "gradient")


def kinds_of(results: Results) -> list[str]:
    return [kind for kind in KINDS if f"{kind} explicit" in results["seconds"]]


def show(results: Results) -> str:
    peaks = results["peak_vectors"]
    header = [
        "",
        "explicit, ms",
        "× a plain gradient",
        "peak, n-vectors",
        "implicit, ms",
        "peak",
        "[P] V100 ms, GB, TPUv2 ms",
    ]
    rows = [["a plain gradient", shown(milliseconds(results, "plain")), "1", shown(peaks["plain"], ".1f"),
             "", "", ""]]  # fmt: skip
    for kind in kinds_of(results):
        explicit, implicit = (f"{kind} {way}" for way in ("explicit", "implicit"))
        rows.append(
            [
                named(kind),
                shown(milliseconds(results, explicit)),
                shown(times_plain(results, explicit), ".2f"),
                shown(results["peak_vectors"][explicit], ".1f"),
                shown(milliseconds(results, implicit)),
                shown(results["peak_vectors"][implicit], ".1f"),
                ", ".join(str(v) for v in PAPER[kind]) if kind in PAPER else "–",
            ]
        )
    return (
        f"The gradient of {results['n']:,} parameters on {' × '.join(map(str, results['tokens']))} tokens, to d = "
        f"{results['d']:,}; {results['rounds']} interleaved rounds; the forward and backward pass is in every "
        "number, and "
        f"memory is what a job needs beyond model and batch.\n\n{table(header, rows)}\n\n{_conclusion(results)}"
    )


def _conclusion(results: Results) -> str:
    def order(kinds: list[str], key: str) -> str:
        costs = {
            kind: milliseconds(results, f"{kind} explicit")["value"] if key == "time" else PAPER[kind][0]
            for kind in kinds
        }
        return " < ".join(sorted(costs, key=costs.__getitem__))

    ours = [kind for kind in PAPER if kind in kinds_of(results)]
    same = order(ours, "time") == order(ours, "paper")
    text = (
        f"Fastest first among [P]'s kinds: {order(ours, 'time')} here, {order(ours, 'paper')} on its V100"
        f"{', the same order' if same else ''}."
    )
    new = [kind for kind in ("AFFD", "AFJL", "SJLT", "BlockSum") if kind in kinds_of(results)]
    if new:
        quick = min(new, key=lambda kind: times_plain(results, f"{kind} explicit")["value"])
        best = min(ours, key=lambda kind: times_plain(results, f"{kind} explicit")["value"])
        beside = ratio(results["seconds"], f"{quick} explicit", f"{best} explicit")
        faster = "is faster" if beside["high"] < 1 else "is slower" if beside["low"] > 1 else "is not clearly faster"
        text += (
            f" The fastest form that is not in [P], {quick}, takes {shown(beside, '.2f')} of the time of the "
            "fastest of [P]'s, "
            f"{best}: it {faster}."
        )
    return text


def short(results: Results) -> tuple[str, str]:
    kinds = [kind for kind in ("QK", "AFJL H", "AFFD H", "AFFD") if kind in kinds_of(results)]
    here = ", ".join(f"{kind} {times_plain(results, f'{kind} explicit')['value']:.2f}" for kind in kinds)
    return "a sketched gradient on a V100: QK 82 ms, AFJL 116, AFFD 205", f"in plain gradients: {here}"


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    figure, axes = style.new(2, 4.0)
    kinds = kinds_of(results)
    for way, look in style.styles(["explicit", "implicit"]).items():
        look["linestyle"] = "none"
        style.series(axes[0], range(len(kinds)), [times_plain(results, f"{kind} {way}") for kind in kinds], look)
        peaks = [results["peak_vectors"][f"{kind} {way}"] or 0.0 for kind in kinds]
        axes[1].plot(range(len(kinds)), peaks, **look)
    for axis, label in zip(axes, ("time, plain gradients", "peak memory, vectors of n numbers"), strict=True):
        axis.set_xticks(range(len(kinds)), kinds, rotation=60, fontsize=8, ha="right", rotation_mode="anchor")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    return style.finished(figure, legend=axes[0])


TABLE = Table(
    "table03_table08_gradients",
    "Tables 3 and 8: time and memory of a sketched gradient",
    "a GPT-2 with random weights on two CPU cores, where [P] has GPT-2 on a V100 and a TPUv2. H, Q and FFT are the "
    "transforms of [P]'s forms.",
    2,
    run,
    show,
    short,
    draw,
)
