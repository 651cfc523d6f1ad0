"""From a conversation to token ids and which of them count, by the tokenizer's own chat template.

A template is a program that may write a turn otherwise when more turns follow: Qwen3's drops the thinking of earlier
ones. So where a turn stands is never guessed from what it says. There are four proofs, tried in this order:

1. The template marks what the assistant says, by ``{% generation %}``.
2. What the template writes up to the turn, with the prompt for generation, begins what it writes through the turn,
   and that begins the whole. Then the turn is what a model has generated there.
3. What it writes up to the turn begins the whole, and the token that ends turns stands once between there and what the
   next turn says. A mark in the place of that shows where it begins.
4. A mark in the place of the turn's content shows what the template writes before and after it. Where the whole begins
   and ends with just that, the content stands between.

A turn without a proof is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import pieces as piece_of
from gradsketch.gradients.tasks.conversations import ASSISTANT, Conversation, Turns, starts, transcript
from gradsketch.gradients.tasks.pieces import Piece

__all__ = ["encode_chat", "pieces_of_chat", "template_digest"]

# The tags around what is generated, with the white space that Jinja takes away with them.
_OPENED = re.compile(r"(\{%[-+]?\s*generation\s*)([-+]?)%\}(?:(?<!\+%\})\n)?")
_CLOSED = re.compile(r"(?:(?<=\n)[ \t]+)?\{%([-+]?)(\s*endgeneration\b)")
# Private letters that no template trims, splits or escapes.
_MARK = "\ue0a0\ue0a1\ue0a2"
# Some templates write the day on which they run, and an index could not be asked on the next one. Llama's write this
# day where they do not know better.
_DAY = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


class _Span(NamedTuple):
    start: int
    stop: int


def encode_chat(
    tokenizer: Any, conversation: Conversation, turns: Turns, limit: int | None
) -> tuple[list[int], list[bool]]:
    """Return a conversation's token ids, cut to ``limit`` on the tokenizer's side, and for each whether it counts.

    The ids are those of ``apply_chat_template``. Of an assistant's turn count the tokens that it says and the token
    that ends it, but neither its header nor the white space after its end.

    Raises:
        InputError: no template, a conversation that it refuses, no turn that counts, one whose place has no proof, or
            none within ``limit``.
    """
    counted = conversation.counted(turns)
    chat = _Chat(tokenizer, conversation)
    spans = chat.generated(counted) if chat.marks_generation else [chat.turn(i) for i in counted]
    encoded = chat.encoded()
    kept = chat.kept(encoded, limit)
    ids, mask = list(encoded["input_ids"])[kept], chat.places(encoded, spans)[kept]
    if not any(mask[1:]):
        raise InputError(
            f"a conversation without a token of the assistant that counts (of {len(ids)} tokens)",
            "at least one predicted token" + (f" within max_length={limit}" if limit else ""),
            "Raise max_length, shorten the turns before, or drop the row",
        )
    return ids, mask


def pieces_of_chat(tokenizer: Any, conversation: Conversation, limit: int | None) -> list[Piece] | None:
    """Return the pieces of a conversation's tokens, which join to its transcript; those of the template are empty."""
    shown = transcript(conversation.messages)
    assert shown is not None
    text, turns = shown
    chat = _Chat(tokenizer, conversation)
    encoded = chat.encoded()
    kept = chat.kept(encoded, limit)
    found = piece_of.pieces(tokenizer, {name: values[kept] for name, values in encoded.items()}, chat.whole)
    if not chat.whole.startswith("".join(piece.text for piece in found)):
        return None
    places = []
    for i, (message, turn) in enumerate(zip(conversation.messages, turns, strict=True)):
        for name, start in starts(message).items():
            if span := chat.said(i, name):
                dropped = len(message[name].rstrip()) - len(chat.whole[slice(*span)].rstrip())
                places.append((span, turn.start + start + dropped))
    return _moved(found, places, text)


def template_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's chat template, or of all where it has several; empty where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16] if template else ""


