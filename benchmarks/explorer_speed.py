"""Does the explorer stay quick at a million rows? What its page asks, through the server, in milliseconds.

    python benchmarks/explorer_speed.py [--quick]

A stand-in index of 10^6 rows, d = 1,024, int8: every shard of the same random rows, texts, and two metadata columns.
Each answer is timed from the request to the last byte of its JSON, in one process, without a network. "first" is the
first time of its kind, "warm" the median of five later ones. A question's gradient is not timed: a stored row stands in
for it, because that cost is the model's.

Writes results/explorer_speed.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient
from record import write

from gradsketch.attribution.description import Description, StoredCheckpoint
from gradsketch.attribution.index import Index
from gradsketch.durable import write_file
from gradsketch.explorer.guard import place_of
from gradsketch.explorer.server import create_app
from gradsketch.explorer.session import Session
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, default_shard_rows

D, REPEATS, TOKEN = 1024, 5, "stand-in"
SOURCES = [f"source {i:02d}" for i in range(40)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^5 rows, written to no file")
    quick = parser.parse_args().quick
    folder = Path(tempfile.mkdtemp())
    try:
        results = measured(folder, 10**5 if quick else 10**6)
    finally:
        shutil.rmtree(folder)
    for name, timed in results["milliseconds"].items():
        print(f"{name:<34} first {timed['first']:>9.1f}   warm {timed['warm']:>8.1f}")
    if not quick:
        print(write("explorer_speed", results))


def measured(folder: Path, rows: int) -> dict[str, Any]:
    stand_in(folder, rows)
    began = time.perf_counter()
    session = Session(Index.open(folder))
    opened = time.perf_counter() - began
    page = Page(session)
    timed: dict[str, dict[str, float]] = {}
    for name, (path, body) in asked(rows).items():
        timed[name] = page.timed(path, body)
    nearest = page.ask("neighbours", {"row": 7, "score": "cosine"})
    timed["sources of all rows"] = page.timed("sources", {"answer": nearest["id"], "column": "source"})
    return {"rows": rows, "d": D, "dtype": "int8", "open_seconds": opened, "milliseconds": timed}


def asked(rows: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what is timed: a name, a path, and the body of the request."""
    where = {"source": [SOURCES[3]]}
    return {
        "about, with all columns": ("about", {}),
        "first page of rows": ("rows", {}),
        "page in the middle": ("rows", {"offset": rows // 2}),
        "rows of one source": ("rows", {"where": where}),
        "rows with words": ("rows", {"words": "square of 77"}),
        "rows by loss": ("rows", {"order": "loss"}),
        "ten nearest rows": ("neighbours", {"row": 7, "score": "cosine"}),
        "ten nearest rows of one source": ("neighbours", {"row": 7, "score": "cosine", "where": where}),
        "outliers by gradient": ("outliers", {"score": "dot"}),
        "outliers, a page in the middle": ("outliers", {"score": "dot", "offset": rows // 2}),
        "ten best rows by ridge": ("neighbours", {"row": 7, "score": "ridge"}),
    }


class Page:
    """The page's requests, and how long each takes."""

    def __init__(self, session: Session) -> None:
        self.client = TestClient(create_app(session, TOKEN), base_url="http://127.0.0.1:8000")
        self.client.cookies.set("gradsketch", TOKEN)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        place = f"{place_of(TOKEN)}api/{path}"
        headers = {"origin": "http://127.0.0.1:8000"}
        answer = self.client.get(place) if path == "about" else self.client.post(place, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def timed(self, path: str, body: dict[str, Any]) -> dict[str, float]:
        seconds = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            self.ask(path, body)
            seconds.append(time.perf_counter() - began)
        return {"first": 1e3 * seconds[0], "warm": 1e3 * statistics.median(seconds[1:])}


def stand_in(folder: Path, rows: int) -> None:
    """Write an index of random rows."""
    manifest = Manifest(d=D, rows=rows, shard_rows=default_shard_rows(rows, D, "int8"), dtype="int8")
    store, most = Store.create(folder / "checkpoint-0", manifest), manifest.shard_rows
    sketches = Stream(0, "benchmark").normals(0, most * D).view(most, D)
    losses = Stream(1, "benchmark").normals(0, most).abs()
    for start, count in store.missing():
        places = range(start, start + count)
        columns = {
            "text": [f"The square of {i} is {i * i}." for i in places],
            "source": [SOURCES[i * i % len(SOURCES)] for i in places],
            "year": [1980 + i % 45 for i in places],
        }
        part = sketches[:count].roll(start // most, dims=1)
        store.write(start, Rows([f"row-{i}" for i in places], part, losses[:count].clone(), columns))
    checkpoint = StoredCheckpoint("model", 1.0, "checkpoint-0", None)
    description = Description(D, 0, ("weight",), (checkpoint,), "stand-in")
    write_file(folder / "index.json", description.to_json())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
