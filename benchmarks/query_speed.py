"""How fast is a query? 8 queries x 20,000 rows x d = 4096 in float16, after open, against reading the same bytes.

    python benchmarks/query_speed.py            # and --quick

Writes benchmarks/results/query_speed.json. Every job of a setting runs in turn, round by round; the files are in the
page cache, as they are after the first query. "read" reads every shard into one preallocated buffer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import interleaved_seconds, peak_bytes, write

from gradsketch.attribution.scan import Probe, top
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, default_shard_rows

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
        }
        seconds = interleaved_seconds(jobs, repeats)
        ratio = seconds["query"]["best"] / seconds["read"]["best"]
        result = {"rows": rows, "d": d, "dtype": dtype, "queries": QUERIES, "bytes": sum(files), "seconds": seconds}
        return result | {"query / read": round(ratio, 2), "peak_bytes": peak_bytes(jobs["query"])}
    finally:
        shutil.rmtree(folder)


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
