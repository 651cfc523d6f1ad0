"""Table 9: time and memory of a sketched Hessian-vector product by each kind and transform, explicit and implicit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.paper import table03_table08_gradients as gradients
from benchmarks.paper.costs import measured, milliseconds, named
from benchmarks.paper.numbers import ratio, shown, table
from benchmarks.paper.table import Results, Size, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Explicit, milliseconds on a V100.
PAPER = {
    "AFFD H": 397,
    "AFFD Q": 183,
    "AFFD FFT": 111,
    "AFJL H": 230,
    "AFJL Q": 121,
    "AFJL FFT": 92,
    "QK": 118,
}


def run(size: Size) -> Results:
    return measured(size, "product")


def show(results: Results) -> str:
    seconds, peaks = results["seconds"], results["peak_vectors"]
    header = [
        "",
        "explicit, ms",
        "× the product alone",
        "peak, n-vectors",
        "implicit, ms",
        "peak",
        "[P] explicit, V100 ms",
    ]
    rows = [
        [
            name,
            shown(milliseconds(results, job)),
            shown(ratio(seconds, job, "whole"), ".2f"),
            shown(peaks[job], ".1f"),
            "",
            "",
            "",
        ]
        for name, job in (("a plain gradient", "plain"), ("the product in R^n", "whole"))
    ]
    kinds = gradients.kinds_of(results)
    for kind in kinds:
        explicit, implicit = (f"{kind} {way}" for way in ("explicit", "implicit"))
        rows.append(
            [
                named(kind),
                shown(milliseconds(results, explicit)),
                shown(ratio(seconds, explicit, "whole"), ".2f"),
                shown(peaks[explicit], ".1f"),
                shown(milliseconds(results, implicit)),
                shown(peaks[implicit], ".1f"),
                str(PAPER.get(kind, "–")),
            ]
        )
    extra = {kind: ratio(seconds, f"{kind} explicit", "whole")["value"] for kind in kinds}
    least, most = min(extra, key=extra.__getitem__), max(extra, key=extra.__getitem__)
    return (
        f"One product with the Hessian of {results['n']:,} parameters on "
        f"{' × '.join(map(str, results['tokens']))} tokens in "
        f"two passes, from R^d to R^d, d = {results['d']:,}; {results['rounds']} interleaved rounds.\n\n"
        f"{table(header, rows)}\n\nSketching costs from {extra[least]:.2f} ({least}) to {extra[most]:.2f} "
        f"({most}) times the "
        f"product alone; a product is {ratio(seconds, 'whole', 'plain')['value']:.1f} plain "
        f"gradients."
        f"{_implicit(results, kinds)}{_transforms(results)}"
    )


def _implicit(results: Results, kinds: list[str]) -> str:
    """Return how the two ways compare."""
    over = {kind: ratio(results["seconds"], f"{kind} implicit", f"{kind} explicit")["value"] for kind in kinds}
    least, most = min(over, key=over.__getitem__), max(over, key=over.__getitem__)
    return (
        f" The implicit way takes {over[least]:.1f} ({least}) to {over[most]:.1f} ({most}) times as long as the "
        "explicit one, "
        "because a Subspace lifts anew in every pass of a product."
    )


def _transforms(results: Results) -> str:
    """Return how [P]'s transforms compare, where they were measured."""
    lines = []
    for kind in ("AFFD", "AFJL"):
        ours = {t: milliseconds(results, f"{kind} {t} explicit")["value"] for t in ("H", "Q", "FFT")
                if f"{kind} {t} explicit" in results["seconds"]}  # fmt: skip
        if len(ours) == 3:
            theirs = {t: PAPER[f"{kind} {t}"] for t in ours}
            here, there = (" < ".join(sorted(times, key=times.__getitem__)) for times in (ours, theirs))
            lines.append(f" {kind}'s transforms, fastest first: {here} here, {there} in [P].")
    return "".join(lines)


def short(results: Results) -> tuple[str, str]:
    kinds = [kind for kind in ("QK", "AFJL H", "AFFD H", "AFFD") if kind in gradients.kinds_of(results)]
    here = ", ".join(f"{kind} {ratio(results['seconds'], f'{kind} explicit', 'whole')['value']:.2f}" for kind in kinds)
    return "a sketched Hessian-vector product: QK 118 ms, AFJL 230, AFFD 397", f"over the product alone: {here}"


def draw(results: Results) -> Figure:
    figure = gradients.draw(results)
    figure.axes[0].set_ylabel("time, plain gradients of two passes")
    return figure


TABLE = Table(
    "table09_products",
    "Table 9: time and memory of a sketched Hessian-vector product",
    "as for Table 3; eager attention, and the graph is built anew for every product.",
    7,
    run,
    show,
    short,
    draw,
)
