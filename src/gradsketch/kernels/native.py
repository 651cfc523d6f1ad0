"""C of this package, compiled for this machine's CPU when it is first needed, with the compiler that is there.

What comes out is kept in the user's cache folder. Where there is no compiler nothing is said: torch does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from gradsketch.durable import is_sealed, seal, written_whole
from gradsketch.errors import StoreError

__all__ = ["compiled"]

_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
_SECONDS = 60.0


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """Return the library of this name's C file, or None where it cannot be had.

    It takes threads from torch's own OpenMP, or does with one where that cannot be found.
    """
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiler = tuple(shlex.split(os.environ.get("CC", ""))) or (found and (found,))  # CC may be "ccache gcc"
    if not compiler:
        return None
    openmp = _torchs_openmp()
    return (openmp and _library(name, compiler, "-fopenmp")) or _library(name, compiler)


def _library(name: str, compiler: tuple[str, ...], *flags: str) -> ctypes.CDLL | None:
    source = Path(__file__).with_name(f"{name}.c")
    facts = (source.read_text(encoding="utf-8"), *compiler, *_FLAGS, *flags, _processor())
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    try:
        file = _cache_folder() / f"{name}-{key}.so"
        if not is_sealed(file):
            with written_whole(file) as temporary:
                _compile(source, temporary, compiler, flags)
                seal(temporary)
        return ctypes.CDLL(str(file))
    except (OSError, RuntimeError, StoreError, subprocess.SubprocessError):  # RuntimeError: there is no home folder
        return None


def _compile(source: Path, target: Path, compiler: tuple[str, ...], flags: tuple[str, ...]) -> None:
    # What the code needs of OpenMP is left open: linking would bring a second one with threads of its own.
    made = target.with_suffix(".o")
    try:
        _run(*compiler, *_FLAGS[:-1], *flags, "-c", str(source), "-o", str(made))
        _run(*compiler, *_FLAGS[-1:], str(made), "-o", str(target))
    finally:
        made.unlink(missing_ok=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)


def _torchs_openmp() -> bool:
    """Make the OpenMP that torch uses known to libraries that are loaded from now on."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            if hasattr(ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL), "GOMP_parallel"):
                return True
        except OSError:
            continue
    return False


def _processor() -> str:
    """Return what machine code depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradsketch"
