"""One JSON for each table and size: where it was measured, by which script, and whether that is so still."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import record

from benchmarks.paper.table import Size, Table

__all__ = ["fingerprint", "is_done", "kept", "measured", "path"]

PICTURES = Path(__file__).parents[2] / "docs" / "images" / "paper"


def path(table: Table, size: Size) -> Path:
    """Return where the JSON of a table stands."""
    return record.RESULTS / "paper" / f"{_stem(table, size)}.json"


def kept(table: Table) -> dict[str, Any] | None:
    """Return the JSON of the largest size that has been run, or None."""
    sizes: tuple[Size, ...] = ("full", "quick")
    files = [path(table, size) for size in sizes if path(table, size).exists()]
    return json.loads(files[0].read_text(encoding="utf-8")) if files else None


def is_done(table: Table, size: Size) -> bool:
    """Whether the JSON there was made by this very script at this size, on whatever commit."""
    file = path(table, size)
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["fingerprint"] == fingerprint(table, size)


def measured(table: Table, size: Size) -> Path:
    """Run a table and write its JSON."""
    start, before = time.perf_counter(), _load()
    results = table.run(size)
    about = {
        "size": size,
        "fingerprint": fingerprint(table, size),
        "seconds": round(time.perf_counter() - start, 1),
        "load_average": {"before": before, "after": _load()},
    }
    return record.write(f"paper/{_stem(table, size)}", results, **about)


def fingerprint(table: Table, size: Size) -> str:
    """Return a hash of the size and of what ``run`` uses of its script: how results are shown does not matter."""
    tree = ast.parse(inspect.getsource(sys.modules[table.run.__module__]))
    parts: dict[str, ast.stmt] = {}
    for node in tree.body:
        parts |= dict.fromkeys(_defined(node), node)
    used, waiting = [], [table.run.__name__]
    while waiting:
        node = parts.pop(waiting.pop(), None)
        if node is not None:
            used.append(ast.unparse(node))
            waiting += sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name)})
    return hashlib.sha256("\n".join([size, *used]).encode()).hexdigest()[:16]


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module gives a value."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _load() -> float | None:
    """Return how many processes wanted to run in the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _stem(table: Table, size: Size) -> str:
    return table.name if size == "full" else f"{table.name}_{size}"
