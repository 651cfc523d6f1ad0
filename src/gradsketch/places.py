"""Places of rows and examples, as people hand them in: lists, tensors and arrays of whole numbers."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from gradsketch.errors import InputError

__all__ = ["as_places"]


def as_places(values: Any, count: int, name: str) -> list[int]:
    """Return places from 0 to ``count`` − 1 as a list of int; ``name`` says in an error what they are of.

    True and False are numbers to Python, so that a mask would be read as the places 1 and 0. And a set of tensors finds
    no int in it, because tensors are equal to others but not alike to a hash.

    Raises:
        InputError: a mask, a fraction, a text, or a place out of range.
    """
    given = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise _refused(values, count, name)
    return [_place(value, count, name) for value in given]


def _place(value: Any, count: int, name: str) -> int:
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= int(number) < count:
        raise _refused(value, count, name)
    return int(number)


def _refused(came: Any, count: int, name: str) -> InputError:
    fix = "Type [i for i, yes in enumerate(mask) if yes]" if isinstance(came, bool) else "Check the numbers"
    return InputError(f"{name} {came!r}", f"whole numbers from 0 to {count - 1}", fix)
