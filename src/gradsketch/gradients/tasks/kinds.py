"""The kinds of task a Hugging Face model can be loaded for: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradsketch.errors import InputError
from gradsketch.gradients.tasks.base import Task
from gradsketch.gradients.tasks.causal_lm import CausalLM
from gradsketch.gradients.tasks.classification import Classification
from gradsketch.gradients.tasks.masked_lm import MaskedLM
from gradsketch.gradients.tasks.seq2seq_lm import Seq2SeqLM

__all__ = ["TaskKind", "names", "of_architecture", "register", "task_kind"]


@dataclass(frozen=True)
class TaskKind:
    """A name for the command line, how its models are loaded and recognised, and how the task is made.

    ``loader`` is the class of transformers that loads a model, ``architectures`` the ends of the names of
    architectures that mean this task, and ``make`` takes tokenizer, model and the most tokens of a text.
    """

    name: str
    loader: str
    architectures: tuple[str, ...]
    make: Callable[[Any, Any, int | None], Task]


def _classification(tokenizer: Any, model: Any, most: int | None) -> Task:
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return Classification(tokenizer, classes=names, max_length=most)


_KINDS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        TaskKind(
            "causal-lm",
            "AutoModelForCausalLM",
            ("ForCausalLM", "LMHeadModel"),
            lambda tokenizer, _, most: CausalLM(tokenizer, max_length=most),
        ),
        TaskKind(
            "seq2seq-lm",
            "AutoModelForSeq2SeqLM",
            ("ForConditionalGeneration",),
            lambda tokenizer, _, most: Seq2SeqLM(tokenizer, max_length=most, max_target_length=most),
        ),
        TaskKind(
            "masked-lm",
            "AutoModelForMaskedLM",
            ("ForMaskedLM",),
            lambda tokenizer, _, most: MaskedLM(tokenizer, max_length=most),
        ),
        TaskKind(
            "classification",
            "AutoModelForSequenceClassification",
            ("ForSequenceClassification",),
            _classification,
        ),
    )
}


def register(kind: TaskKind) -> TaskKind:
    """Add a kind of task, one of your own too.

    Raises:
        InputError: there is one of that name.
    """
    if kind.name in _KINDS:
        raise InputError(f"a second kind of task {kind.name}", "a name of its own", "Choose another name")
    _KINDS[kind.name] = kind
    return kind


def names() -> tuple[str, ...]:
    """Return the names of all kinds."""
    return tuple(_KINDS)


def task_kind(name: str) -> TaskKind:
    """Return the kind with this name.

    Raises:
        InputError: there is none.
    """
    if name not in _KINDS:
        raise InputError(f"--task {name}", f"auto, {', '.join(_KINDS)}", "Type --task auto")
    return _KINDS[name]


def of_architecture(architecture: str) -> TaskKind | None:
    """Return the kind that models of this architecture are made for, where one follows."""
    return next((kind for kind in _KINDS.values() if architecture.endswith(kind.architectures)), None)
