"""Run sections one after the other, each in a process of its own, and keep what each hands over."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu import __doc__ as about
from benchmarks.on_gpu import page

ROOT = Path(__file__).parents[2]
# All sections together: ten minutes less what starting and writing take.
MOST_SECONDS = 570


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.on_gpu", description=about)
    parser.add_argument("sections", nargs="*", help="which ones; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help="a folder; benchmarks/results by default, a temporary one on the CPU")
    parser.add_argument("--child", nargs=2, metavar=("SECTION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.child:
        return child(*options.child, quick=options.quick)
    return parent(options)


def child(name: str, file: str, *, quick: bool) -> int:
    """Run one section and write a line for each of its rows."""
    from benchmarks.on_gpu.sections import SECTIONS

    with Path(file).open("a", encoding="utf-8") as kept:

        def keep(row: dict[str, Any]) -> None:
            kept.write(json.dumps(row) + "\n")
            kept.flush()

        SECTIONS[name][0](quick, keep)
    return 0


def parent(options: argparse.Namespace) -> int:
    """Run the sections, writing JSON and page after each of them."""
    import torch

    from benchmarks.on_gpu.sections import SECTIONS
    from benchmarks.record import RESULTS, environment

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here. To try the script itself: python -m benchmarks.on_gpu --device cpu --quick")
        return 2
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        print(f"no section {sorted(unknown)}; there are {', '.join(SECTIONS)}")
        return 2
    folder = options.out or (RESULTS if options.device == "cuda" else Path(tempfile.mkdtemp()))
    record: dict[str, Any] = {"environment": environment(), "quick": options.quick, "results": {}}
    deadline = time.monotonic() + MOST_SECONDS
    for name in options.sections or SECTIONS:
        left = min(SECTIONS[name][1], deadline - time.monotonic())
        record["results"][name] = run(name, options, left)
        written = write(folder, record)
        print(f"{name}: {record['results'][name]['ended']}, {record['results'][name]['seconds']:.0f} s", flush=True)
    print(f"written to {written}")
    return int(any(found["ended"] != "done" for found in record["results"].values()))


def run(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Return a section's rows, how it ended and how long it took."""
    if limit <= 0:
        return {"ended": "not begun: ten minutes were over", "seconds": 0.0, "rows": []}
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--device", options.device, *["--quick"] * options.quick]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        try:
            done = subprocess.run(
                [*command, "--child", name, str(file)], cwd=ROOT, timeout=limit, capture_output=True, text=True
            )
            last = "\n".join(done.stderr.strip().splitlines()[-12:])
            ended = "done" if done.returncode == 0 else f"exit {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return {"ended": ended, "seconds": time.monotonic() - begin, "rows": rows}


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Write what there is so far, and the page of it."""
    from gradsketch.durable import write_file

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "gpu.json", json.dumps(record, indent=1) + "\n")
    write_file(folder / "gpu.md", page.text(record))
    return folder / "gpu.md"


if __name__ == "__main__":
    sys.exit(main())
