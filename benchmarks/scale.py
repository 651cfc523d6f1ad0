"""Does everything stay flat or linear from 10^4 to 10^7 rows? Building, opening, verifying, asking; time and memory.

    python benchmarks/scale.py [--most 7] [--quick]

* stores: d = 1,024, int8 and float16, every shard of the same random rows. "query": 8 directions, the ten best rows;
  "first" opens every shard and compares its checksum, "warm" is the median of the later ones, and "read" reads the
  same bytes into one buffer, by turns with them. "disk": files are put out of the page cache before each of both.
* builds: gs.build_index on a file of JSON lines, with a linear model of 2,112 parameters in place of a real one, so
  that reading, encoding, batching and writing show; microseconds and memory beyond what the process held before.
* two_stage: 6,046 real mails under MiniLM, d = 4,096: which share of the exact ten best rows a search finds that takes
  its candidates by the first numbers of each sketch.

Writes results/scale.json and docs/images/scale.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from query_speed import QUERIES, K, forget, read_bytes
from record import RESULTS, peak_bytes, write
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.attribution.scan import Probe, top
from gradsketch.attribution.scoring import best
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, default_shard_rows, verify

D, REPEATS = 1024, 3
PICTURE = RESULTS.parents[1] / "docs/images/scale.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=7, help="rows of the largest store, as a power of ten")
    parser.add_argument("--quick", action="store_true", help="up to 10^5 rows, written to no file")
    arguments = parser.parse_args()
    most = 5 if arguments.quick else arguments.most
    results: dict[str, Any] = {"d": D, "queries": QUERIES}
    results["builds"] = [_shown(built(10**power)) for power in range(4, min(most, 6) + 1)]
    # Of float16 one size less: ten million rows are twice the memory of a small machine.
    sizes = [(dtype, power) for dtype, less in (("int8", 0), ("float16", 1)) for power in range(4, most + 1 - less)]
    results["stores"] = [_shown(stored(10**power, dtype)) for dtype, power in sizes]
    results["two_stage"] = _shown(two_stage(600 if arguments.quick else None))
    if not arguments.quick:
        print(write("scale", results))
        draw(results, PICTURE)


def _shown(result: Any) -> Any:
    print(json.dumps(result), flush=True)
    return result


class Hashed(gs.Task):
    """Thirty-two numbers made of a text's bytes, and which of sixty-four kinds it is of."""

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        codes = torch.tensor([[float(b) for b in row["text"].encode()[:32].ljust(32)] for row in examples])
        return {"x": codes / 128 - 0.5, "labels": torch.tensor([row["kind"] for row in examples])}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def built(rows: int) -> dict[str, Any]:
    """Build an index of a file, and go on with it once it is finished."""
    folder = Path(tempfile.mkdtemp())
    try:
        with (folder / "data.jsonl").open("w") as file:
            for i in range(rows):
                file.write(
                    json.dumps({"id": f"row-{i}", "text": f"The square of {i} is {i * i}.", "kind": i % 64}) + "\n"
                )
        torch.manual_seed(0)
        model = nn.Linear(32, 64)
        seconds = {}

        def build(name: str) -> None:
            began = time.perf_counter()
            gs.build_index(folder / "index", model, Hashed(), folder / "data.jsonl", d=D, dtype="int8", progress=False)
            seconds[name] = time.perf_counter() - began

        memory = peak_bytes(lambda: build("build"))
        build("again")
        each = {f"{name}_microseconds_a_row": value / rows * 1e6 for name, value in seconds.items()}
        return {"rows": rows, **each, "peak_bytes": memory}
    finally:
        shutil.rmtree(folder)


