"""A run that survives being killed: its state in one file, replaced as a whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from gradsketch.errors import FingerprintError

__all__ = ["RunFile"]

# Saving takes at most a twentieth of the time, and is never more than this many seconds behind.
_SHARE, _SECONDS = 0.05, 30.0


class RunFile:
    """State of a run at ``path``, belonging to one ``identity``; without a path it does nothing.

    Raises:
        FingerprintError: the file holds a run of something else.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        self._saved, self._took = time.monotonic(), 0.0

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, or None where there is none."""
        if self.path is None or not self.path.exists():
            return None
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["identity"] != self.identity:
            changed = sorted(k for k, v in self.identity.items() if content["identity"].get(k) != v)
            raise FingerprintError(
                f"{self.path} holds a run that differs in {', '.join(changed)}",
                f"a run with {', '.join(f'{k}={self.identity[k]}' for k in changed)}",
                "Name another checkpoint file, or delete this one",
            )
        state: dict[str, Any] = content["state"]
        return state

    def save_sometimes(self, state: dict[str, Any]) -> None:
        """Save if the last save is old enough for its cost."""
        if time.monotonic() - self._saved > max(_SECONDS, self._took / _SHARE):
            self.save(state)

    def save(self, state: dict[str, Any]) -> None:
        """Write the state beside the file, force it to disk, and put it in the file's place."""
        if self.path is None:
            return
        start = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save({"identity": self.identity, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self._saved = time.monotonic()
        self._took = self._saved - start
