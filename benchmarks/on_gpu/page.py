"""The page of a run: every section's rows as a table, in Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["text"]

TITLES = {
    "machine": "Machine",
    "tests": "pytest -m gpu",
    "kernels": "Sketches of one vector beside a copy of it",
    "w1": "W1: GPT-2 of 6.9 M parameters, float32",
    "gpt2-small": "GPT-2 small, bfloat16",
    "llama-1b": "A Llama of 1.1 B parameters, bfloat16",
    "curvature": "Curvature products of W1",
    "query": "Queries",
}


def text(record: dict[str, Any]) -> str:
    """Return the page of what a run has kept."""
    about = record["environment"]
    device = about["gpu"] or "the CPU: no measurement, a trial of the script"
    head = f"# On a GPU\n\n{about['date']}, commit {about['commit']}, torch {about['torch']}, {device}."
    return "\n\n".join([head, *(_section(name, found) for name, found in record["results"].items())]) + "\n"


def _section(name: str, found: dict[str, Any]) -> str:
    parts = [f"## {TITLES.get(name, name)}"]
    if found["ended"] != "done":
        parts.append(f"**Not whole: {found['ended']}.**")
    if found["rows"]:
        parts.append(_table(found["rows"]))
    return "\n\n".join([*parts, f"<small>{found['seconds']:.0f} s</small>"])


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_shown(key, row[key]) if key in row else "" for key in columns] for row in rows]
    table = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _shown(key: str, value: Any) -> str:
    if key == "bytes_a_second":
        return f"{value / 1e9:.4g} GB/s"
    if key.endswith("_s") or key == "seconds":
        return f"{value * 1e3:.4g} ms"
    if "share" in key:
        return f"{value:.0%}"
    if key in ("peak", "memory") and value is not None:
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, list):
        return "<br>".join(str(each).replace("|", "\\|") for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
