"""Conversations as rows hold them: ``messages``, or a prompt and a completion that are lists of turns.

This module reads a row and shows it; what a tokenizer's template makes of the turns is in ``chat.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gradsketch.errors import InputError
from gradsketch.reading.formats import WEIGHTS

__all__ = [
    "ASSISTANT",
    "SAID",
    "Conversation",
    "Turn",
    "Turns",
    "check_turns",
    "conversation_of",
    "shown_turns",
    "starts",
    "transcript",
]

# Which of the assistant's turns count.
Turns = Literal["all", "last"]

ASSISTANT = "assistant"
# The fields of a turn whose texts are shown, in this order.
SAID = ("reasoning_content", "content")
_ANSWERS = ("answer", "completion")
_WANTED = 'turns such as {"role": "user", "content": "Hi"}'


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, of which those before ``first`` never count, nor those in ``left_out``.

    ``tools`` and ``options`` (the row's ``chat_template_kwargs``) go to the template as they are.
    """

    messages: Sequence[dict[str, Any]]
    first: int = 0
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()

    def counted(self, turns: Turns) -> list[int]:
        """Return the places of the assistant's turns that count: all, or the last.

        Raises:
            InputError: there is none.
        """
        said = [i for i, turn in enumerate(self.messages) if turn["role"] == ASSISTANT and i >= self.first]
        found = [i for i in said if i not in self.left_out]
        if said and not found:
            raise InputError(
                "a conversation whose turns of the assistant have all the weight 0", "one to learn", "Drop it"
            )
        if not found:
            raise InputError(
                f"a conversation of the roles {', '.join(dict.fromkeys(turn['role'] for turn in self.messages))}"
                + f" whose first {self.first} turns are the prompt" * (self.first > 0),
                "a turn of the assistant to predict",
                'Add {"role": "assistant", "content": ...}, or drop the row',
            )
        return found if turns == "all" else found[-1:]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: ``role`` and ``text``, which begins at the character ``start`` of the whole text."""

    role: str
    text: str
    start: int


def check_turns(turns: str) -> None:
    """Refuse anything but "all" and "last"."""
    if turns not in ("all", "last"):
        raise InputError(f"turns={turns!r}", '"all" or "last"', 'Type turns="last"')


def conversation_of(example: Any) -> Conversation | None:
    """Return the conversation that a row is, or None where it is none.

    Raises:
        InputError: it is one, and its turns are of another form, or the row can be read in two ways.
    """
    if not isinstance(example, Mapping) or example.get("input_ids") is not None:
        return None
    found = _fields(example)
    if found is None:
        if _is_list(example.get("prompt")) or _is_list(example.get("completion")):
            raise InputError(
                "a prompt of turns without a completion of turns, or the reverse",
                "both as lists of turns, or both as texts",
                'Write the answer as [{"role": "assistant", "content": ...}]',
            )
        return None
    _refuse_two_readings(example)
    lists = [_checked(example[name], name) for name in found]
    turns = [turn for part in lists for turn in part]
    return Conversation(
        [{name: value for name, value in turn.items() if name not in WEIGHTS} for turn in turns],
        len(lists[0]) if len(lists) == 2 else 0,
        _tools(example.get("tools")),
        _options(example.get("chat_template_kwargs")),
        frozenset(i for i, turn in enumerate(turns) if not _counts(turn, i)),
    )


def _fields(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the fields that hold a row's turns: messages, or prompt and answer; None where it has none."""
    if row.get("messages") is not None:
        return ("messages",)
    answer = next((name for name in _ANSWERS if _is_list(row.get(name))), None)
    return ("prompt", answer) if answer is not None and _is_list(row.get("prompt")) else None


def shown_turns(row: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]] | None:
    """Return the turns of a row that is shown as turns, and the fields that hold them; None of any other row."""
    names = None if isinstance(row.get("text"), str) else _fields(row)
    if names is None or not all(transcript(row[name]) for name in names):
        return None
    return [turn for name in names for turn in row[name]], names


def transcript(messages: Any) -> tuple[str, tuple[Turn, ...]] | None:
    """Return turns as one text to show, and where each stands in it; None of what is no list of turns."""
    if not (_is_list(messages) and all(isinstance(t, Mapping) and isinstance(t.get("role"), str) for t in messages)):
        return None
    lines, turns, done = [], [], 0
    for message in messages:
        text = shown(message)
        turns.append(Turn(message["role"], text, done + len(f"{message['role']}: ")))
        lines.append(f"{message['role']}: {text}")
        done += len(lines[-1]) + 1
    return "\n".join(lines), tuple(turns)


