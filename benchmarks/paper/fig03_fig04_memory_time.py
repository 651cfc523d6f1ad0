"""Figures 3 and 4: FJL's memory and time grow with the sketch size; those of the fold kinds do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from record import interleaved_rounds, peak_bytes
from sketch_speed import DEVICE, sketch

from benchmarks.paper.numbers import median, shown, slope, table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("FJL", "AFJL paper", "AFFD paper", "QK", "AFJL", "AFFD", "SJLT")
NEW = ("AFJL", "AFFD", "SJLT")
ENOUGH = 30.0  # seconds of a single call; a kind that takes longer is not tried at a larger d


def run(size: Size) -> Results:
    log_n, log_ds, rounds = pick(size, (12, (6, 8), 1), (20, (8, 12, 16), 3), (24, (8, 10, 12, 14, 16, 18, 20, 22), 3))
    x = torch.randn(1 << log_n, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    rows: list[dict[str, Any]] = []
    for log_d in log_ds:
        for kind in KINDS if size != "tiny" else ("FJL", "AFFD"):
            before = [row for row in rows if row["kind"] == kind]
            if before and 4 * before[-1]["sketch_ms"]["value"] > 1e3 * ENOUGH and slow(before):
                continue
            rows.append(measured(kind, x, log_d, rounds))
    return {"log2_n": log_n, "log2_ds": list(log_ds), "rounds": rounds, "rows": rows}


def slow(rows: list[dict[str, Any]]) -> bool:
    """Whether a kind has grown with d."""
    return len(rows) > 1 and rows[-1]["sketch_ms"]["value"] > 1.5 * rows[-2]["sketch_ms"]["value"]


def measured(kind: str, x: torch.Tensor, log_d: int, rounds: int) -> dict[str, Any]:
    """Return the time of a sketch and of a lift, and the memory of both when fresh, the sketch's own included."""
    phi, w = sketch(kind, len(x), 1 << log_d), torch.randn(1 << log_d, device=x.device)
    seconds = interleaved_rounds({"sketch": lambda: phi(x), "lift": lambda: phi.lift(w)}, rounds)
    return {
        "kind": kind,
        "log2_d": log_d,
        "sketch_ms": median(seconds["sketch"], 1e3),
        "lift_ms": median(seconds["lift"], 1e3),
        "peak_vectors": vectors(kind, x, log_d, lambda phi: phi(x)),
        "lift_peak_vectors": vectors(kind, x, log_d, lambda phi: phi.lift(w)),
    }


def vectors(kind: str, x: torch.Tensor, log_d: int, use: Any) -> float | None:
    peak = peak_bytes(lambda: use(sketch(kind, len(x), 1 << log_d)))
    return None if peak is None else peak / 4 / len(x)


def _of(results: Results, kind: str) -> dict[int, dict[str, Any]]:
    return {row["log2_d"]: row for row in results["rows"] if row["kind"] == kind}


def show(results: Results) -> str:
    log_ds, kinds = results["log2_ds"], list(dict.fromkeys(row["kind"] for row in results["rows"]))
    parts = []
    for key, title in (("sketch_ms", "time of a sketch, ms"), ("peak_vectors", "peak memory, vectors of n numbers")):
        header = [title, *(f"d = 2^{k}" for k in log_ds)]
        body = [
            [f"**{kind}**" if kind in NEW else kind]
            + [shown(row[key]) if (row := _of(results, kind).get(k)) else "too slow" for k in log_ds]
            for kind in kinds
        ]
        parts.append(table(header, body))
    return (
        f"n = 2^{results['log2_n']}, {results['rounds']} rounds; the memory is that of a fresh sketch and its "
        "first call, "
        f"beside the input.\n\n" + "\n\n".join(parts) + "\n\n" + _conclusion(results, kinds)
    )


def _conclusion(results: Results, kinds: list[str]) -> str:
    powers = {kind: power(results, kind) for kind in kinds}
    flat = [kind for kind in kinds if kind != "FJL" and powers[kind] < 0.2]
    growing = ", ".join(f"{kind} ({powers[kind]:.2f})" for kind in kinds if kind != "FJL" and kind not in flat)
    holds = "holds" if powers["FJL"] > 0.2 and {"AFJL paper", "AFJL"} & {*flat} else "does not hold"
    last = max(_of(results, "FJL"))
    memory = [f"{kind} {shown(row['peak_vectors'])}" for kind in kinds if (row := _of(results, kind).get(last))]
    reached = results["log2_ds"][-1]
    end = "" if last == reached else f" Beyond d = 2^{last} FJL was too slow to be tried."
    return (
        f"For time [P]'s finding {holds}: over the larger half of the sizes FJL grows with d to the power "
        f"{powers['FJL']:.2f}; flat (below 0.2) are "
        f"{', '.join(flat) or 'none'}{'; growing ' + growing if growing else ''}. "
        f"Vectors of memory at d = 2^{last}: {', '.join(memory)}. In [P], FJL runs out of memory beyond d = 2^20.{end}"
    )


def power(results: Results, kind: str) -> float:
    rows = _of(results, kind)
    upper = sorted(rows)[len(rows) // 2 - 1 :]
    return slope([2.0**k for k in upper], [rows[k]["sketch_ms"]["value"] for k in upper])


def short(results: Results) -> tuple[str, str]:
    return (
        "FJL's time and memory grow with d, AFJL's do not",
        f"time ∝ d^{power(results, 'FJL'):.2f} for FJL, d^{power(results, 'AFFD'):.2f} for AFFD",
    )


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    figure, axes = style.new(2, 3.8)
    for kind, look in style.styles(KINDS).items():
        rows = _of(results, kind)
        if not rows:
            continue
        d = [2**k for k in rows]
        style.series(axes[0], d, [row["sketch_ms"] for row in rows.values()], look)
        axes[1].plot(d, [row["peak_vectors"] or 0.0 for row in rows.values()], **look)
    axes[0].set_yscale("log")
    for axis, label in zip(axes, ("ms of a sketch", "peak memory, vectors of n numbers"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="sketch size d", ylabel=label)
    return style.finished(figure, legend=axes[0])


TABLE = Table(
    "fig03_fig04_memory_time",
    "Figures 3 and 4: memory and time over the sketch size",
    "one random vector on a CPU; [P] has the gradient of GPT-2 on a V100.",
    8,
    run,
    show,
    short,
    draw,
)