def stored(rows: int, dtype: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        began = time.perf_counter()
        store = filled(folder, rows, dtype)
        wrote = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
        result: dict[str, Any] = {"rows": rows, "dtype": dtype, "bytes": size, "write_seconds": wrote}
        began = time.perf_counter()
        store = Store.open(folder).snapshot()
        result["open_seconds"] = time.perf_counter() - began
        probe = Probe(store, Stream(1, "queries").normals(0, QUERIES * D).view(QUERIES, D), unit_length=True)
        began = time.perf_counter()
        result["query_peak_bytes"] = peak_bytes(lambda: top([probe], K))
        result["first_seconds"] = time.perf_counter() - began
        buffer = bytearray(max(path.stat().st_size for path in folder.glob("*.arrow")))
        for place, forgetful in (("warm", False), ("disk", True)):
            timed: dict[str, list[float]] = {"query": [], "read": []}
            for _ in range(REPEATS):
                for name, job in (("query", lambda: top([probe], K)), ("read", lambda: read_bytes(store, buffer))):
                    if forgetful:
                        forget(store)
                    began = time.perf_counter()
                    job()
                    timed[name].append(time.perf_counter() - began)
            medians = {name: statistics.median(values) for name, values in timed.items()}
            result[f"{place}_query_seconds"] = medians["query"]
            result[f"{place}_share_of_reading_speed"] = medians["read"] / medians["query"]
        began = time.perf_counter()
        assert verify(store).sound
        return result | {"verify_seconds": time.perf_counter() - began}
    finally:
        shutil.rmtree(folder)


def filled(folder: Path, rows: int, dtype: str) -> Store:
    manifest = Manifest(d=D, rows=rows, shard_rows=default_shard_rows(rows, D, dtype), dtype=dtype)
    store, most = Store.create(folder, manifest), manifest.shard_rows
    sketches = Stream(0, "benchmark").normals(0, most * D).view(most, D)
    for start, count in store.missing():
        ids = [str(i) for i in range(start, start + count)]
        # Another row at each place, so that the best rows differ from shard to shard.
        part = sketches[:count].roll(start // most, dims=1)
        store.write(start, Rows(ids, part, torch.zeros(count), {"text": ids}))
    return store


def two_stage(count: int | None) -> list[dict[str, Any]]:
    """Return the recall of the exact ten best, by how many numbers of each sketch find the candidates."""
    from gradsketch.demo.mails import spam_assassin
    from gradsketch.demo.weights import minilm

    model, tokenizer = minilm(seed=0)
    task, mails = gs.Classification(tokenizer, max_length=32), spam_assassin()[:count]
    with tempfile.TemporaryDirectory() as folder:
        index = gs.build_index(folder, model, task, mails, d=4096, progress=False)
        store = index.stores[0]
        questions = torch.cat([shard.decoded() for shard in store])[:: max(1, len(mails) // 64)][:64]
        probe = Probe(store, questions, unit_length=True)
        exact = best([probe], K + 1, sign=1, keep=None, coarse=None).rows.tolist()
        return [{"coarse": coarse, "recall": _recall(exact, probe, coarse)} for coarse in (64, 128, 256, 512, 1024)]


def _recall(exact: list[list[int]], probe: Probe, coarse: int) -> float:
    found = best([probe], K + 1, sign=1, keep=None, coarse=coarse).rows.tolist()
    return sum(len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)) / sum(map(len, exact))


def draw(results: dict[str, Any], path: Path) -> None:
    from gradsketch.report.figure import BLUE, GREY, RED, finish, new_figure

    figure = new_figure(10.0, 3.6)
    times, memory = figure.subplots(1, 2)
    for dtype, colour in (("int8", BLUE), ("float16", RED)):
        rows = [row for row in results["stores"] if row["dtype"] == dtype]
        for name, style in (("warm_query_seconds", "o-"), ("first_seconds", "s--"), ("verify_seconds", "^:")):
            label = f"{dtype}: {name.removesuffix('_seconds').replace('_', ' ')}"
            times.loglog([r["rows"] for r in rows], [r[name] for r in rows], style, color=colour, label=label)
        memory.semilogx(
            [r["rows"] for r in rows],
            [r["query_peak_bytes"] / 1e6 for r in rows],
            "o-",
            color=colour,
            label=f"{dtype}: query",
        )
    builds = results["builds"]
    memory.semilogx(
        [r["rows"] for r in builds], [r["peak_bytes"] / 1e6 for r in builds], "s--", color=GREY, label="build"
    )
    times.set_ylabel("seconds")
    memory.set_ylabel("memory, MB")
    for axes in (times, memory):
        axes.set_xlabel("rows")
        axes.legend(fontsize=7, frameon=False)
    finish(figure).savefig(path, dpi=150)


if __name__ == "__main__":
    main()
