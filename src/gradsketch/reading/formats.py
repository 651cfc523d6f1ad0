"""Rows of the formats Alpaca and ShareGPT as conversations. A format is named, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradsketch.errors import InputError

__all__ = ["FORMATS", "WEIGHTS", "refuse_unmapped"]

_SYSTEM = "system"
# By which a turn says whether the assistant is to learn it, as OpenAI, Hermes and Axolotl write it.
WEIGHTS = ("weight", "train", "training")
# Who speaks in ShareGPT, and in the turns of Vicuna, OpenOrca, Hermes and Glaive that follow it.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": _SYSTEM,
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return {instruction, input, output} as messages; the input follows the instruction after an empty line."""
    instruction, output = (_text(row, name) for name in ("instruction", "output"))
    if row.get("history"):
        raise InputError(
            "an Alpaca row with a history of earlier turns",
            "instruction, input and output",
            "Write its turns as messages: each [question, answer] becomes a turn of the user and one of the assistant",
        )
    given = _text(row, "input") if row.get("input") else ""
    turns = [_turn("user", f"{instruction}\n\n{given}" if given else instruction), _turn("assistant", output)]
    rest = {n: v for n, v in row.items() if n not in ("instruction", "input", "output", "history", _SYSTEM)}
    return {**rest, "messages": [*_system(row), *turns]}


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return {conversations: [{from, value}]} as messages, after the row's own system text where it has one."""
    found = row.get("conversations")
    if not isinstance(found, list | tuple) or not all(isinstance(turn, Mapping) for turn in found):
        raise InputError(
            f"a row with the columns {', '.join(map(str, row))}",
            "conversations, a list of {from, value}",
            "Name another --format, or none",
        )
    turns = [{**_turn(_role(turn), _text(turn, "value")), **_weights(turn)} for turn in found]
    rest = {name: value for name, value in row.items() if name not in ("conversations", _SYSTEM)}
    return {**rest, "messages": [*_system(row), *turns]}


# What makes of a row of a format one with messages.
FORMATS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"alpaca": _alpaca, "sharegpt": _sharegpt}


def refuse_unmapped(example: Any) -> None:
    """Refuse a row that looks like one of a format, by the name of that format.

    Raises:
        InputError: it does.
    """
    if not isinstance(example, Mapping):
        return
    turns = example.get("conversations")
    first = turns[0] if isinstance(turns, list | tuple) and turns else None
    if isinstance(first, Mapping) and "role" in first:
        raise InputError(
            "a row whose turns are called conversations",
            "messages",
            'Type --messages-column conversations, or gs.mapped_rows(data, columns={"messages": "conversations"})',
        )
    name = "sharegpt" if turns is not None else "alpaca" if {"instruction", "output"} <= example.keys() else None
    if name is not None:
        raise InputError(
            f"a row with the columns {', '.join(map(str, example))}, which looks like the format {name}",
            "the name of that format, or messages",
            f'Type --format {name}, or gs.mapped_rows(data, format="{name}")',
        )


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _weights(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say whether a turn counts."""
    return {name: turn[name] for name in WEIGHTS if turn.get(name) is not None}


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_turn(_SYSTEM, _text(row, _SYSTEM))] if row.get(_SYSTEM) else []


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        came = f"{name} of type {type(value).__name__}" if name in row else f"the columns {', '.join(map(str, row))}"
        raise InputError(f"a row with {came}", f"{name} as a text", "Repair or drop the row, or name another --format")
    return value


def _role(turn: Mapping[str, Any]) -> str:
    came = turn.get("from")
    if came not in _ROLES:
        raise InputError(
            f"a turn from {came!r}",
            f"one of {', '.join(_ROLES)}",
            "Rename the speaker, or write the turns as messages with roles (a call of a tool as tool_calls)",
        )
    return _ROLES[came]
