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

    def build(self, n: int, d: int, seed: int = 0) -> gs.Sketch:
        sketch: gs.Sketch = getattr(gs, self.kind)(n, d, seed=seed, **self.options)
        return sketch


CASES = [
    *(Case("AFFD", {"form": f, "diagonal": g}) for f in ("local", "global") for g in ("signs", "gaussian")),
    *(Case("AFJL", {"diagonal": g}) for g in ("signs", "gaussian")),
]
