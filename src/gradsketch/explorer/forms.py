"""How a question to a task is typed, and how the model completes it: by text that it writes, or by a label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradsketch.as_found import evaluating
from gradsketch.dimension.generation import greedy
from gradsketch.errors import InputError
from gradsketch.gradients.data import to_device
from gradsketch.gradients.tasks import CausalLM, Classification, Seq2SeqLM, Task

__all__ = ["Form", "Question", "form_of"]


@dataclass(frozen=True)
class Question:
    """What a person typed: a prompt and an answer. Without an answer the model gives it; a ``whole`` text has none."""

    prompt: str
    answer: str | None = None
    whole: bool = False


class Form(ABC):
    """How a task is asked: what its two fields are called, and what a question becomes."""

    prompt: str = "Text"
    answer: str | None = None  # None: the task takes whole texts only
    takes_whole: bool = False

    @abstractmethod
    def example(self, prompt: str, answer: str) -> Any:
        """Return the example that a prompt and an answer make."""

    @abstractmethod
    def sample(self, record: Mapping[str, Any]) -> Question | None:
        """Return a question like a stored row, where it has the texts that this form asks with."""

    @abstractmethod
    def complete(self, model: nn.Module, prompt: str, most: int) -> str:
        """Return the model's own answer, of at most so many tokens.

        Raises:
            InputError: it cannot give one.
        """


class _Whole(Form):
    """A text by itself, such as a masked language model's."""

    def example(self, prompt: str, answer: str) -> Any:
        return {"text": prompt}

    def sample(self, record: Mapping[str, Any]) -> Question | None:
        return _asking(record.get("text"), whole=True)

    def complete(self, model: nn.Module, prompt: str, most: int) -> str:
        return ""


class _Continued(Form):
    """A prompt that a causal language model continues."""

    prompt, answer, takes_whole = "Prompt", "Answer", True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def example(self, prompt: str, answer: str) -> Any:
        return {"prompt": prompt, "answer": answer}

    def sample(self, record: Mapping[str, Any]) -> Question | None:
        return _asking(record.get("prompt")) or _asking(record.get("text"), whole=True)

    def complete(self, model: nn.Module, prompt: str, most: int) -> str:
        return _continued(model, self.tokenizer, list(self.tokenizer(prompt)["input_ids"]), most)


class _Chat(Form):
    """What a user says to an assistant, written by the tokenizer's chat template."""

    prompt, answer = "You say", "The model answers"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def example(self, prompt: str, answer: str) -> Any:
        said = [{"role": "assistant", "content": answer}]
        return {"prompt": [{"role": "user", "content": prompt}], "completion": said}

    def sample(self, record: Mapping[str, Any]) -> Question | None:
        turns = record.get("messages")
        said = [turn for turn in turns if turn.get("role") == "user"] if isinstance(turns, list) else []
        return _asking(said[0].get("content")) if said else None

    def complete(self, model: nn.Module, prompt: str, most: int) -> str:
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return _continued(model, self.tokenizer, list(ids), most).strip()


class _Transformed(Form):
    """A source that an encoder-decoder turns into a target."""

    prompt, answer = "Source", "Target"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def example(self, prompt: str, answer: str) -> Any:
        return {"source": prompt, "target": answer}

    def sample(self, record: Mapping[str, Any]) -> Question | None:
        return _asking(record.get("source"))

    def complete(self, model: nn.Module, prompt: str, most: int) -> str:
        written = _written(model, self.tokenizer, list(self.tokenizer(prompt)["input_ids"]), most)
        return str(self.tokenizer.decode(written, skip_special_tokens=True))


class _Classified(Form):
    """A text and its label."""

    prompt, answer = "Text", "Label"

    def __init__(self, task: Classification) -> None:
        self.task = task

    def example(self, prompt: str, answer: str) -> Any:
        return {"text": prompt, "label": int(answer) if self.task.classes is None and answer.isdigit() else answer}

    def sample(self, record: Mapping[str, Any]) -> Question | None:
        return _asking(record.get("text"))

    def complete(self, model: nn.Module, prompt: str, most: int) -> str:
        """Return the likeliest label."""
        classes = self.task.classes
        batch = self.task.collate([{"text": prompt, "label": 0 if classes is None else classes[0]}])
        batch = to_device(batch, next(model.parameters()).device)
        with evaluating(model), torch.no_grad():
            label = int(self.task.sampled(model, batch, lambda logits: logits.argmax(-1))["labels"][0])
        return str(label) if classes is None else classes[label]


def form_of(task: Task, columns: Collection[str]) -> Form:
    """Return how a task is asked whose index has these columns."""
    tokenizer = getattr(task, "tokenizer", None)
    if isinstance(task, CausalLM) and tokenizer is not None:
        chats = "messages" in columns and getattr(tokenizer, "chat_template", None) is not None
        return _Chat(tokenizer) if chats else _Continued(tokenizer)
    if isinstance(task, Seq2SeqLM) and tokenizer is not None:
        return _Transformed(tokenizer)
    return _Classified(task) if isinstance(task, Classification) else _Whole()


def _asking(text: Any, whole: bool = False) -> Question | None:
    return Question(text, whole=whole) if isinstance(text, str) and text else None


def _continued(model: nn.Module, tokenizer: Any, ids: list[int], most: int) -> str:
    """Return what a model writes after some tokens, with the space that it begins with."""
    if not ids:
        raise InputError("an empty prompt", "something to answer", "Type a prompt")
    written = _written(model, tokenizer, ids, most)
    before, whole = (str(tokenizer.decode(some, skip_special_tokens=True)) for some in (ids, ids + written))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _written(model: nn.Module, tokenizer: Any, ids: list[int], most: int) -> list[int]:
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(model).__name__}, which generates no text", "an answer", "Type what it said")
    endings = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    padding = next((i for i in endings if i is not None), 0)
    with evaluating(model), torch.no_grad():
        return greedy(model, [ids], most, padding, 1)[0]
