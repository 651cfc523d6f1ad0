"""Where a store's files live: a local folder, or an object store through ``pyarrow.fs``.

A file appears whole or not at all, and once it has appeared it survives a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import mmap
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from gradsketch.errors import GradsketchError, StoreError

__all__ = ["Folder", "LocalFolder", "RemoteFolder", "open_folder", "written_whole"]

_TEMPORARY = ".tmp-"
_counter = itertools.count()
_MADV_POPULATE_READ = 22  # Python has no name for it yet


class Folder(ABC):
    """A flat folder of immutable files."""

    uri: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all finished files, sorted; empty where the folder does not exist."""

    @abstractmethod
    def read(self, name: str, *, whole: bool = False) -> pa.Buffer:
        """Return a file's bytes, memory-mapped; ``whole`` says that all of them are about to be used.

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

    @abstractmethod
    def clean(self) -> None:
        """Remove what dead writers on this machine left unfinished."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


def open_folder(path: str | Path) -> Folder:
    """Return the folder at a local path or a URI such as ``s3://bucket/index``.

    Raises:
        StoreError: the URI's scheme is unknown or its service refuses.
    """
    if "://" not in str(path):
        return LocalFolder(Path(path))
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


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and put the file in its place at the end; a failure leaves what was there.

    Raises:
        StoreError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{next(_counter)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _failed("write", str(path), error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class LocalFolder(Folder):
    """A folder on a local disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.uri = path, str(path)

    def names(self) -> list[str]:
        if not self.path.exists():
            return []
        try:
            return sorted(e.name for e in os.scandir(self.path) if e.is_file() and _TEMPORARY not in e.name)
        except OSError as error:
            raise _failed("list", self.uri, error) from error

    def read(self, name: str, *, whole: bool = False) -> pa.Buffer:
        try:
            with (self.path / name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise _failed("read", str(self.path / name), error) from error
        if whole:
            # One system call in place of a page fault every few pages, and one large read where the disk is asked.
            with contextlib.suppress(OSError, ValueError):  # before Linux 5.14, and elsewhere
                mapped.madvise(_MADV_POPULATE_READ)
        return pa.py_buffer(mapped)

    def write(self, name: str, data: pa.Buffer | bytes, *, replace: bool = True) -> bool:
        target = self.path / name
        temporary = self.path / f"{name}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{next(_counter)}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(target)
            elif not _link_or_rename(temporary, target):
                return False
            _fsync_folder(self.path)
        except OSError as error:
            raise _failed("write", str(target), error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def clean(self) -> None:
        mark = f"{_TEMPORARY}{socket.gethostname()}-"
        for file in self.path.glob(f"*{mark}*"):
            process = file.name.rpartition(mark)[2].partition("-")[0]
            if process.isdigit() and not _is_alive(int(process)):
                with contextlib.suppress(OSError):
                    file.unlink()


class RemoteFolder(Folder):
    """A folder in an object store: one PUT of a finished file is the commit; reads go through a local cache.

    The cache is ``$GRADSKETCH_CACHE``, or ``gradsketch`` under ``$XDG_CACHE_HOME`` or ``~/.cache``; a file is fetched
    again when its size or time of change differ.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str, uri: str) -> None:
        self.filesystem, self.path, self.uri = filesystem, path.rstrip("/"), uri

    def names(self) -> list[str]:
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except (OSError, pa.ArrowException) as error:
            raise _failed("list", self.uri, error) from error
        return sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.File)

    def read(self, name: str, *, whole: bool = False) -> pa.Buffer:
        try:
            info = self.filesystem.get_file_info(f"{self.path}/{name}")
            if info.type != pyarrow.fs.FileType.File:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            cache = LocalFolder(_cache_root() / hashlib.sha256(self.uri.encode()).hexdigest()[:16])
            cached = f"{name}-{info.size}-{info.mtime_ns or 0}"
            if not (cache.path / cached).exists():
                with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                    cache.write(cached, file.read_buffer())
            return cache.read(cached, whole=whole)
        except (OSError, pa.ArrowException) as error:
            raise _failed("read", f"{self.uri}/{name}", error) from error

    def write(self, name: str, data: pa.Buffer | bytes, *, replace: bool = True) -> bool:
        path = f"{self.path}/{name}"
        try:
            if not replace and self.filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
                return False
            self.filesystem.create_dir(self.path, recursive=True)
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
        except (OSError, pa.ArrowException) as error:
            raise _failed("write", f"{self.uri}/{name}", error) from error
        return True

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self.filesystem, f"{self.path}/{name}", f"{self.uri.rstrip('/')}/{name}")

    def clean(self) -> None:
        """Do nothing: an unfinished upload never becomes visible."""


def _cache_root() -> Path:
    chosen = os.environ.get("GRADSKETCH_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gradsketch"


def _link_or_rename(temporary: Path, target: Path) -> bool:
    """Give the file its name unless that is taken; return whether it was free."""
    try:
        os.link(temporary, target)  # fails where another writer was first; a rename would not
    except FileExistsError:
        return False
    except OSError as error:
        # Some network and FAT file systems have no hard links. Writers of one store write equal manifests.
        if target.exists():
            return False
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        temporary.replace(target)
    return True


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _failed(verb: str, where: str, error: Exception) -> GradsketchError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"no room to {verb} {where} ({error})",
            "enough free disk space and quota",
            "Free some space and run the same command again: finished shards are kept",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"no permission to {verb} {where} ({error})", "a folder you may use", "Choose another folder")
    return StoreError(f"cannot {verb} {where} ({error})", "a reachable file", "Check the path and try again")
