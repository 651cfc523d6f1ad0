"""Ctrl-C, and SIGTERM, which schedulers and containers send before they kill: work is saved at both.

A library in the middle of its import can swallow what a signal raises, and fail later for want of what it was at. So
signals are remembered, and whatever a run ends with after one, it was stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["TERMINATED", "Terminated", "received", "terminable"]

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells give such a process


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Whatever saves its state at Ctrl-C saves it now."""


_received: list[type[KeyboardInterrupt]] = []


def received() -> type[KeyboardInterrupt] | None:
    """Return what the first signal raised since ``terminable`` was entered, or None where there was none."""
    return _received[0] if _received else None


@contextmanager
def terminable() -> Iterator[None]:
    """Raise ``Terminated`` at the first SIGTERM; later ones do not disturb the saving. Remember Ctrl-C as well."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _received.append(Terminated)
    raise Terminated


def _interrupt(number: int, frame: Any) -> None:
    _received.append(KeyboardInterrupt)
    raise KeyboardInterrupt
