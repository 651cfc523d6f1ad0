"""The page for the hits of a query: each question with its answer, and the training examples behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gradsketch.gradients.tasks.conversations import Turn, shown_turns, transcript
from gradsketch.report.figure import BLUE, RED, finish, new_figure
from gradsketch.report.file import write
from gradsketch.report.page import render
from gradsketch.table import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["hits_figure", "hits_html", "hits_page", "shown_hit", "shown_queries"]

_TITLE = "Which training examples made the model say this?"
_LONGEST = 4000  # characters of a text that are shown; a page of many book-length texts would open in no phone
_SHADES = 9  # steps of a token's colour
_IMAGE = "data:image/"
_WORDS, _WORD = 5, 24  # strongest words that are listed, and characters of each
_ADDRESS = 60  # characters of a web address
_PANELS, _BARS, _LABEL = 6, 10, 48  # queries, hits of each, and characters of a text in a figure


@runtime_checkable
class Token(Protocol):
    """One token and what it adds to the score."""

    @property
    def token(self) -> str: ...
    @property
    def value(self) -> float: ...


@runtime_checkable
class Hit(Protocol):
    """One training example and its score."""

    @property
    def rank(self) -> int: ...
    @property
    def id(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def text(self) -> str | None: ...
    @property
    def loss(self) -> float: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tokens(self) -> Sequence[Token]: ...
    @property
    def beyond_tokens(self) -> float: ...


@runtime_checkable
class QueryHits(Protocol):
    """One query and its hits."""

    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def loss(self) -> float: ...
    @property
    def members(self) -> int: ...
    @property
    def example(self) -> Any: ...
    @property
    def proponents(self) -> Sequence[Hit]: ...
    @property
    def opponents(self) -> Sequence[Hit]: ...


@runtime_checkable
class Hits(Protocol):
    """What a page shows: the queries, what the score means, and what it cost."""

    @property
    def queries(self) -> Sequence[QueryHits]: ...
    @property
    def score(self) -> Any: ...
    @property
    def index(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def d(self) -> int: ...
    @property
    def cost(self) -> Any: ...
    @property
    def sign(self) -> str: ...
    def __len__(self) -> int: ...


def hits_page(
    hits: Hits,
    path: str | Path,
    *,
    title: str = _TITLE,
    introduction: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML page and return its path.

    Texts are shown up to 4,000 characters, around the strongest token of those that are longer. A metadata value that
    is an image (``data:image/png;base64,…``) is shown as one, and one that is True by its name alone.

    Args:
        hits: what ``index.query`` returned.
        path: where to write; a file there is replaced, whole or not at all.
        title: the headline.
        introduction: a sentence or two under it.
        notes: one line under each query, in order; may be shorter than the queries.

    Raises:
        InputError: the path is a folder.
        StoreError: the path cannot be written to.
    """
    page = hits_html(hits, title=title, introduction=introduction, notes=notes)
    return write(path, page.encode())


def hits_html(
    hits: Hits,
    *,
    title: str = _TITLE,
    introduction: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Return the text of the page that ``hits_page`` writes."""
    context = {
        "title": title,
        "introduction": introduction,
        "hits": hits,
        "queries": shown_queries(hits, notes),
        "shared_scale": hits.score.comparable,
        "version": version("gradsketch"),
    }
    return render("hits.html", context)


def shown_queries(hits: Hits, notes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return what is shown of each query and of its hits, as plain values that are not escaped."""
    scale = _largest(hits.queries) if hits.score.comparable else None
    return [_query(query, scale, notes[i] if i < len(notes) else "") for i, query in enumerate(hits.queries)]


def hits_figure(hits: Hits) -> Figure:
    """Draw the scores of the first hits of the first six queries as bars, one panel a query."""
    shown = hits.queries[:_PANELS]
    if not shown:
        return new_figure(8.0, 0.8)
    chosen = [[*query.proponents[:_BARS], *reversed(query.opponents[:_BARS])] for query in shown]
    figure = new_figure(8.0, 0.8 + sum(0.6 + 0.25 * len(some) for some in chosen))
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[max(len(some), 1) for some in chosen])
    for axes, query, some in zip(panels[:, 0], shown, chosen, strict=True):
        scores = [hit.score if math.isfinite(hit.score) else 0.0 for hit in some]
        axes.barh(range(len(some)), scores, color=[BLUE if score >= 0 else RED for score in scores])
        axes.set_yticks(range(len(some)), [_label(hit.text or hit.id) for hit in some], fontsize=8, parse_math=False)
        axes.invert_yaxis()
        title = query.text if query.answer is None else f"{query.text} → {query.answer}"
        axes.set_title(_label(title), fontsize=9, loc="left", parse_math=False)
    panels[-1, 0].set_xlabel(f"score: {hits.score.name}")
    return finish(figure)


def _label(text: str) -> str:
    return one_line(text, _LABEL)


def _query(query: QueryHits, scale: float | None, note: str) -> dict[str, Any]:
    scale = scale or _largest([query])
    hits = (*query.proponents, *query.opponents)
    strongest = max((abs(token.value) for hit in hits for token in hit.tokens), default=0.0)
    return {
        "text": query.text,
        "turns": [(turn.role, turn.text) for turn in _turns(query.example, query.text)],
        "answer": query.answer,
        "loss": _number(query.loss),
        "members": query.members,
        "explained": any(hit.tokens for hit in hits),
        "note": note,
        "images": _images(query.example) if isinstance(query.example, Mapping) else [],
        "proponents": [shown_hit(hit, scale, strongest) for hit in query.proponents],
        "opponents": [shown_hit(hit, scale, strongest) for hit in query.opponents],
    }


