"""Files are written whole or not at all, and kept state is taken up only by the same work.

A file is written under a temporary name in its own folder, flushed to the disk and renamed, and then the folder is
flushed. So a kill, a full disk or a power cut leaves the old file or the new one, never a part. State that a later
process reads back carries a CRC-32 of all its bytes, and facts that say what it belongs to. Whoever takes it up
compares those facts with its own first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gradsketch.errors import DamageError, FingerprintError, StoreError

if TYPE_CHECKING:
    import torch

__all__ = [
    "checksum",
    "cleaned",
    "damaged",
    "failed",
    "is_sealed",
    "is_temporary",
    "packed_tensors",
    "read_bytes",
    "read_record",
    "read_tensors",
    "record_checksum",
    "record_of",
    "record_text",
    "require_same",
    "require_undamaged",
    "seal",
    "unpacked_tensors",
    "write_file",
    "write_record",
    "write_tensors",
    "written_whole",
]

_TEMPORARY = ".tmp-"
_CRC_MARK = b"gradsketch-crc32="
_CRC_BYTES = 8  # hexadecimal digits
_PIECE = 1 << 20
_counter = itertools.count()


# --- files ---


def write_file(path: str | Path, data: str | bytes | memoryview, *, replace: bool = True) -> bool:
    """Write a whole file, making its folder; return False where it was there and ``replace`` is False.

    A text is written in UTF-8.

    Raises:
        StoreError: the disk is full, the folder read-only, and the like; what was there is still there.
    """
    with _in_place_of(Path(path), replace) as (temporary, placed), temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return placed[0]


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, and put the file in its place at the end; a failure leaves what was there.

    Raises:
        StoreError: the file cannot be written.
    """
    with _in_place_of(Path(path), replace=True) as (temporary, _):
        yield temporary


