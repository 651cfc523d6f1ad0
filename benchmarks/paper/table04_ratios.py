"""Table 4: how much faster the better choice is, explicit over implicit, and one transform over another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.paper.costs import measured
from benchmarks.paper.numbers import Interval, ratio, shown, table
from benchmarks.paper.table import Results, Size, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is compared, with which kinds: the slower job's name, the faster one's, and [P]'s ratio on a V100.
PAIRS: dict[str, tuple[str, str, float]] = {
    "FJL, implicit over explicit": ("FJL implicit", "FJL explicit", 1.96),
    "AFFD, implicit over explicit": ("AFFD H implicit", "AFFD H explicit", 1.81),
    "FFD, implicit over explicit": ("FFD implicit", "FFD explicit", 1.76),
    "AFJL, implicit over explicit": ("AFJL H implicit", "AFJL H explicit", 1.64),
    "QK, implicit over explicit": ("QK implicit", "QK explicit", 1.41),
    "AFFD, H over FFT": ("AFFD H explicit", "AFFD FFT explicit", 1.98),
    "AFJL, H over FFT": ("AFJL H explicit", "AFJL FFT explicit", 1.64),
    "AFFD, H over Q": ("AFFD H explicit", "AFFD Q explicit", 1.45),
    "AFJL, H over Q": ("AFJL H explicit", "AFJL Q explicit", 1.44),
}
NEW = {
    "**AFFD**, implicit over explicit": ("AFFD implicit", "AFFD explicit"),
    "AFFD H over **AFFD**": ("AFFD H explicit", "AFFD explicit"),
    "AFJL H over **AFJL**": ("AFJL H explicit", "AFJL explicit"),
}


def run(size: Size) -> Results:
    return measured(size, "gradient")


def ratios(results: Results) -> dict[str, Interval]:
    pairs = {**{name: pair[:2] for name, pair in PAIRS.items()}, **NEW}
    seconds: dict[str, Any] = results["seconds"]
    return {name: ratio(seconds, *pair) for name, pair in pairs.items() if set(pair) <= seconds.keys()}


def show(results: Results) -> str:
    found = ratios(results)
    rows = [
        [name, shown(value, ".2f"), shown(paper := PAIRS[name][2] if name in PAIRS else None), shown(
            None if paper is None else value["value"] / paper, ".2f")]
        for name, value in found.items()
    ]  # fmt: skip
    explicit = [value["value"] for name, value in found.items() if "implicit over" in name]
    fft = [value["value"] for name, value in found.items() if "over FFT" in name]
    faster = sum(value > 1 for value in explicit)
    text = f"Explicit is faster for {faster} of {len(explicit)} kinds here; in [P] for all of its own."
    if fft:
        way = "does" if min(fft) > 1 else "does not"
        text += (
            f" The FFT {way} beat the Hadamard transform on this machine; in [P] it does, by "
            f"{PAIRS['AFFD, H over FFT'][2]} for "
            "AFFD. The H here is gradsketch's own, in cache-sized pieces, and an FFT of real vectors must be repacked."
        )
    header = ["time of one over that of the other, gradients", "here", "[P], V100", "here over [P]"]
    return f"n = {results['n']:,}, d = {results['d']:,}, passes included.\n\n{table(header, rows)}\n\n{text}"


def short(results: Results) -> tuple[str, str]:
    found = ratios(results)
    here = [value["value"] for name, value in found.items() if "implicit over" in name and name in PAIRS]
    fft = found.get("AFFD, H over FFT")
    there = [pair[2] for name, pair in PAIRS.items() if "implicit over" in name]
    return (
        f"implicit over explicit {min(there)} – {max(there)}; H over FFT {PAIRS['AFFD, H over FFT'][2]}",
        f"{min(here):.2f} – {max(here):.2f}" + ("" if fft is None else f"; H over FFT {fft['value']:.2f}"),
    )


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    found = ratios(results)
    figure, (axes,) = style.new()
    looks = style.styles(["here", "[P], V100"])
    for look in looks.values():
        look["linestyle"] = "none"
    style.series(axes, range(len(found)), list(found.values()), looks["here"])
    paper = {place: PAIRS[name][2] for place, name in enumerate(found) if name in PAIRS}
    axes.plot(list(paper), list(paper.values()), **looks["[P], V100"])
    axes.axhline(1, color="black", linewidth=0.5)
    names = [name.replace("*", "") for name in found]
    axes.set_xticks(range(len(found)), names, rotation=60, fontsize=8, ha="right", rotation_mode="anchor")
    axes.set_ylabel("slower over faster")
    return style.finished(figure, legend=axes)


TABLE = Table(
    "table04_ratios",
    "Table 4: ratios of speed",
    "as for Table 3, whose rounds it shares where both are run. Each ratio is of two times in the same round.",
    2,
    run,
    show,
    short,
    draw,
)
