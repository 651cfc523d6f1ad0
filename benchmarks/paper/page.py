"""docs/results.md and the summary in README.md, made from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper import kept
from benchmarks.paper.registry import TABLES
from benchmarks.paper.table import Table

from gradsketch.durable import write_file, written_whole

__all__ = ["PAGE", "text", "write"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
_HEAD = """# The paper, table by table

<!-- Made by `python -m benchmarks.paper --page` from benchmarks/results/paper. Do not edit by hand. -->

What A. Schioppa, *Efficient Sketches for Training Data Attribution and Studying the Loss Landscape* (NeurIPS 2024,
arXiv 2402.03994; [P] below) reports, and what comes out here. The models and the hardware differ: [P] measured GPT-2,
RoBERTa and BART on a V100 and on TPUs. So compare forms and ratios, not milliseconds. Numbers in brackets are
intervals: the range over rounds for times, 95 % otherwise. Kinds in bold are not in [P].

`python -m benchmarks.paper --all` makes all of it anew, `--quick` in small, `--device cuda` on a GPU, and
`python -m benchmarks.paper NAME` one table.
"""


def write() -> Path:
    """Draw the pictures, write the page, and return its path."""
    for table in TABLES.values():
        record = kept.kept(table)
        if record is not None and table.draw is not None:
            figure = table.draw(record["results"])
            with written_whole(picture(table)) as file:
                figure.savefig(file, dpi=130, format="png")
    write_file(PAGE, text())
    return PAGE


def text() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *(section(table, kept.kept(table)) for table in TABLES.values())])


def section(table: Table, record: dict[str, Any] | None) -> str:
    """Return what the page says about one table."""
    if record is None:
        return f"## {table.title}\n\nNot run yet: `python -m benchmarks.paper {table.name}`.\n"
    parts = [f"## {table.title}", f"*What differs:* {table.differs}", table.show(record["results"])]
    if table.draw is not None:
        parts.append(f"![{table.title}](images/paper/{table.name}.png)")
    return "\n\n".join([*parts, f"<small>{_source(table, record)}</small>"]) + "\n"


def picture(table: Table) -> Path:
    return kept.PICTURES / f"{table.name}.png"


def _source(table: Table, record: dict[str, Any]) -> str:
    about, load = record["environment"], record["load_average"]
    device = about["gpu"] or f"{about['processor']}, {about['threads']} threads"
    busy = f", load average {load['before']} – {load['after']}" if load["before"] is not None else ""
    size = "" if record["size"] == "full" else f", the {record['size']} size"
    file = kept.path(table, record["size"]).relative_to(ROOT)
    return (
        f"`{file}`{size}: {about['date']}, commit {about['commit']}, torch {about['torch']}, {device}{busy}, "
        f"{record['seconds']:.0f} s."
    )
