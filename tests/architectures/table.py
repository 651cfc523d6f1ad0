"""What a survey says in all: totals, and why parameters are slow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from architectures.measure import Measured

__all__ = ["FAST", "Totals", "reasons", "table"]

FAST = 0.95  # the share of its parameters from which on an architecture counts as fast


@dataclass(frozen=True)
class Totals:
    """Counts of architectures by outcome; ``fast`` are those right with at least 95 % of their parameters fast."""

    architectures: int
    right: int
    refused: int
    wrong: int
    crashed: int
    broken: int
    fast: int

    @classmethod
    def of(cls, found: Iterable[Measured]) -> Totals:
        """Count."""
        found = list(found)
        outcomes = [one.outcome for one in found]
        fast = sum(one.outcome == "right" and one.fast_share >= FAST for one in found)
        counts = {name: outcomes.count(name) for name in ("right", "refused", "wrong", "crashed", "broken")}
        return cls(len(found), **counts, fast=fast)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, int]:
        """Return every count, for JSON."""
        return asdict(self)


def reasons(found: Iterable[Measured]) -> dict[str, list[str]]:
    """Return, for each reason why parameters are slow, the architectures that have it; the most frequent first."""
    having: dict[str, list[str]] = defaultdict(list)
    for one in found:
        for reason in sorted({_kind(reason) for reason in one.slow.values()}):
            having[reason].append(one.name)
    return dict(sorted(having.items(), key=lambda item: -len(item[1])))


def table(found: Iterable[Measured]) -> str:
    """Return one line an architecture that is not right and fast, then the reasons, then the totals."""
    found = sorted(found, key=lambda one: one.name)
    lines = [_line(one) for one in found if one.outcome != "right" or one.fast_share < FAST]
    lines += ["", *(f"{len(names):>5}  {reason}" for reason, names in reasons(found).items())]
    return "\n".join([*lines, "", _sentence(Totals.of(found).to_dict())])


def _line(one: Measured) -> str:
    error = "" if one.error is None else f"{one.error:.0e}"
    why = one.message or ", ".join(sorted({_kind(reason) for reason in one.slow.values()})) or one.worst
    return f"{one.name:<40} {one.outcome:<8} {error:>6} {one.fast_share:>6.1%} fast  {why[:120]}"


def _sentence(totals: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in totals.items())


def _kind(reason: str) -> str:
    """Return a reason without the numbers of layers, so that all layers of a model count as one."""
    return re.sub(r"\b\d+\b", "N", reason)
