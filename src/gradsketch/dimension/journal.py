"""Finished trainings kept in a file, so that interrupted work goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradsketch.dimension.results import CurvePoint
from gradsketch.durable import damaged, read_record, require_same, write_record

__all__ = ["Journal"]


class Journal:
    """Finished points, kept in a JSON file beside the facts of the work they belong to.

    Raises:
        FingerprintError: the file belongs to other work.
        StoreError: it is damaged, or cannot be read.
    """

    def __init__(self, path: str | Path | None, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = None if path is None else Path(path), facts
        self.points: dict[tuple[int, int], CurvePoint] = {}
        self.last = float("nan")
        if self.path is not None and self.path.exists():
            record = read_record(self.path)
            require_same(facts, record.get("facts"), self.path)
            try:
                for point in record["points"]:
                    self._keep(CurvePoint(**point))
            except (LookupError, TypeError) as error:
                raise damaged(self.path, f"{type(error).__name__}: {error}") from error

    @staticmethod
    def kept(path: str | Path | None, fact: str) -> Any:
        """Return one fact of the work that a file belongs to; None where there is no file."""
        if path is None or not Path(path).exists():
            return None
        return (read_record(Path(path)).get("facts") or {}).get(fact)

    def add(self, point: CurvePoint) -> None:
        """Keep a point, also on the disk.

        Raises:
            StoreError: the file cannot be written.
        """
        self._keep(point)
        if self.path is not None:
            points = [asdict(p) for p in self.points.values()]
            write_record(self.path, {"facts": self.facts, "points": points})

    def _keep(self, point: CurvePoint) -> None:
        self.points[point.d, point.seed] = point
        self.last = point.value
