"""Every kind of sketch with every option, for the batteries that all of them must pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradsketch as gs


@dataclass(frozen=True)
class Case:
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.kind, *map(str, self.options.values())])

    def fit(self, n: int, d: int) -> tuple[int, int]:
        """Return the nearest sizes this kind allows."""
        if self.kind in ("FFD", "QK"):
            d = 1 << d.bit_length() - 1
        if self.kind == "Dense":
            d = min(d, 2**20 // n)  # n·d random numbers a call
        multiple = self.options.get("nonzeros", 1) if self.kind == "SJLT" else 1
        d = max(multiple, d // multiple * multiple)
        return max(n, d, 4 if self.options.get("factors", 1) > 1 else 1), d

    def build(self, n: int, d: int, seed: int = 0) -> gs.Sketch:
        sketch: gs.Sketch = getattr(gs, self.kind)(n, d, seed=seed, **self.options)
        return sketch


CASES = [
    *(Case("AFFD", {"form": f, "diagonal": g}) for f in ("local", "global", "paper") for g in ("signs", "gaussian")),
    *(Case("AFFD", {"transform": t}) for t in ("fft", "haar")),
    *(Case("AFJL", {"form": f, "diagonal": g}) for f in ("global", "paper") for g in ("signs", "gaussian")),
    *(Case("AFJL", {"transform": t}) for t in ("fft", "haar")),
    *(Case("Dense", {"distribution": p}) for p in ("gaussian", "rademacher")),
    Case("FJL"),
    Case("FFD"),
    Case("QK"),
    Case("QK", {"factors": 2}),
    Case("SJLT"),
    Case("SJLT", {"nonzeros": 4}),
]
