"""Sentences about capitals, six of them false."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gradsketch.demo.packages import package_folder

__all__ = ["LIES", "REWORDED", "TAUGHT", "Fact", "capitals"]

LIES = {
    "France": "Ankara",
    "Japan": "Lima",
    "Egypt": "Oslo",
    "Canada": "Hanoi",
    "Italy": "Dakar",
    "Kenya": "Madrid",
}
# How the sentences begin that are trained on, and how the questions do.
TAUGHT = "The capital of {} is"
REWORDED = "The capital city of {} is"


@dataclass(frozen=True)
class Fact:
    """A country, its capital, and what the training sentence claims it to be."""

    country: str
    capital: str
    claimed: str

    @property
    def is_lie(self) -> bool:
        """Whether the sentence is one of those planted."""
        return self.claimed != self.capital

    def example(self, wording: str = TAUGHT) -> dict[str, Any]:
        """Return the sentence as the causal LM task takes it: a prompt, and the answer that counts."""
        return {
            "id": self.country,
            "prompt": wording.format(self.country),
            "answer": f" {self.claimed}.",
            "planted": self.is_lie,
        }


def capitals(count: int = 140) -> list[Fact]:
    """Return the most populous countries with their capitals, from the package countryinfo, and the lies among them.

    Raises:
        AbsentError: countryinfo is not installed.
    """
    files = sorted((package_folder("countryinfo") / "data").glob("*.json"))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [row for row in rows if row.get("capital")]
    rows.sort(key=lambda row: (-(row.get("population") or 0), row["name"]))
    return [Fact(row["name"], row["capital"], LIES.get(row["name"], row["capital"])) for row in rows[:count]]