@contextlib.contextmanager
def _in_place_of(path: Path, replace: bool) -> Iterator[tuple[Path, list[bool]]]:
    """Yield a temporary path, and a list that tells at the end whether the file took its place."""
    placed: list[bool] = []
    if path.exists() and not (path.is_file() or path.is_dir()):
        # A device or a pipe, such as /dev/stdout. It keeps nothing, and a file must not take its place.
        with _explained("write", str(path)):
            yield path, placed
        placed.append(True)
        return
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f"{target.name}{_mark()}{os.getpid()}-{next(_counter)}")
    try:
        with _explained("write", str(path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary, placed
            _fsync(temporary)
            placed.append(_placed(temporary, target, replace))
            _fsync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that has not taken its place yet."""
    return _TEMPORARY in name


def cleaned(folder: Path) -> None:
    """Remove what writers on this machine left unfinished when they were killed."""
    mark = _mark()
    for file in folder.glob(f"*{mark}*"):
        process = file.name.rpartition(mark)[2].partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            with contextlib.suppress(OSError):
                file.unlink()


def failed(verb: str, where: str, error: Exception) -> StoreError:
    """Return the error for a file that the system does not let us read or write."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"no room to {verb} {where} ({error})",
            "enough free disk space and quota",
            "Free some space and run the same command again: what is finished is kept",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"no permission to {verb} {where} ({error})", "a folder you may use", "Choose another folder")
    return StoreError(f"cannot {verb} {where} ({error})", "a reachable file", "Check the path and try again")


@contextlib.contextmanager
def _explained(verb: str, where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failed(verb, where, error) from error


def _mark() -> str:
    return f"{_TEMPORARY}{socket.gethostname()}-"


def _placed(temporary: Path, target: Path, replace: bool) -> bool:
    """Give a finished file its name; return False where one has it already and may not be replaced."""
    if replace:
        temporary.replace(target)
        return True
    try:
        os.link(temporary, target)
    except OSError as error:
        # Some network and FAT file systems have no hard links. Writers of one store write equal manifests.
        if target.exists():
            return False
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        temporary.replace(target)
    return True


def _fsync(path: Path) -> None:
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


# --- state that is read back ---


def checksum(data: Any, start: int = 0) -> int:
    """Return the CRC-32 of a buffer, continued from ``start``."""
    return zlib.crc32(data, start)


def damaged(source: str | Path, why: str) -> DamageError:
    """Return the error for a state file whose bytes are not those that were written."""
    return DamageError(
        f"{source} is damaged ({why})",
        "a file as gradsketch wrote it",
        "If gradsketch made this file, delete it to start again; otherwise choose another path",
    )


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object, with its checksum.

    Raises:
        StoreError: it cannot be written.
    """
    write_file(path, record_text(record))


def read_record(path: str | Path) -> dict[str, Any]:
    """Return what ``write_record`` wrote.

    Raises:
        StoreError: it is damaged, or cannot be read.
    """
    return record_of(read_bytes(path), path)


def read_bytes(path: str | Path) -> bytes:
    """Return what a file holds.

    Raises:
        StoreError: it cannot be read.
    """
    with _explained("read", str(path)):
        return Path(path).read_bytes()


def record_text(record: Mapping[str, Any]) -> str:
    """Return a JSON object as text, with its checksum."""
    return json.dumps({**record, "crc32": record_checksum(record)}, indent=1) + "\n"


def record_of(data: bytes, source: str | Path) -> dict[str, Any]:
    """Return the JSON object that ``record_text`` was given.

    Raises:
        DamageError: the text is no such object, or its checksum differs.
    """
    try:
        record: dict[str, Any] = json.loads(data)
        stored = record.pop("crc32")
        sound = stored == record_checksum(record)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(source, f"{type(error).__name__}: {error}") from error
    if not sound:
        raise damaged(source, "its checksum does not match")
    return record


def record_checksum(record: Mapping[str, Any]) -> str:
    """Return the checksum of a JSON object: of its values, so that a text indented otherwise is still sound."""
    return f"{checksum(json.dumps(record, sort_keys=True).encode()):08x}"


def write_tensors(path: str | Path, content: Any) -> None:
    """Write what ``torch.save`` takes, with its checksum; ``torch.load`` reads the file as usual.

    Raises:
        StoreError: it cannot be written.
    """
    import torch

    with written_whole(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise failed("write", str(path), error) from error
        seal(temporary)


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Return what ``write_tensors`` wrote, with its tensors on ``device``.

    Raises:
        StoreError: it is damaged, or cannot be read.
    """
    import torch

    with _explained("read", str(path)), Path(path).open("rb") as file:
        if not _checked(file):
            raise damaged(path, "its checksum does not match")
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def seal(path: str | Path) -> None:
    """Append the checksum of a file to it, which programs that load or read such files pass over."""
    with Path(path).open("r+b") as file:
        _seal(file)


def is_sealed(path: str | Path) -> bool:
    """Whether a file is there and ends with its checksum."""
    try:
        with Path(path).open("rb") as file:
            return bool(_checked(file))
    except OSError:
        return False


def require_undamaged(path: str | Path) -> None:
    """Check a file that may be somebody else's, which has no checksum.

    Raises:
        StoreError: it has one that does not match, or cannot be read.
    """
    with _explained("read", str(path)), Path(path).open("rb") as file:
        if _checked(file) is False:
            raise damaged(path, "its checksum does not match")


def packed_tensors(content: Any) -> bytes:
    """Return the bytes of the file that ``write_tensors`` would write, for folders that are no local paths."""
    import torch

    file = io.BytesIO()
    torch.save(content, file)
    _seal(file)
    return file.getvalue()


def unpacked_tensors(data: bytes, source: str | Path) -> Any:
    """Return what ``packed_tensors`` was given.

    Raises:
        DamageError: the checksum does not match.
    """
    import torch

    file = io.BytesIO(data)
    if not _checked(file):
        raise damaged(source, "its checksum does not match")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _seal(file: IO[bytes] | io.BytesIO) -> None:
    """Append the checksum as the comment of the ZIP archive that ``torch.save`` wrote: readers pass over it."""
    file.seek(-2, os.SEEK_END)  # the archive's last two bytes are the length of its comment
    file.write((len(_CRC_MARK) + _CRC_BYTES).to_bytes(2, "little") + _CRC_MARK)
    size = file.tell()
    file.write(b"%08x" % _checksum_of(file, size))


def _checked(file: IO[bytes] | io.BytesIO) -> bool | None:
    """Return whether the checksum at the end of a file matches; None where there is none."""
    size = file.seek(0, os.SEEK_END) - _CRC_BYTES
    file.seek(max(0, size - len(_CRC_MARK)))
    mark, stored = file.read(len(_CRC_MARK)), file.read(_CRC_BYTES)
    return None if mark != _CRC_MARK else stored == b"%08x" % _checksum_of(file, size)


def _checksum_of(file: IO[bytes] | io.BytesIO, size: int) -> int:
    """Return the checksum of the first ``size`` bytes, and leave the file where they end."""
    file.seek(0)
    total = 0
    for start in range(0, size, _PIECE):
        total = checksum(file.read(min(_PIECE, size - start)), total)
    return total


# --- is it the same work? ---


def require_same(now: Mapping[str, Any], stored: Any, source: str | Path, *, fix: str | None = None) -> None:
    """Check that what is about to be done has the facts of what was done.

    Raises:
        FingerprintError: naming each fact that differs, with both values, and both ways on.
    """
    if not isinstance(stored, Mapping):
        raise damaged(source, "it does not say what it was made of")
    now, stored = (json.loads(json.dumps(facts, default=str)) for facts in (now, stored))  # a tuple is a list on disk
    different = [key for key in {**stored, **now} if now.get(key) != stored.get(key)]
    if different:
        wanted, came = (
            "; ".join(f"{key}{verb} {_brief(_differing(a.get(key), b.get(key)))}" for key in different)
            for verb, a, b in (("", stored, now), (" is now", now, stored))
        )
        way_on = fix or f"Choose another path for this work, or delete {source} to start again"
        raise FingerprintError(came, f"what {source} was made with: {wanted}", way_on)


def _differing(value: Any, other: Any) -> Any:
    """Return a fact without what the other one agrees in."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return value
    return {k: _differing(v, other.get(k)) for k, v in value.items() if k not in other or other[k] != v}


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:159] + "…"
