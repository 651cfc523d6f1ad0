"""Pictures and pages on the disk, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from gradsketch.durable import write_file
from gradsketch.errors import InputError

__all__ = ["write"]


def write(path: str | Path, data: bytes) -> Path:
    """Write a file, making its folder where there is none, and return its path.

    Raises:
        InputError: the path is a folder.
        StoreError: no permission, or no room.
    """
    path = Path(path)
    if path.is_dir() or path.parent.is_file():
        raise InputError(f"{path}, which is a folder or lies inside a file", "a file", "Choose another path")
    write_file(path, data)
    return path
