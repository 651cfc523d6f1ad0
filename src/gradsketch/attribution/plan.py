"""What a build is about to do, for a person to read before it starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gradsketch.attribution.parts import BadRow
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.table import printable

__all__ = ["Plan", "bytes_free", "size_text"]


@dataclass(frozen=True)
class Plan:
    """What a run is about to do: rows, disk space and, where a few examples were timed, time."""

    path: str
    rows: int
    missing: int
    sampled: int  # rows that were read for this plan; the tokens are an estimate where that is not all
    bad: tuple[BadRow, ...]  # among those
    tokens: int
    d: int
    n: int
    tensors: int
    dtype: str
    checkpoints: int
    shard_rows: int
    bytes: int
    bytes_free: int | None
    seconds: float | None
    slow: Mapping[str, str] = field(default_factory=dict)  # parameters whose gradients are formed one by one, and why
    audits: Audits | None = None  # of the batches that were timed

    def __str__(self) -> str:
        selection = f"{self.n:,} parameters in {self.tensors} tensors → d = {self.d:,} ({self.dtype})"
        estimated = self.sampled < self.rows
        bad = f", {len(self.bad):,} bad" * bool(self.bad) + f" of {self.sampled:,} sampled" * (
            estimated and bool(self.bad)
        )
        tokens = (
            f"about {self.tokens:,} tokens (from {self.sampled:,} rows)" if estimated else f"{self.tokens:,} tokens"
        )
        lines = [
            f"index       {printable(self.path)}",
            f"data        {self.rows:,} examples, {tokens}{bad}",
            f"sketch      {selection}" + f", {self.checkpoints} checkpoints" * (self.checkpoints > 1),
            f"to do       {self.missing:,} rows, {self.shard_rows} a shard",
            f"disk        {size_text(self.bytes)}"
            + (f" of {size_text(self.bytes_free)} free" if self.bytes_free else ""),
        ]
        if self.seconds is not None:
            lines.append(f"time        about {_duration(self.seconds)}")
        if self.audits is not None and self.audits.audited:
            lines.append(f"gradients   {self.audits}")
        if self.slow:
            name, reason = next(iter(self.slow.items()))
            lines.append(f"slow        {len(self.slow)} tensors, one example at a time: {name} ({reason}), …")
        return "\n".join(lines)


def bytes_free(path: Path) -> int:
    """Return the bytes free where a folder is, or where it would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size_text(count: int | float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: int | float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
