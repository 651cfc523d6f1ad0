"""What every benchmark shares: interleaved timing, peak memory, and JSON that says where it was measured."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved_seconds(jobs: dict[str, Callable[[], Any]], repeats: int = 7) -> dict[str, dict[str, float]]:
    """Time every job once a round, in turn, so that a busy moment hits all; return best and median a job."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            _synchronize()
            start = time.perf_counter()
            job()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"best": min(s), "median": statistics.median(s)} for name, s in seconds.items()}


def peak_bytes(job: Callable[[], Any]) -> int:
    """Return the memory ``job`` needed beyond what was held before: of the GPU, or (Linux) of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    before = _status_bytes("VmRSS")
    job()
    return _status_bytes("VmHWM") - before


def write(name: str, results: Any) -> Path:
    """Write results with machine, versions and commit to results/NAME.json and return its path."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Return when, on what and with which code a measurement was made."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _output("git", "rev-parse", "--short", "HEAD") + ("+" if _output("git", "status", "-s") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
