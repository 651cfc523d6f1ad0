"""A run that survives being killed: its state in one file, saved as often as its cost allows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gradsketch.durable import damaged, read_tensors, require_same, write_tensors

__all__ = ["RunFile"]

# Saving takes at most a twentieth of the time, and is never more than this many seconds behind.
_SHARE, _SECONDS = 0.05, 30.0


class RunFile:
    """State of a run at ``path``, belonging to the work that ``facts`` describe; without a path it does nothing."""

    def __init__(self, path: str | Path | None, facts: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.facts = facts
        self._saved, self._took = time.monotonic(), 0.0

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, or None where there is none.

        Raises:
            FingerprintError: the file holds a run of something else.
            StoreError: it is damaged, or cannot be read.
        """
        if self.path is None or not self.path.exists():
            return None
        content = read_tensors(self.path)
        if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
            raise damaged(self.path, "it holds no state of a run")
        require_same(self.facts, content.get("facts"), self.path)
        state: dict[str, Any] = content["state"]
        return state

    def save_sometimes(self, state: dict[str, Any]) -> None:
        """Save if the last save is old enough for its cost."""
        if time.monotonic() - self._saved > max(_SECONDS, self._took / _SHARE):
            self.save(state)

    def save(self, state: dict[str, Any]) -> None:
        """Put the state in the file's place."""
        if self.path is None:
            return
        start = time.monotonic()
        write_tensors(self.path, {"facts": self.facts, "state": state})
        self._saved = time.monotonic()
        self._took = self._saved - start