class _Chat:
    """One conversation under a tokenizer's template."""

    def __init__(self, tokenizer: Any, conversation: Conversation) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "a conversation, but " + ("the task has no tokenizer" if tokenizer is None else "no chat template"),
                "a tokenizer with a chat_template",
                "Load the tokenizer of the chat model (--tokenizer NAME), or set tokenizer.chat_template",
            )
        self.tokenizer, self.conversation = tokenizer, conversation
        self._template = _of_one_day(str(tokenizer.get_chat_template(tools=conversation.tools)))
        self.marks_generation = bool(_OPENED.search(self._template))
        self.whole = self._written(conversation.messages)

    def encoded(self) -> dict[str, Any]:
        """Return the tokens of the whole; the template has written all special tokens itself."""
        offsets = piece_of.with_offsets(self.tokenizer)
        return dict(self.tokenizer(self.whole, add_special_tokens=False, **offsets))

    def kept(self, encoded: dict[str, Any], limit: int | None) -> slice:
        """Return which of the tokens are left when they are cut to ``limit`` as the tokenizer cuts texts."""
        beyond = max(0, len(encoded["input_ids"]) - limit) if limit is not None else 0
        from_left = getattr(self.tokenizer, "truncation_side", "right") == "left"
        return slice(beyond if from_left else 0, None if from_left else limit)

    def generated(self, counted: Sequence[int]) -> list[_Span]:
        """Return the characters that the template marks as generated in the turns that count.

        transformers has marks of its own, which it loses where a token leaves white space out.

        Raises:
            InputError: the template writes otherwise with marks in it, or nothing proves where the turn begins.
        """
        template = _OPENED.sub(_opened, _CLOSED.sub(_closed, self._template))
        parts = self._written(self.conversation.messages, chat_template=template).split(_MARK)
        if "".join(parts) != self.whole or len(parts) % 2 == 0:
            raise self._unproved("a chat template that writes otherwise when its generations are marked")
        ends = list(accumulate(len(part) for part in parts))
        spans = [_Span(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=False)]
        speaking = [i for i, turn in enumerate(self.conversation.messages) if turn["role"] == ASSISTANT]
        if self.conversation.left_out:
            if len(spans) != len(speaking):
                raise self._unproved(
                    f"a conversation of which some turns do not count, and a chat template that marks {len(spans)} "
                    f"generations of {len(speaking)} turns"
                )
            return [spans[speaking.index(i)] for i in counted]
        first = counted[0]
        begin = len(self.before(first)) if first != speaking[0] else 0
        return [span for span in spans if span.start >= begin]

    def turn(self, i: int) -> _Span:
        """Return the characters of an assistant's turn and of what ends it.

        Raises:
            InputError: nothing proves where they stand.
        """
        span = self._by_prefix(i) or self._by_end(i) or self._by_mark(i)
        if span is None or self._ends_in_prompt(i, span):
            raise self._unproved(
                f"turn {i + 1} of a conversation, which the chat template writes otherwise when more turns follow, or "
                "without the prompt for generation that it names"
            )
        return span

    def before(self, i: int) -> str:
        """Return what stands before an assistant's turn.

        Raises:
            InputError: the whole does not begin with it.
        """
        text = self._try(self.conversation.messages[:i], add_generation_prompt=True)
        if text is None or not self.whole.startswith(text):
            raise self._unproved(f"turn {i + 1} of a conversation, whose beginning the chat template does not prove")
        return text

    def said(self, i: int, name: str = "content") -> _Span | None:
        """Return where a text of a turn stands in the whole, by a mark in its place; None where that is not shown.

        It is the end of the text where the template drops its beginning, as earlier thinking.
        """
        text = self.conversation.messages[i].get(name)
        if not isinstance(text, str) or not text.strip():
            return None
        marked = self._marked(i, self.conversation.messages, name)
        if marked is None or not (self.whole.startswith(marked[0]) and self.whole.endswith(marked[1])):
            return None
        span = _Span(len(marked[0]), len(self.whole) - len(marked[1]))
        middle = self.whole[slice(*span)] if span.start < span.stop else ""
        return span if middle and text.rstrip().endswith(middle.rstrip()) else None

    def places(self, encoded: dict[str, Any], spans: Sequence[_Span]) -> list[bool]:
        """Return which tokens stand for a character of the spans."""
        ids, offsets = list(encoded["input_ids"]), encoded.get("offset_mapping")
        if offsets is not None:
            return [any(end > span.start and start < span.stop for span in spans) for start, end in offsets]
        mask = [False] * len(ids)
        for span in spans:
            start, stop = (self._tokens_of(self.whole[:place], ids) for place in span)
            mask[start:stop] = [True] * (stop - start)
        return mask

    def _by_prefix(self, i: int) -> _Span | None:
        messages = self.conversation.messages
        before = self._try(messages[:i], add_generation_prompt=True)
        through = self._try(messages[: i + 1])
        if before is None or through is None or not through.startswith(before) or not self.whole.startswith(through):
            return None
        # A template without a prompt for generation leaves the header to the turn.
        if before == self._try(messages[:i]):
            said = messages[i].get("content") or ""
            if not said.strip() or not through[len(before) :].lstrip().startswith(said.strip()):
                return None
        return _Span(len(before), self._end(through, len(before)))

    def _by_end(self, i: int) -> _Span | None:
        """Return a turn up to the token that ends it when nothing follows."""
        messages, following = self.conversation.messages, i + 1
        before = self._try(messages[:i], add_generation_prompt=True)
        through = self._try(messages[:following])
        if before is None or through is None or before == self._try(messages[:i]) or following == len(messages):
            return None
        end, marked = self._last_token(through), self._marked(following, messages)
        if end is None or marked is None or not all(self.whole.startswith(text) for text in (before, marked[0])):
            return None
        said = self.whole[len(before) : len(marked[0])]
        return _Span(len(before), len(before) + said.index(end) + len(end)) if said.count(end) == 1 else None

    def _by_mark(self, i: int) -> _Span | None:
        """Return the content of a turn that says something and does nothing else, with what ends it."""
        if self.conversation.messages[i].keys() - {"role", "content", "name"}:
            return None
        content, alone = self.said(i), self._marked(i, self.conversation.messages[: i + 1])
        if content is None or alone is None or not self.whole[content.stop :].startswith(alone[1]):
            return None
        through = self.whole[: content.stop + len(alone[1])]
        return _Span(content.start, self._end(through, content.start))

    def _ends_in_prompt(self, i: int, span: _Span) -> bool:
        """Whether what follows a turn's text ends as what stands before it: a prompt for generation, always written.

        Of the first templates of Llama 3 some write it whether it was asked for or not.
        """
        before = self._try(self.conversation.messages[:i])
        if before is None or self.whole[: span.start].rstrip() != before.rstrip():
            return False
        said = (self.conversation.messages[i].get("content") or "").strip()
        after = self.whole[slice(*span)].rpartition(said)[2] if said else self.whole[slice(*span)]
        pairs = zip(reversed(after.rstrip()), reversed(before.rstrip()), strict=False)
        shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]
        for token in (*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens):
            shared = shared.replace(token, "")
        return bool(shared.strip())

    def _marked(self, i: int, messages: Sequence[dict[str, Any]], name: str = "content") -> tuple[str, str] | None:
        """Return what the template writes before and after a text of a turn."""
        marked = [turn if j != i else {**turn, name: _MARK} for j, turn in enumerate(messages)]
        parts = (self._try(marked) or "").split(_MARK)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _end(self, text: str, start: int) -> int:
        """Return where a turn ends that ends a text: white space after the token that ends it is the template's."""
        last = self._last_token(text[start:])
        return len(text) if last is None else len(text.rstrip())

    def _last_token(self, text: str) -> str | None:
        """Return the special token with which a text ends, but for white space."""
        known = (*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens)
        return next((token for token in known if text.rstrip().endswith(token)), None)

    def _tokens_of(self, text: str, ids: Sequence[int]) -> int:
        """Return how many tokens a beginning of the whole has, for tokenizers that do not tell characters."""
        found = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        if found != list(ids[: len(found)]):
            raise self._unproved("a tokenizer that does not tell its characters and joins tokens where a turn begins")
        return len(found)

    def _try(self, messages: Sequence[dict[str, Any]], **options: Any) -> str | None:
        """Return what the template writes for some of the turns, or None where it refuses them."""
        try:
            return self._written(messages, **options) if messages else None
        except InputError:
            return None

    def _written(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        try:
            return str(self._apply(messages, tokenize=False, **options))
        except Exception as error:  # templates raise what they like, and Jinja the rest
            raise InputError(
                f"a conversation that the chat template refuses ({str(error)[:200]})",
                "turns as the template takes them",
                "Repair or drop the row",
            ) from error

    def _apply(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        given = {"tools": self.conversation.tools, "chat_template": self._template, **options}
        return self.tokenizer.apply_chat_template(list(messages), **given, **self.conversation.options)

    def _unproved(self, came: str) -> InputError:
        return InputError(
            came,
            "a template that shows which tokens are the assistant's, or --turns last",
            'Count the last turn only (CausalLM(tokenizer, turns="last")), mark what the assistant says in '
            "tokenizer.chat_template by {% generation %}, or pass rows of input_ids with assistant_masks",
        )


def _of_one_day(template: str) -> str:
    """Return a template that writes a day of its own as one that writes always the same.

    Raises:
        InputError: it writes the day in another way than by a fixed form.
    """
    found = _TODAY.sub(lambda call: json.dumps(_DAY.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", found):
        raise InputError(
            "a chat template that writes the day on which it runs",
            "the same tokens on every day",
            "Write a day of your choice into tokenizer.chat_template in the place of strftime_now(...)",
        )
    return found


def _opened(tag: re.Match[str]) -> str:
    """Return the tag that opens a generation with a mark behind it, which takes away as much white space."""
    control = tag[2]
    return f"{tag[1]}{control}%}}{{{{ '{_MARK}' {control if control == '-' else ''}}}}}"


def _closed(tag: re.Match[str]) -> str:
    return f"{{{{{tag[1] if tag[1] == '-' else ''} '{_MARK}' }}}}{{%{tag[2]}"


def _moved(pieces: Sequence[Piece], places: Sequence[tuple[_Span, int]], text: str) -> list[Piece]:
    """Return pieces of one text as pieces of another, where spans of the one stand at places of the other."""
    moved: list[Piece] = []
    done = at = 0
    for piece in pieces:
        start, at = at, at + len(piece.text)
        inside = next(((s, to) for s, to in places if start < s.stop and at > s.start), None)
        if inside is None:
            moved.append(Piece("", piece.tokens))
            continue
        span, to = inside
        kept = piece.text[max(span.start - start, 0) : span.stop - start]
        begin = to + max(start - span.start, 0)
        if begin > done:
            moved.append(Piece(text[done:begin], 0))
        moved.append(Piece(kept, piece.tokens))
        done = begin + len(kept)
    return [*moved, Piece(text[done:], 0)] if done < len(text) else moved
