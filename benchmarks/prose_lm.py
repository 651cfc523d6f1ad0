"""A language model of a page of reference prose, which it does not learn by heart: a second truth for attribution.

Pieces of 32 words from the language reference that comes with Python (``pydoc_data``), of its topics that have at least
twelve. 640 are trained on, eight times; 30 others are the questions. What matters to a question is spread over many
rows, those of its own topic first of all. The text is that of the Python that runs this.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from small_lm import Row, SmallLM

from gradsketch.random import Stream

__all__ = ["PROSE", "prose"]

LENGTH, LEAST_PIECES, LEAST_COUNT = 32, 12, 3
ROWS, QUESTIONS = 640, 30


@cache
def prose() -> tuple[list[Row], list[Row], int]:
    """Return training rows and questions, tokenised by words, and the size of the vocabulary; ``fact`` is the topic."""
    found = [(topic, piece) for topic, words in _topics().items() for piece in _pieces(words)]
    counts = Counter(word for _, piece in found for word in piece)
    places = {word: i + 2 for i, word in enumerate(sorted(word for word in counts if counts[word] >= LEAST_COUNT))}

    def encoded(number: int) -> Row:
        topic, piece = found[number]
        ids = [places.get(word, 1) for word in piece]
        return {"text": " ".join(piece), "fact": topic, "input_ids": ids, "labels": ids}

    order = Stream(0, "pieces").permutation(len(found)).tolist()
    taught, asked = order[:ROWS], order[ROWS : ROWS + QUESTIONS]
    return [encoded(i) for i in taught], [encoded(i) for i in asked], len(places) + 2


def _topics() -> dict[str, list[str]]:
    from pydoc_data.topics import topics

    return {name: re.findall(r"[a-z]+|\d|[^\sa-z\d]", topics[name].lower()) for name in sorted(topics)}


def _pieces(words: list[str]) -> list[list[str]]:
    pieces = [words[start : start + LENGTH] for start in range(0, len(words) - LENGTH + 1, LENGTH)]
    return pieces if len(pieces) >= LEAST_PIECES else []


PROSE = SmallLM(prose, epochs=8)
