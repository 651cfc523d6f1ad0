"""Every kind of sketch with every option, for the batteries that all of them must pass."""

from __future__ import annotations

import math
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


class Tiled(Case):
    """A matrix as square as n allows."""

    def fit(self, n: int, d: int) -> tuple[int, int]:
        return n, d

    def build(self, n: int, d: int, seed: int = 0) -> gs.Sketch:
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        return gs.TiledSRHT(rows, n // rows, d, seed=seed)


class Blocks(Case):
    """A vector, a matrix and a tensor of four dims, of about n/10, 6n/10 and 3n/10 entries."""

    def fit(self, n: int, d: int) -> tuple[int, int]:
        return n, d

    def build(self, n: int, d: int, seed: int = 0) -> gs.Sketch:
        side = math.isqrt(6 * n // 10)
        shapes = {"norm": (n - side**2 - 4 * (n // 13),), "linear": (side, side), "conv": (n // 13, 1, 2, 2)}
        return gs.BlockSum(
            {name: shape for name, shape in shapes.items() if math.prod(shape)}, d, seed=seed, **self.options
        )


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
    Tiled("TiledSRHT"),
    Blocks("BlockSum"),
    Blocks("BlockSum", {"kind": "affd"}),
    Blocks("BlockSum", {"kind": "sjlt"}),
]
