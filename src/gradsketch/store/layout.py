"""Whether an Arrow file is packed, which shows before it is unpacked: a few kilobytes can stand for any size.

Arrow's readers unpack a batch as they open it, and tell nothing of it before. So its place and its header are read here
from the FlatBuffers that describe them: https://arrow.apache.org/docs/format/Columnar.html (format/File.fbs and
format/Message.fbs). A table there is a list of fields, whose places stand in a table of offsets before it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["require_plain"]

_MAGIC = b"ARROW1"
# Numbers of fields in their tables.
_DICTIONARIES, _BATCHES = 2, 3  # of the footer
_HEADER, _METADATA = 2, 4  # of a message
_COMPRESSION = 3  # of a batch


def require_plain(data: Any) -> None:
    """Check that the first batch of an Arrow file lies in it as it is, and that nothing else is read with it.

    Raises:
        ValueError: it is packed, refers to dictionaries, or the file is no Arrow file.
    """
    view = memoryview(data).cast("B")
    if bytes(view[-len(_MAGIC) :]) != _MAGIC:
        raise ValueError("no Arrow file")
    end = len(view) - len(_MAGIC) - 4
    footer = _Table(view, _followed(view, end - _number(view, end)))
    if footer.length(_DICTIONARIES):
        raise ValueError("a batch with dictionaries, which no file of an index has")
    message = _number(view, footer.vector(_BATCHES) + 4, size=8)
    skipped = 8 if _number(view, message) == 0xFFFFFFFF else 4  # older files have no mark before the length
    table = _Table(view, _followed(view, message + skipped))
    header = _Table(view, _followed(view, table.field(_HEADER)))
    if header.field(_COMPRESSION) or table.field(_METADATA):  # where Arrow said it before version 1
        raise ValueError("a packed batch, which no file of an index has")


class _Table:
    """One table of a FlatBuffer."""

    def __init__(self, view: memoryview, at: int) -> None:
        self.view, self.at = view, at
        self.offsets = at - _number(view, at, signed=True)

    def field(self, number: int) -> int:
        """Return the place of a field, or 0 where the table has none of that number."""
        at = 4 + 2 * number
        offset = _number(self.view, self.offsets + at, size=2) if at < _number(self.view, self.offsets, size=2) else 0
        return self.at + offset if offset else 0

    def vector(self, number: int) -> int:
        """Return the place of a list: its length, and then its entries."""
        place = self.field(number)
        return _followed(self.view, place) if place else 0

    def length(self, number: int) -> int:
        """Return how many entries a list has."""
        place = self.vector(number)
        return _number(self.view, place) if place else 0


def _followed(view: memoryview, place: int) -> int:
    return place + _number(view, place)


def _number(view: memoryview, place: int, *, size: int = 4, signed: bool = False) -> int:
    if not 0 <= place <= len(view) - size:
        raise ValueError("a place outside of the file")
    return int.from_bytes(view[place : place + size], "little", signed=signed)
