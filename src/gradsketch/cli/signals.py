"""SIGTERM, which schedulers and containers send before they kill: work is saved as at Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["TERMINATED", "Terminated", "terminable"]

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells give such a process


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Whatever saves its state at Ctrl-C saves it now."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise ``Terminated`` at the first SIGTERM; later ones do not disturb the saving."""
    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _raise_once(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
