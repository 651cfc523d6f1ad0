"""Processes that a test has started, with all that they started in turn."""

import os
import time
from pathlib import Path


def marked(mark):
    """Return {pid: command} of the running processes whose environment has an entry; those they start inherit it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found[int(folder.name)] = command or "(ended)"
            except OSError:  # gone meanwhile, or somebody else's
                continue
    return {pid: command for pid, command in found.items() if command != "(ended)"}


def left_behind(mark, seconds=180):
    """Return the marked processes that are still there after so long; some of Ray's take a minute to give up."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
