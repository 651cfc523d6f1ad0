"""What every benchmark shares: interleaved timing, peak memory, and JSON that says where it was measured."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import gradsketch as gs
from gradsketch.durable import write_file
from gradsketch.evaluation.cost import interleaved_rounds, interleaved_seconds, peak_bytes

__all__ = ["environment", "interleaved_rounds", "interleaved_seconds", "peak_bytes", "table", "write"]

RESULTS = Path(__file__).parent / "results"


def write(name: str, results: Any, **about: Any) -> Path:
    """Write results with machine, versions and commit, and what else there is to say, to results/NAME.json."""
    path = RESULTS / f"{name}.json"
    write_file(path, json.dumps({"environment": environment(), **about, "results": results}, indent=1) + "\n")
    return path


def table(hits: gs.Hits) -> Float[Tensor, "q n"]:
    """Return the scores of every question with every row; rows that are no hits have zero."""
    scores = torch.zeros(len(hits), hits.rows, dtype=torch.float64)
    for row, query in zip(scores, hits, strict=True):
        row[[hit.row for hit in query]] = torch.tensor([hit.score for hit in query], dtype=torch.float64)
    return scores


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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
