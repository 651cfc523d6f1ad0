"""How fast is a query? 8 queries x 20,000 rows x d = 4096 in float16, after open, against reading the same bytes.

    python benchmarks/query_speed.py            # and --quick

Writes benchmarks/results/query_speed.json. Every job of a setting runs in turn, round by round. "read" reads every
shard into one preallocated buffer. "in memory": the files are in the page cache, as they are after the first query;
"from disk": they are put out of it before each job, as they are where the index is larger than memory.
Each file is held against its checksum when a process first opens it; "no checksums asked" leaves out what is left of
that in a warm query. "preconditioner" is what the first query of an index adds to that (fit), and what every later
process does (kept).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from record import interleaved_seconds, peak_bytes, write

from gradsketch.attribution.precondition import fit_preconditioner
from gradsketch.attribution.scan import Probe, top
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, default_shard_rows
from gradsketch.store.folder import LocalFolder

QUERIES, K = 8, 10


def make_store(folder: Path, rows: int, d: int, dtype: str) -> Store:
    manifest = Manifest(d=d, rows=rows, shard_rows=default_shard_rows(rows, d, dtype), dtype=dtype)
    store = Store.create(folder, manifest)
    for start, count in store.missing():
        sketches = Stream(start, "benchmark").normals(0, count * d).view(count, d)
        store.write(start, Rows([str(i) for i in range(start, start + count)], sketches, torch.zeros(count), {}))
    return store


def read_bytes(store: Store, buffer: bytearray) -> None:
    for name in store.folder.names():
        if name.endswith(".arrow"):
            with Path(store.folder.uri, name).open("rb", buffering=0) as file:
                file.readinto(buffer)


def unchecked(work: Callable[[], Any]) -> Any:
    """Work where no file is held against its checksum, not even once a process."""
    read = LocalFolder.read

    def as_it_is(folder: LocalFolder, name: str, *, whole: bool = False, check: Any = None) -> Any:
        return read(folder, name, whole=whole)

    with patch.object(LocalFolder, "read", as_it_is):
        return work()


def forget(store: Store) -> None:
    """Put a store's files out of the page cache."""
    for file in Path(store.folder.uri).glob("*.arrow"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds_from_disk(store: Store, jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            forget(store)
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"best": min(s), "median": statistics.median(s)} for name, s in seconds.items()}


def measure(rows: int, d: int, dtype: str, repeats: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        store = make_store(folder, rows, d, dtype)
        files = [path.stat().st_size for path in folder.glob("*.arrow")]
        buffer = bytearray(max(files))
        probe = Probe(store, Stream(1, "queries").normals(0, QUERIES * d).view(QUERIES, d), unit_length=True)
        jobs = {
            "read": lambda: read_bytes(store, buffer),
            "query": lambda: top([probe], K),
            "query, coarse on d/4": lambda: top([probe], K, width=d // 4),
            "query, no checksums asked": lambda: unchecked(lambda: top([probe], K)),
        }
        seconds = {
            "in memory": interleaved_seconds(jobs, repeats),
            "from disk": seconds_from_disk(store, jobs, max(2, repeats // 3)),
        }
        ratios = {name: s["query"]["median"] / s["read"]["median"] for name, s in seconds.items()}
        warm = seconds["in memory"]
        checks = warm["query"]["best"] / warm["query, no checksums asked"]["best"]
        result = {"rows": rows, "d": d, "dtype": dtype, "queries": QUERIES, "bytes": sum(files), "seconds": seconds}
        result |= {"query / read": ratios, "query / query that asks for no checksum, warm": checks}
        result |= {"peak_bytes": peak_bytes(jobs["query"])}
        return result | ({"preconditioner_seconds": preconditioner(store)} if dtype == "float16" else {})
    finally:
        shutil.rmtree(folder)


def preconditioner(store: Store) -> dict[str, float]:
    seconds = {}
    for name in ("fit", "kept"):
        start = time.perf_counter()
        fit_preconditioner(store, unit_length=True, damping=0.1)
        seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 rows, written to no file")
    quick = parser.parse_args().quick
    rows, repeats = (2_000, 3) if quick else (20_000, 15)
    results = [measure(rows, 4096, dtype, repeats) for dtype in ("float16", "bfloat16", "float32", "int8")]
    for result in results:
        print(json.dumps(result))
    if not quick:
        print(write("query_speed", results))


if __name__ == "__main__":
    main()
