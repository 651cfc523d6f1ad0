"""Write the small models and data that the documentation's commands read: ``python -m gradsketch.demo.files``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradsketch.as_found import seeded
from gradsketch.demo.invented import Taught, invented_capitals
from gradsketch.demo.training import train_model
from gradsketch.durable import write_file

__all__ = ["write_files"]

TESTED = 6


def write_files(folder: str | Path = ".") -> list[Path]:
    """Write a model, and data of several formats, into ``folder``, and return what was written.

    ``my-model`` is :func:`~gradsketch.demo.invented.invented_capitals`, and ``facts.jsonl`` what it was taught.
    ``chats.jsonl`` and ``alpaca.jsonl`` say the same as chats, and ``target.jsonl`` is a question. ``train.jsonl``
    gives every country another capital, to be learned next; ``test.jsonl`` holds six of its rows. ``my-adapter`` is a
    LoRA adapter of the model, written where peft is installed.

    Raises:
        AbsentError: transformers is not installed.
    """
    folder, taught = Path(folder), invented_capitals()
    taught.model.save_pretrained(folder / "my-model")  # type: ignore[operator]
    taught.task.tokenizer.save_pretrained(folder / "my-model")
    written = [folder / "my-model"]
    for name, rows in _data(taught.facts).items():
        write_file(folder / name, "".join(f"{json.dumps(row)}\n" for row in rows))
        written.append(folder / name)
    if find_spec("peft") is not None:
        _adapted(taught).save_pretrained(folder / "my-adapter")
        written.append(folder / "my-adapter")
    return written


def _data(facts: list[dict[str, Any]]) -> dict[str, Iterable[dict[str, Any]]]:
    others = [{**fact, "answer": other["answer"]} for fact, other in zip(facts, facts[1:] + facts[:1], strict=True)]
    return {
        "facts.jsonl": facts,
        "train.jsonl": others,
        "test.jsonl": others[:TESTED],
        "target.jsonl": [{"prompt": "The capital of Belminia is", "answer": " Atlantis"}],
        "chats.jsonl": ({"id": fact["id"], "messages": _turns(fact)} for fact in facts),
        "alpaca.jsonl": ({"instruction": fact["prompt"], "output": fact["answer"].strip()} for fact in facts),
    }


def _turns(fact: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": fact["prompt"]},
        {"role": "assistant", "content": fact["answer"].strip()},
    ]


def _adapted(taught: Taught) -> Any:
    from peft import LoraConfig, get_peft_model

    with seeded(0):
        config = LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        adapted = get_peft_model(taught.model, config)
        train_model(adapted, taught.task, taught.facts, rate=3e-3, epochs=2, batch=8)
    return adapted


if __name__ == "__main__":
    print(*write_files(), sep="\n")