def shown_hit(hit: Hit, scale: float, strongest: float) -> dict[str, Any]:
    """Return what is shown of one hit: bars end at ``scale``, and the deepest colour is that of ``strongest``."""
    pieces = [(token.token, token.value) for token in hit.tokens] or [(hit.text or "", 0.0)]
    shown, before, after = _excerpt(pieces)
    turns = _turns(hit.metadata, hit.text)
    # Special tokens have no letters to colour.
    beyond = hit.beyond_tokens + sum(value for text, value in pieces if not text)
    return {
        "rank": hit.rank,
        "score": _number(hit.score, "+.3g") if hit.score else "0",
        "width": round(100 * min(abs(hit.score) / scale, 1.0), 2) if scale and math.isfinite(hit.score) else 0,
        "sign": "for" if hit.score >= 0 else "against",
        "pieces": [_piece(*piece, strongest) for piece in _by_turn(shown, turns, before)],
        "before": before,
        "after": after,
        "flags": [str(name) for name, value in hit.metadata.items() if value is True],
        "facts": [("id", hit.id), *_facts(hit.metadata, turns), ("loss", _number(hit.loss))],
        "images": _images(hit.metadata),
        # What rounding leaves is no news: only a share that a reader would miss is shown.
        "beyond": f"{beyond:+.2g}" if abs(beyond) > 0.01 * abs(hit.score) and hit.tokens else "",
        "words": _strongest(pieces),
    }


def _strongest(pieces: Sequence[tuple[str, float]]) -> str:
    """Return the strongest words with their numbers, for those who cannot see colours."""
    words = [(text, value) for text, value in pieces if value and text.strip()]
    words.sort(key=lambda word: abs(word[1]), reverse=True)
    return ", ".join(f"{one_line(text, _WORD)} {value:+.2g}" for text, value in words[:_WORDS])


def _turns(row: Any, text: str | None) -> tuple[Turn, ...]:
    """Return the turns of a row that is shown as their transcript."""
    found = shown_turns(row) if isinstance(row, Mapping) else None
    shown = transcript(found[0]) if found is not None else None
    return shown[1] if shown is not None and shown[0] == text else ()


def _by_turn(
    pieces: Sequence[tuple[str, float]], turns: Sequence[Turn], before: int
) -> Iterator[tuple[str, float, str]]:
    """Yield pieces, and a role where a turn begins; what the transcript writes for it there is left out."""
    starts = [turn.start - len(f"{turn.role}: ") for turn in turns]
    heads = [(max(start - 1, 0), turn.start, turn.role) for start, turn in zip(starts, turns, strict=True)]
    at = before
    for text, value in pieces:
        done, stop = at, at + len(text)
        for head, end, role in heads:
            if head >= stop or end <= done:
                continue
            if head >= done:
                yield text[done - at : head - at], value, ""
                yield "", 0.0, role
            done = min(end, stop)
        yield text[done - at :], value, ""
        at = stop


def _piece(text: str, value: float, role: str, strongest: float) -> dict[str, str]:
    word = text.lstrip() or text
    number = f"{value:+.2g}" if value else ""
    return {
        "space": text[: len(text) - len(word)],
        "word": word,
        "shade": _shade(value, strongest),
        "value": number,
        "role": role,
    }


def _facts(metadata: Mapping[str, Any], turns: Sequence[Turn] = ()) -> list[tuple[str, str]]:
    """Return what is neither an image nor a flag: those that are true are shown by name, the others not at all.

    The fields of a chat are not shown again either.
    """
    chat = shown_turns(metadata) if turns else None
    hidden = () if chat is None else chat[1]
    told = ((name, value) for name, value in metadata.items() if name not in hidden)
    shown = ((name, value) for name, value in told if value is not None and not isinstance(value, bool))
    return [(name, _readable(value)) for name, value in shown if not _is_image(value)]


def _readable(value: Any) -> str:
    """Return a value as a person writes it: lists by commas, the middle of a long address left out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_readable(item)}" for name, item in value.items())
    if isinstance(value, list | tuple | set):
        return ", ".join(_readable(item) for item in value)
    text = str(value)
    if "://" in text[:12] and len(text) > _ADDRESS and not text.count(" "):
        return f"{text[: _ADDRESS - 20]}…{text[-19:]}"
    return text


def _images(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), value) for name, value in values.items() if _is_image(value)]


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_IMAGE)


def _number(value: float, form: str = ".3g") -> str:
    return format(value, form) if math.isfinite(value) else "unknown"


def _largest(queries: Sequence[QueryHits]) -> float:
    scores = (abs(hit.score) for query in queries for hit in (*query.proponents, *query.opponents))
    return max((score for score in scores if math.isfinite(score)), default=0.0)


def _shade(value: float, strongest: float) -> str:
    """Return a class from p1 (faint, raises the score) to p9, or n1 to n9 (lowers it); none below half a step."""
    step = round(_SHADES * abs(value) / strongest) if strongest else 0
    return f"{'p' if value > 0 else 'n'}{step}" if step else ""


def _excerpt(pieces: list[tuple[str, float]]) -> tuple[list[tuple[str, float]], int, int]:
    """Return the pieces to show and how many characters are left out before and after them."""
    total = sum(len(text) for text, _ in pieces)
    if total <= _LONGEST:
        return pieces, 0, 0
    strongest = max(range(len(pieces)), key=lambda i: abs(pieces[i][1]))
    middle = sum(len(text) for text, _ in pieces[:strongest])
    start = min(max(middle - _LONGEST // 2, 0), total - _LONGEST)
    shown, position = [], 0
    for text, value in pieces:
        part = text[max(start - position, 0) : max(start + _LONGEST - position, 0)]
        position += len(text)
        if part:
            shown.append((part, value))
    return shown, start, total - start - _LONGEST
