"""Table 10: the intrinsic dimension of a classification and a generation task, by kind of subspace and seed."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import record
import subspace_kinds

import gradsketch as gs
from benchmarks.paper.numbers import table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# log2 d of three seeds: SNLI, accuracy; XSUM, Rouge-1.
PAPER = {
    "FFD": ((14, 13, 13), (26, 25, 25)),
    "AFJL": ((14, 13, 13), (24, 24, 25)),
    "QK": ((13, 13, 13), (26, 25, 26)),
}
GENERATION, CLASSIFICATION = "generation", "classification"


def run(size: Size) -> Results:
    seeds = tuple(range(pick(size, 1, 2, 3)))
    kinds: tuple[str, ...] = pick(size, ("AFFD",), ("AFJL", "AFFD"), subspace_kinds.KINDS)
    results: Results = {
        "seeds": len(seeds),
        "tasks": {CLASSIFICATION: digits(kinds, seeds, *pick(size, (0.2, 20), (0.9, 500), (0.9, 500)))},
    }
    if size != "tiny":
        results["tasks"][GENERATION] = facts(kinds, seeds, pick(size, 4, 4, 1))
        results["real_weights"] = real_weights()
    return results


def digits(kinds: tuple[str, ...], seeds: tuple[int, ...], share: float, steps: int) -> Results:
    common = subspace_kinds.on_digits()
    full = gs.fine_tune(*common, steps=steps, lr=1e-3, batch_size=64)
    found = {kind: subspace_kinds.searched(common, kind, full.value, seeds, share) for kind in kinds}
    rows = {kind: subspace_kinds.row(result) for kind, result in found.items()}
    return {
        "what": f"a perceptron on 8 × 8 digits, {share:.0%} of the accuracy",
        "n": full.d,
        "full": full.value,
        "kinds": rows,
    }


def facts(kinds: tuple[str, ...], seeds: tuple[int, ...], fewer: int) -> Results:
    """A small language model that knows the one half of its facts learns rows of the other by heart."""
    import facts_lm

    rows = facts_lm.facts()[0]
    half = len(rows) // 2
    model, _ = facts_lm.trained(list(range(half)))
    new = rows[half :: 2 * fewer]
    loss = gs.Loss(facts_lm.TASK, new, batch_size=50)
    common = (model, facts_lm.TASK, new, loss)
    start = float(loss(model))
    full = gs.fine_tune(*common, steps=200, lr=1e-3, batch_size=16)
    found = {}
    for kind in kinds:
        result = gs.intrinsic_dimension(
            *common, target=start + 0.9 * (full.value - start), full=full.value, sketch=getattr(gs, kind), d_min=64,
            d_max=1 << 16, check_every=20, lr=2e-3, batch_size=16, seeds=seeds, progress=False,
        )  # fmt: skip
        found[kind] = subspace_kinds.row(result)
        print(kind, result, flush=True)
    what = f"a language model of a million parameters learns {len(new)} facts, 90 % of what the loss gains"
    return {"what": what, "n": full.d, "start": start, "full": full.value, "kinds": found}


def real_weights() -> list[dict[str, Any]]:
    """Return what benchmarks/intrinsic_dimension.py found with real weights, three seeds of AFFD."""
    rows = []
    for name, what in (("spam", "MiniLM, spam or ham"), ("countries", "SmolLM2-135M, last 8 layers, facts")):
        file = record.RESULTS / f"intrinsic_dimension_{name}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))["results"][name]
            rows += [
                {"what": what, "file": file.name, "target": target, "n": found["n"], "d": each["d"]}
                for target, each in found["found"].items()
            ]
    return rows


def logarithms(dims: list[int | None]) -> str:
    return ", ".join("not reached" if d is None else f"{math.log2(d):g}" for d in dims)


def show(results: Results) -> str:
    tasks = results["tasks"]
    kinds = list(dict.fromkeys(kind for task in tasks.values() for kind in task["kinds"]))
    header = ["log2 d of each seed", *tasks, "[P] SNLI, accuracy", "[P] XSUM, Rouge-1"]
    rows = []
    for kind in kinds:
        cells = [logarithms(task["kinds"][kind]["d"]) if kind in task["kinds"] else "–" for task in tasks.values()]
        paper = [", ".join(map(str, seeds)) for seeds in PAPER[kind]] if kind in PAPER else ["–", "–"]
        rows.append([f"**{kind}**" if kind not in PAPER else kind, *cells, *paper])
    about = "; ".join(f"{name}: {task['what']} (n = {task['n']:,})" for name, task in tasks.items())
    parts = [f"{about[0].upper()}{about[1:]}.\n\n{table(header, rows)}", _conclusion(tasks)]
    if real := results.get("real_weights"):
        lines = [
            [f"{r['what']}, 90 % of the {r['target']}", f"{r['n']:,}", logarithms(r["d"]), f"`{r['file']}`"]
            for r in real
        ]
        parts.append("With real weights, AFFD:\n\n" + table(["", "n", "log2 d of each seed", "from"], lines))
        parts.append(_generation(real))
    parts.append(
        "[P]'s finding that no proper subspace is enough for Rouge-2 on XSUM is not tried: no such data ships in "
        "a package."
    )
    return "\n\n".join(parts)


def _conclusion(tasks: Results) -> str:
    lines = []
    for name, task in tasks.items():
        found = [d for row in task["kinds"].values() for d in row["d"]]
        reached = [d for d in found if d is not None]
        if not reached:
            lines.append(f"{name.capitalize()}: no search reached its target.")
            continue
        factor = max(reached) / min(reached)
        missed = (
            f"; {len(found) - len(reached)} of {len(found)} searches did not reach it"
            if len(reached) < len(found)
            else ""
        )
        lines.append(
            f"{name.capitalize()}: kinds and seeds agree within a factor of {factor:g} (in [P] 2 and 4){missed}."
        )
    return " ".join(lines)


def _generation(real: list[dict[str, Any]]) -> str:
    """Return how the two tasks' shares of the parameters compare, over the searches that reached 90 % of the gain."""
    found: dict[str, list[float]] = {}
    missed = 0
    for row in (row for row in real if row["target"] == "gain"):
        name = GENERATION if "facts" in row["what"] else CLASSIFICATION
        found[name] = [d / row["n"] for d in row["d"] if d is not None]
        missed += row["d"].count(None)
    if not found.get(GENERATION) or not found.get(CLASSIFICATION):
        return ""
    least = min(found[GENERATION]) / max(found[CLASSIFICATION])
    most = max(found[GENERATION]) / min(found[CLASSIFICATION])
    says = "the larger share, as in [P]" if least > 1 else "not clearly another share"
    return (
        f"Generation needs {says}: {least:.2g} to {most:.2g} times that of classification, over the seeds that "
        "reached 90 % of "
        f"the gain ({missed} did not). In [P] the gap is a factor of about 2^12 in d."
    )


