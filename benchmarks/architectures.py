"""Per-example gradient sketches on every architecture transformers builds: right? fast? which parameters slow, and why?

    python benchmarks/architectures.py [--group causal …] [--only causal/llama …] [--jobs 1] [--limit 120] [--resume]

Tiny random models, in float64 where they can, against autograd on one row alone. Each runs in a process of its own, so
that a crash costs one row. Results are written as they come: ``--resume`` measures what an interrupted run left,
``--group`` and ``--only`` measure those again and keep the other rows. Writes results/architectures.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from architectures.measure import Measured
from architectures.survey import survey
from architectures.table import Totals, reasons, table
from architectures.zoo import GROUPS, Architecture, architectures

NAME = "architectures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as causal/llama, or llama for all its heads")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds a model may take")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    arguments = parser.parse_args()
    known = architectures()
    chosen = [one for one in known.values() if wanted(one, arguments.group, arguments.only)]
    everything = len(chosen) == len(known)
    rows = {} if everything and not arguments.resume else {n: row for n, row in earlier().items() if n in known}
    if arguments.resume:
        chosen = [one for one in chosen if one.name not in rows]
    for found in survey(chosen, jobs=arguments.jobs, limit=arguments.limit):
        rows[found.name] = found
        path = record(rows)
        print(f"{len(rows):>4}  {found.name:<40} {found.outcome:<8} {found.fast_share:>6.1%} fast", flush=True)
    print(table(rows.values()))
    print(f"written to {path if chosen else RESULTS / f'{NAME}.json'}")


def wanted(one: Architecture, groups: list[str], names: list[str] | None) -> bool:
    """Whether an architecture was asked for."""
    return one.group in groups and (names is None or bool({one.name, one.model_type} & {*names}))


def earlier() -> dict[str, Measured]:
    """Return what the file holds."""
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["results"]["architectures"] if path.exists() else []
    return {row["name"]: Measured(**row) for row in rows}


def record(rows: dict[str, Measured]) -> Path:
    """Write the table with its totals."""
    found = [rows[name] for name in sorted(rows)]
    results: dict[str, Any] = {"totals": Totals.of(found).to_dict(), "slow_because": reasons(found)}
    return write(NAME, {**results, "architectures": [one.to_dict() for one in found]})


if __name__ == "__main__":
    main()
