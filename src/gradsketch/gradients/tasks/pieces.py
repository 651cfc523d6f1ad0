"""Which characters of a text each of its tokens stands for.

The pieces come from the tokenizer's own character offsets, because a token decoded alone is not what it stands for: a
byte of a letter decodes to U+FFFD, a SentencePiece token loses its space, a WordPiece token gains "##" and loses its
accents. Pieces always join to the text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradsketch.gradients.tasks.tokens import encode

__all__ = ["Piece", "decoded", "of_text", "pieces", "with_offsets"]

_JOINER = "\u200d"  # glues emoji into one
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
_FLAGS = ("\U0001f1e6", "\U0001f1ff")  # regional indicators, two of which make a flag
_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


class Piece(NamedTuple):
    """A piece of a text and how many tokens in a row stand for it: several inside one character, none in a gap."""

    text: str
    tokens: int


def of_text(tokenizer: Any, text: str, pair: str | None = None, *, limit: int | None) -> list[Piece]:
    """Return the pieces of a text (or a pair of texts) that is tokenised as ``encode`` does it."""
    return pieces(tokenizer, encode(tokenizer, text, pair, limit=limit, **with_offsets(tokenizer)), text, pair)


def with_offsets(tokenizer: Any) -> dict[str, bool]:
    """Return the option that makes a tokenizer tell its characters, where it can."""
    return {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}


def pieces(tokenizer: Any, encoded: Mapping[str, Any], text: str, pair: str | None = None) -> list[Piece]:
    """Return the pieces of one encoded text or pair; those of special tokens are empty."""
    offsets = encoded.get("offset_mapping")
    if offsets is None or (pair is not None and not hasattr(encoded, "sequence_ids")):
        return decoded(tokenizer, list(encoded["input_ids"]))
    if pair is None:
        return _cut(text, offsets)
    second = _start_of_second(encoded)
    return _cut(text, offsets[:second]) + _cut(pair, offsets[second:])


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """Return the pieces of tokens whose text or offsets are not known: what decoding them adds to those before."""
    if not hasattr(tokenizer, "decode"):
        return [Piece(str(i), 1) for i in ids]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found: list[Piece] = []
    start = read = 0  # the tokens of the last piece, in whose company the next ones decode as they should
    for place, token in enumerate(ids):
        known, now = (
            str(tokenizer.decode([i for i in ids[start:end] if i not in special])) for end in (read, place + 1)
        )
        if token in special and read == place:
            found.append(Piece("", 1))
            read = place + 1
        elif not now.endswith(_UNFINISHED) or place + 1 == len(ids):
            found.append(Piece(now[len(known) :], place + 1 - read))
            start, read = read, place + 1
    return found


def _start_of_second(encoded: Any) -> int:
    """Return the position of the first token of the second text."""
    numbers = encoded.sequence_ids(0)
    return next((place for place, number in enumerate(numbers) if number == 1), len(numbers))


def _cut(text: str, offsets: Sequence[Sequence[int]]) -> list[Piece]:
    """Cut a text where its tokens end, but never inside a character; space between two goes to the second."""
    found: list[Piece] = []
    done = 0
    for start, stop in offsets:
        if text[done:start].strip():  # letters that no token stands for: dropped by a normaliser, or cut off
            found.append(Piece(text[done:start], 0))
            done = start
        end = _end_of_character(text, stop)
        if start >= stop:
            found.append(Piece("", 1))
        elif end <= done:
            found[-1] = Piece(found[-1].text, found[-1].tokens + 1)
        else:
            found.append(Piece(text[done:end], 1))
            done = end
    return found


def _end_of_character(text: str, place: int) -> int:
    while 0 < place < len(text) and _joined(text, place):
        place += 1
    return place


def _joined(text: str, place: int) -> bool:
    """Whether a reader sees the code points on both sides of a place as one character."""
    before, after = text[place - 1], text[place]
    if _JOINER in (before, after) or unicodedata.category(after) in ("Mn", "Me", "Mc"):
        return True
    if _FLAGS[0] <= after <= _FLAGS[1]:
        flags = text[:place][::-1]
        return next((i for i, c in enumerate(flags) if not _FLAGS[0] <= c <= _FLAGS[1]), len(flags)) % 2 == 1
    return _SKIN_TONES[0] <= after <= _SKIN_TONES[1]
