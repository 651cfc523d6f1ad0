"""Finished trainings kept in a file, so that interrupted work goes on; and the check that it is the same work."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from gradsketch.dimension.results import CurvePoint, Settings
from gradsketch.errors import FingerprintError

__all__ = ["Journal", "check_settings"]


class Journal:
    """Finished points, kept in a file of JSON lines that starts with the settings."""

    def __init__(self, path: str | Path | None, settings: Settings) -> None:
        self.path = None if path is None else Path(path)
        self.points: dict[tuple[int, int], CurvePoint] = {}
        self.last = float("nan")
        if self.path is None:
            return
        if self.path.exists():
            # A line that a kill cut short is not counted; the point is made again.
            head, *lines = self.path.read_text().split("\n")[:-1]
            check_settings(json.loads(head), settings, self.path)
            for line in lines:
                self._keep(CurvePoint(**json.loads(line)))
            self._rewrite(head)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(json.dumps(settings))

    def add(self, point: CurvePoint) -> None:
        self._keep(point)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(point)) + "\n")

    def _keep(self, point: CurvePoint) -> None:
        self.points[point.d, point.seed] = point
        self.last = point.value

    def _rewrite(self, head: str) -> None:
        assert self.path is not None
        scratch = self.path.with_name(self.path.name + ".tmp")
        scratch.write_text(
            "".join(f"{line}\n" for line in [head, *(json.dumps(asdict(p)) for p in self.points.values())])
        )
        scratch.replace(self.path)


def check_settings(found: Settings, settings: Settings, path: Path) -> None:
    """Refuse a checkpoint that was made with other settings.

    Raises:
        FingerprintError: naming what differs.
    """
    if different := [key for key in settings if found.get(key) != settings[key]]:
        raise FingerprintError(
            f"{path.name}, made with {', '.join(f'{key}={found.get(key)!r}' for key in different)}",
            ", ".join(f"{key}={settings[key]!r}" for key in different),
            "Pass another checkpoint, or the settings it was made with",
        )
