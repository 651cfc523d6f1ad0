"""Is a build's memory bounded by a part, however large the file? One Parquet file of 50 GB of pictures.

    python benchmarks/large_file.py [--gigabytes 50] [--folder /tmp]

Each row holds 50 kB of random bytes, which nothing can compress, a caption, and a label; 20,000 rows, 1 GB, are a row
group. A linear model of 2,112 parameters stands in for a real one (that of scale.py), which reads captions and labels.
Memory is what the process holds beyond what it held before the build. Writes results/large_file.json.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from record import peak_bytes, write
from scale import D, Hashed
from torch import nn

import gradsketch as gs

ROW, GROUP = 50_000, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where there is room for the file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        path = folder / "pictures.parquet"
        # By another process: what it frees would count as memory that this one held before the build.
        with ProcessPoolExecutor(1) as writer:
            rows = writer.submit(written, path, arguments.gigabytes).result()
        result: dict[str, Any] = {"rows": rows, "bytes": path.stat().st_size, "row_group_bytes": ROW * GROUP, "d": D}
        began = time.perf_counter()
        result["build_peak_bytes"] = peak_bytes(lambda: build(folder))
        result["build_seconds"] = time.perf_counter() - began
        print(write("large_file", result))
    finally:
        shutil.rmtree(folder)


def written(path: Path, gigabytes: int) -> int:
    """Write the file, a row group at a time; return its rows."""
    bits = np.random.default_rng(0).bytes(2 * ROW * 1024)
    schema = pa.schema({"id": pa.string(), "text": pa.string(), "kind": pa.int64(), "image": pa.binary()})
    groups = max(1, gigabytes * 10**9 // (ROW * GROUP))
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
        for group in range(groups):
            places = range(group * GROUP, (group + 1) * GROUP)
            columns = {
                "id": [f"row-{i}" for i in places],
                "text": [f"The square of {i} is {i * i}." for i in places],
                "kind": [i % 64 for i in places],
                "image": [bits[start : start + ROW] for i in places for start in (i * 2477 % (ROW * 1024),)],
            }
            file.write_table(pa.table(columns, schema=schema))
    return groups * GROUP


def build(folder: Path) -> None:
    torch.manual_seed(0)
    gs.build_index(
        folder / "index", nn.Linear(32, 64), Hashed(), folder / "pictures.parquet", d=D, dtype="int8", progress=False
    )


if __name__ == "__main__":
    main()
