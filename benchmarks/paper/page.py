"""docs/results.md and the summary in README.md, made from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper import kept
from benchmarks.paper.numbers import table
from benchmarks.paper.registry import TABLES
from benchmarks.paper.table import Table
from gradsketch.durable import write_file, written_whole

__all__ = ["PAGE", "README", "summary", "text", "with_summary", "write"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
_BEGIN, _END = "<!-- paper: made by python -m benchmarks.paper --page -->", "<!-- end of paper -->"
_HEAD = """# The paper, table by table

<!-- Made by `python -m benchmarks.paper --page` from benchmarks/results/paper. Do not edit by hand. -->

What A. Schioppa, *Efficient Sketches for Training Data Attribution and Studying the Loss Landscape* (NeurIPS 2024,
arXiv 2402.03994; [P] below) reports, and what comes out here. The models and the hardware differ: [P] measured GPT-2,
RoBERTa and BART on a V100 and on TPUs. So compare forms and ratios, not milliseconds. Numbers in brackets are
intervals: the range over rounds for times and over seeds for r at the largest d and for eigenvalue errors; 95 % for
other correlations and for proportions; what the eigenvalues' errors leave open for R_NEG. Kinds in bold are not in [P].

`python -m benchmarks.paper --all` makes all of it anew, `--quick` in small, `--device cuda` on a GPU, and
`python -m benchmarks.paper NAME` one table.
"""


def write() -> Path:
    """Draw the pictures, write the page, and return its path."""
    for each in TABLES.values():
        record = kept.kept(each)
        if record is not None and each.draw is not None:
            figure = each.draw(record["results"])
            with written_whole(picture(each)) as file:
                figure.savefig(file, dpi=130, format="png")
    write_file(PAGE, text())
    write_file(README, with_summary(README.read_text(encoding="utf-8")))
    return PAGE


def text() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *(section(each, kept.kept(each)) for each in TABLES.values())])


def summary() -> str:
    """Return one line for each table that has been run."""
    rows = []
    for each in TABLES.values():
        record = kept.kept(each)
        if record is not None:
            paper, here = each.short(record["results"])
            size = "" if record["size"] == "full" else " (in small)"
            rows.append([each.title.split(":")[0] + size, paper, here])
    return table(["", "[P]", "here"], rows).replace("---:", "---")


def with_summary(readme: str) -> str:
    """Return the README with the summary in its place."""
    before, rest = readme.split(_BEGIN)
    return f"{before}{_BEGIN}\n{summary()}\n{_END}{rest.split(_END)[1]}"


def section(each: Table, record: dict[str, Any] | None) -> str:
    """Return what the page says about one table."""
    if record is None:
        return f"## {each.title}\n\nNot run yet: `python -m benchmarks.paper {each.name}`.\n"
    parts = [f"## {each.title}", f"*What differs:* {each.differs}", each.show(record["results"])]
    if each.draw is not None:
        parts.append(f"![{each.title}](images/paper/{each.name}.png)")
    return "\n\n".join([*parts, f"<small>{_source(each, record)}</small>"]) + "\n"


def picture(each: Table) -> Path:
    """Return where the picture of a table stands."""
    return kept.PICTURES / f"{each.name}.png"


def _source(each: Table, record: dict[str, Any]) -> str:
    about, load = record["environment"], record["load_average"]
    device = about["gpu"] or f"{about['processor']}, {about['threads']} thread{'s' * (about['threads'] > 1)}"
    busy = f", load average {load['before']} – {load['after']}" if load["before"] is not None else ""
    size = "" if record["size"] == "full" else f", the {record['size']} size"
    file = kept.path(each, record["size"]).relative_to(ROOT)
    return (
        f"`{file}`{size}: {about['date']}, commit {about['commit']}, torch {about['torch']}, {device}{busy}, "
        f"{record['seconds']:.0f} s."
    )
