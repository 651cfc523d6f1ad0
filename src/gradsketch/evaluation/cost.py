"""What a piece of work costs: time, interleaved with what it is compared to, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["interleaved_rounds", "interleaved_seconds", "peak_bytes"]


def interleaved_seconds(jobs: dict[str, Callable[[], Any]], repeats: int = 7) -> dict[str, dict[str, float]]:
    """Time every job once a round, in turn, so that a busy moment hits all; return best and median a job."""
    rounds = interleaved_rounds(jobs, repeats)
    return {name: {"best": min(s), "median": statistics.median(s)} for name, s in rounds.items()}


def interleaved_rounds(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time every job once a round, in turn, after a round that does not count; return the seconds of every round."""
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
    return seconds


def peak_bytes(job: Callable[[], Any]) -> int | None:
    """Return the memory ``job`` needed beyond what was held before: of the GPU, or (on Linux) of the process.

    None where neither can be measured.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    _release()
    marks.write_text("5")  # resets the high-water mark of the resident set
    before = _status_bytes("VmRSS")
    job()
    return max(0, _status_bytes("VmHWM") - before)


def _release() -> None:
    """Give freed memory back to the system, so that the next job cannot hide in it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