def short(results: Results) -> tuple[str, str]:
    parts = []
    for name, task in results["tasks"].items():
        dims = [d for row in task["kinds"].values() for d in row["d"] if d is not None]
        parts.append(f"{name} {math.log2(min(dims)):g} – {math.log2(max(dims)):g}" if dims else f"{name} not reached")
    return "log2 of the intrinsic dimension: classification 13 – 14, generation 24 – 26", "; ".join(parts)


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    tasks = results["tasks"]
    figure, axes = style.new(max(2, len(tasks)), 3.4)
    for axis, (name, task) in zip(axes, tasks.items(), strict=False):
        kinds = list(task["kinds"])
        for place, (kind, look) in enumerate(style.styles(kinds).items()):
            dims = [d for d in task["kinds"][kind]["d"] if d is not None]
            axis.plot([place + 0.1 * i for i in range(len(dims))], dims, **look | {"linestyle": "none"})
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set_yscale("log", base=2)
        axis.set(title=name, ylabel="d, one mark a seed")
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    return style.finished(figure)


TABLE = Table(
    "table10_intrinsic_dimension",
    "Table 10: the intrinsic dimension, by kind and seed",
    "a perceptron and a language model of a million parameters in the place of RoBERTa on SNLI and BART on XSUM; "
    "with real "
    "weights only AFFD, from an earlier run.",
    13,
    run,
    show,
    short,
    draw,
)