def shown(message: Mapping[str, Any]) -> str:
    """Return the text of one turn as it is shown: what it thinks and says, and the tools that it calls."""
    texts = [_text(message.get(name)) for name in SAID]
    calls = message.get("tool_calls")
    called = [_call(call) for call in calls] if isinstance(calls, list | tuple) else []
    return "\n".join([*filter(None, texts), *called])


def starts(message: Mapping[str, Any]) -> dict[str, int]:
    """Return at which character of a turn, as it is shown, each of its texts begins, by the field's name."""
    found, done = {}, 0
    for name in SAID:
        if text := _text(message.get(name)):
            found[name] = done
            done += len(text) + 1
    return found


def _text(value: Any) -> str:
    parts = value if isinstance(value, list | tuple) else [] if value is None else [str(value)]
    return "".join(_part(part) for part in parts)


def _part(part: Any) -> str:
    if isinstance(part, Mapping):
        return str(part["text"]) if part.get("type") == "text" and "text" in part else f"[{part.get('type')}]"
    return str(part)


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        return str(call)
    arguments = function.get("arguments")
    given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return f"{function.get('name')}({given})"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _refuse_two_readings(row: Mapping[str, Any]) -> None:
    if row.get("messages") is None:
        return
    other: tuple[str, ...] = ("text",) if isinstance(row.get("text"), str) else ()
    answer = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if row.get("prompt") is not None and answer is not None:
        other = ("prompt", answer)
    if other:
        raise InputError(
            f"a row with messages and {' and '.join(other)}, any of which could be what the model learns",
            "one of them",
            "Type --messages-column messages to read the turns, or --text-column text, or --prompt-column prompt, "
            "instead; or drop the others",
        )


def _checked(value: Any, name: str) -> list[dict[str, Any]]:
    if not _is_list(value) or not value or not all(isinstance(turn, Mapping) for turn in value):
        came = "no turn" if _is_list(value) and not value else f"{type(value).__name__} {value!r}"[:120]
        raise InputError(f"{name} with {came}", f"a list of {_WANTED}", "Repair or drop the row")
    return [_turn(turn, f"turn {i + 1} of {name}") for i, turn in enumerate(value)]


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a turn without fields that are None (data sets of columns write them), its parts of text joined."""
    kept = {str(key): value for key, value in turn.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        mapped = ' Type --format sharegpt, or gs.mapped_rows(data, format="sharegpt")' * {"from", "value"}.issubset(
            kept
        )
        raise InputError(f"{where} with the fields {', '.join(kept)}", _WANTED, mapped.strip() or "Name the role")
    content = kept.get("content")
    if isinstance(content, list | tuple):
        kept["content"] = "".join(_text_of(part, where) for part in content)
    elif not isinstance(content, str) and not (content is None and kept.keys() - {"role"}):
        raise InputError(f"{where} with content of type {type(content).__name__}", _WANTED, "Repair or drop the row")
    return kept


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(
        f"{where} with a part of type {kind}",
        "text, which is all that this task reads",
        "Write the task as a function (model, batch) → losses [b] over what the processor makes of such turns",
    )


def _counts(turn: Mapping[str, Any], place: int) -> bool:
    """Whether a turn counts, by the weight of 0 or 1 that it may have; that of others than the assistant says nothing.

    Raises:
        InputError: the assistant's turn has another weight.
    """
    given = [(name, turn[name]) for name in WEIGHTS if name in turn]
    if turn["role"] != ASSISTANT or not given:
        return True
    for name, value in given:
        if value not in (0, 1):
            raise InputError(
                f"turn {place + 1} of a conversation with {name} {value!r}",
                "0 (it does not count) or 1",
                "Round or drop it: no task counts one turn more than another",
            )
    return all(value == 1 for _, value in given)


def _tools(tools: Any) -> list[Any] | None:
    """Return a row's tools, which data sets of columns hold as JSON."""
    came = tools
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            tools = came
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
        raise InputError(
            f"tools {came!r}"[:120], "a list of JSON schemas of functions, or its text", "Repair or drop the column"
        )
    return list(tools) if tools else None


def _options(options: Any) -> Mapping[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise InputError(
            f"chat_template_kwargs of type {type(options).__name__}", "a dict of the template's variables", "Repair it"
        )
    return {} if options is None else {name: value for name, value in options.items() if value is not None}
