"""Where a store's files live: a local folder, or an object store through ``pyarrow.fs``.

A file appears whole or not at all, and once it has appeared it survives a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from gradsketch.durable import cleaned, failed, is_temporary, write_file
from gradsketch.errors import DamageError, StoreError

__all__ = ["Folder", "LocalFolder", "RemoteFolder", "open_folder"]

_MADV_POPULATE_READ = 22  # Python has no name for it yet
Check = Callable[[pa.Buffer], None]
# Files whose bytes this process has checked, by what changes when a file is replaced. A check costs as much as reading
# the file does, so that only the first reader in a process pays for it.
_checked: set[tuple[int, int, int, int]] = set()


class Folder(ABC):
    """A flat folder of immutable files."""

    uri: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all finished files, sorted; empty where the folder does not exist."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a finished file is there: one look-up, where listing a folder of many files takes long."""

    @abstractmethod
    def read(self, name: str, *, whole: bool = False, check: Check | None = None) -> pa.Buffer:
        """Return a file's bytes, memory-mapped; ``whole`` says that all of them are about to be used.

        ``check`` gets the bytes where this process reads them for the first time, and raises where they are not sound.

        Raises:
            StoreError: it cannot be read.
        """

    @abstractmethod
    def write(self, name: str, data: pa.Buffer | bytes, *, replace: bool = True) -> bool:
        """Write a whole file durably; return False where it was there and ``replace`` is False.

        Raises:
            StoreError: the disk is full, the folder read-only, and the like; nothing is left behind.
        """

    @abstractmethod
    def child(self, name: str) -> Folder:
        """Return a folder inside this one."""

    def clean(self) -> None:  # noqa: B027 - an upload becomes visible whole or never
        """Remove what dead writers on this machine left unfinished, where anything can be."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


def open_folder(path: str | Path) -> Folder:
    """Return the folder at a local path or a URI such as ``s3://bucket/index``.

    Raises:
        StoreError: the URI's scheme is unknown or its service refuses.
    """
    if "://" not in str(path):
        return LocalFolder(Path(path).expanduser())
    try:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"{path} cannot be opened ({error})",
            "a local path or a URI pyarrow knows: file, s3, gs, abfs, hdfs, fsspec+…",
            "Check the URI and the credentials in the environment",
        ) from error
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return LocalFolder(Path(inner))
    return RemoteFolder(filesystem, inner, str(path))


class LocalFolder(Folder):
    """A folder on a local disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.uri = path, str(path)

    def names(self) -> list[str]:
        if not self.path.exists():
            return []
        try:
            return sorted(e.name for e in os.scandir(self.path) if e.is_file() and not is_temporary(e.name))
        except OSError as error:
            raise failed("list", self.uri, error) from error

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str, *, whole: bool = False, check: Check | None = None) -> pa.Buffer:
        path = self.path / name
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                # An empty file, which a power cut can leave, cannot be mapped.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if found.st_size else None
        except (OSError, ValueError) as error:
            raise failed("read", str(path), error) from error
        version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        unchecked = check is not None and version not in _checked
        if mapped is not None and (whole or unchecked):
            # One system call in place of a page fault every few pages, and one large read where the disk is asked.
            with contextlib.suppress(OSError, ValueError):  # before Linux 5.14, and elsewhere
                mapped.madvise(_MADV_POPULATE_READ)
        data = pa.py_buffer(b"" if mapped is None else mapped)
        if check is not None and unchecked:
            check(data)
            _checked.add(version)
        return data

    def write(self, name: str, data: pa.Buffer | bytes, *, replace: bool = True) -> bool:
        return write_file(self.path / name, memoryview(data), replace=replace)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def clean(self) -> None:
        cleaned(self.path)


class RemoteFolder(Folder):
    """A folder in an object store: one PUT of a finished file is the commit; reads go through a local cache.

    The cache is ``$GRADSKETCH_CACHE``, or ``gradsketch`` under ``$XDG_CACHE_HOME`` or ``~/.cache``; a file is fetched
    again when its size or time of change differ.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str, uri: str) -> None:
        self.filesystem, self.path, self.uri, self._is_made = filesystem, path.rstrip("/"), uri, False

    def names(self) -> list[str]:
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except (OSError, pa.ArrowException) as error:
            raise failed("list", self.uri, error) from error
        return sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.File)

    def has(self, name: str) -> bool:
        try:
            return bool(self.filesystem.get_file_info(f"{self.path}/{name}").type == pyarrow.fs.FileType.File)
        except (OSError, pa.ArrowException) as error:
            raise failed("read", f"{self.uri}/{name}", error) from error

    def read(self, name: str, *, whole: bool = False, check: Check | None = None) -> pa.Buffer:
        try:
            info = self.filesystem.get_file_info(f"{self.path}/{name}")
            if info.type != pyarrow.fs.FileType.File:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            cache = LocalFolder(_cache_root() / hashlib.sha256(self.uri.encode()).hexdigest()[:16])
            cached = f"{name}-{info.size}-{info.mtime_ns or 0}"
            if (cache.path / cached).exists():
                with contextlib.suppress(DamageError):  # of the copy, perhaps; then it is fetched again
                    return cache.read(cached, whole=whole, check=check)
            with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                cache.write(cached, file.read_buffer())
            return cache.read(cached, whole=whole, check=check)
        except (OSError, pa.ArrowException) as error:
            raise failed("read", f"{self.uri}/{name}", error) from error

    def write(self, name: str, data: pa.Buffer | bytes, *, replace: bool = True) -> bool:
        path = f"{self.path}/{name}"
        try:
            if not replace and self.has(name):
                return False
            if not self._is_made:  # of an object store that is one request and more, at every write
                self.filesystem.create_dir(self.path, recursive=True)
                self._is_made = True
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
        except (OSError, pa.ArrowException) as error:
            raise failed("write", f"{self.uri}/{name}", error) from error
        return True

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self.filesystem, f"{self.path}/{name}", f"{self.uri.rstrip('/')}/{name}")


def _cache_root() -> Path:
    chosen = os.environ.get("GRADSKETCH_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gradsketch"
