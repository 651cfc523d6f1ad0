"""Where bytes come from: a local disk, an object store by pyarrow's or fsspec's file systems, or a pipe.

Compressed files are unpacked by Arrow's own codecs, a piece at a time, and never held whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs

from gradsketch.errors import InputError, StoreError
from gradsketch.reading.connection import hub_reached, reached

__all__ = ["PACKINGS", "READ_ERRORS", "Source", "filesystem_of", "local", "room_for", "spooled", "whole"]

T = TypeVar("T")
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
# What libraries raise where a file is damaged, or an object store does not answer.
READ_ERRORS = (pa.ArrowException, ValueError, OSError, EOFError, RecursionError, OverflowError, zlib.error)
PIECE = 1 << 20
# What a packed file may unpack to: as much as this, or so many times its own size. Texts shrink to a third or a tenth.
_UNPACKED_BYTES, _UNPACKED_RATIO = 1 << 28, 100
_HEAD = 1 << 16  # first bytes, which tell what a file is
_GOOGLE, _OTHER_GOOGLE = "https://storage.googleapis.com", {"STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"}
_LEFT_FREE = 1 << 30  # bytes that a temporary copy leaves on its disk


@dataclass(frozen=True)
class Source:
    """One file: where it lies, its size, and the name that a person knows it by."""

    filesystem: pa.fs.FileSystem
    path: str
    name: str
    size: int
    kept: Any = field(default=None, repr=False, compare=False)  # what deletes a temporary file when it is let go of
    changed: int | None = None  # when a local file was written last, in nanoseconds

    @property
    def packing(self) -> str | None:
        """The codec that its name ends with."""
        return PACKINGS.get(PurePosixPath(self.name).suffix.lower())

    @property
    def kind(self) -> str:
        """The suffix that says what it holds, such as ".jsonl" of "facts.jsonl.gz"."""
        name = PurePosixPath(self.name)
        return (PurePosixPath(name.stem) if self.packing else name).suffix.lower()

    def open(self) -> pa.NativeFile:
        """Open its bytes, as they lie, at any place.

        Raises:
            StoreError: it has changed since it was found. Where its rows begin is known from then.
        """
        self.require_unchanged()
        return self.filesystem.open_input_file(self.path)

    def require_unchanged(self) -> None:
        """Refuse a local file that was written to, replaced or removed since it was found.

        Raises:
            StoreError: it was.
        """
        if self.changed is None:
            return
        try:
            found = Path(self.path).stat()
            same = (found.st_size, found.st_mtime_ns) == (self.size, self.changed)
        except OSError:
            same = False
        if not same:
            raise StoreError(
                f"{self.name} was changed or removed while it was read",
                "a file that stays as it is until the work is done",
                "Run the same command again; what is finished is compared with the data as it is then",
            )

    def pieces(self, start: int = 0) -> Iterator[bytes]:
        """Yield its content from byte ``start`` on, unpacked.

        Raises:
            ValueError: it unpacks to more than any data does: a few kilobytes can stand for terabytes.
        """
        with self.open() as raw:
            if self.packing is None:
                raw.seek(start)
                yield from _read(raw)
                return
            most, done = max(_UNPACKED_BYTES, _UNPACKED_RATIO * self.size), 0
            with pa.CompressedInputStream(raw, self.packing) as stream:
                for piece in _read(stream):
                    done += len(piece)
                    if done > most:
                        raise ValueError(f"it unpacks to more than {most:,} bytes; unpack it yourself if that is right")
                    if done > start:
                        yield piece[max(0, len(piece) - (done - start)) :]

    def head(self) -> bytes:
        """Return the first bytes of its content, 64 kB at most."""
        if self.packing is not None:
            return next(self.pieces(), b"")[:_HEAD]
        with self.open() as file:
            return bytes(file.read(min(_HEAD, self.size)))


def _read(file: pa.NativeFile) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


def local(path: Path, name: str | None = None) -> Source:
    """Return a file on this machine."""
    found = path.stat()
    return Source(pyarrow.fs.LocalFileSystem(), str(path), name or path.name, found.st_size, changed=found.st_mtime_ns)


def filesystem_of(uri: str) -> tuple[pa.fs.FileSystem, str]:
    """Return the file system of a URI and the path in it: by pyarrow where it knows the scheme, by fsspec otherwise.

    Raises:
        InputError: neither knows the scheme, or the service refuses.
    """
    scheme = uri.partition("://")[0]
    # Google's client tries for a quarter of an hour; of the others each gives up in seconds.
    is_google = scheme in ("gs", "gcs") and not (_OTHER_GOOGLE & os.environ.keys() or "endpoint_override" in uri)
    if is_google and not reached(_GOOGLE):
        raise InputError(f"{uri}, and no connection to {_GOOGLE}", "a connection", "Check the network")
    if scheme == "hf" and not hub_reached():
        raise InputError(f"{uri}, and no connection to the hub", "a connection", "Check the network")
    try:
        if scheme in ("s3", "gs", "gcs", "file", "hdfs", "abfs", "abfss"):
            filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
        else:
            import fsspec

            handler, path = fsspec.core.url_to_fs(uri)
            filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(handler))
    except ImportError as error:
        raise InputError(
            f"{uri}, for which a package is missing ({error})",
            f"the file system of {scheme}://",
            "Type: pip install 'gradsketch[data]', and the package that fsspec names",
        ) from error
    except READ_ERRORS as error:
        raise InputError(
            f"{uri} cannot be opened ({error})",
            "a path, or a URI that pyarrow or fsspec knows: s3, gs, abfs, hf, http, …",
            "Check the URI, and the credentials in the environment",
        ) from error
    return filesystem, path


def spooled(stream: Any, name: str) -> Source:
    """Copy what comes out of a pipe to a temporary file, which goes when nobody holds it.

    Raises:
        InputError: the disk of temporary files has less than a gibibyte left.
    """
    file = tempfile.NamedTemporaryFile(prefix="gradsketch-")  # noqa: SIM115 - lives as long as the rows do
    while piece := stream.read(PIECE):
        if not room_for(len(piece)):
            raise InputError(
                f"{name} of more than the {file.tell():,} bytes that fit on the disk of {tempfile.gettempdir()}",
                "a pipe whose content fits there",
                "Set TMPDIR to a folder on a larger disk, or save it to a file yourself",
            )
        file.write(piece)
    file.flush()
    path = Path(file.name)
    return Source(pyarrow.fs.LocalFileSystem(), str(path), name, path.stat().st_size, file)


def room_for(size: int) -> bool:
    """Whether so many bytes fit on the disk of temporary files."""
    return shutil.disk_usage(tempfile.gettempdir()).free >= size + _LEFT_FREE


def whole(name: str, read: Callable[[], T]) -> T:
    """Read a file as a whole; a failure becomes an error that names it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return read()
    except InputError:
        raise
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} cannot be read: {reason}", "a sound file of that kind", "Check the file") from error
