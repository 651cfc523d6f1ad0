"""What a target is measured by: accuracy, loss, ROUGE, exact match, or any function of the model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsketch.as_found import evaluating
from gradsketch.dimension.generation import greedy
from gradsketch.dimension.training import per_example
from gradsketch.errors import InputError, NonFiniteError
from gradsketch.gradients.data import Batches, to_device
from gradsketch.gradients.fingerprints import code_digest, data_facts, digest, task_facts
from gradsketch.gradients.tasks import Task, TaskLike, as_task
from gradsketch.gradients.tasks.encoded import IGNORED
from gradsketch.gradients.tasks.logits import check_ids
from gradsketch.gradients.tasks.tokens import vocabulary

__all__ = ["Accuracy", "ExactMatch", "Loss", "Metric", "Rouge", "evaluated", "is_lower_better", "metric_facts"]

# Any function from a model to a number: larger is better unless it has a true attribute ``lower_is_better``.
Metric = Callable[[nn.Module], Any]


class Accuracy:
    """The share of labels that are the most likely class, or token, in evaluation mode; −100 does not count.

    Args:
        task: how examples become batches, and which logits predict which label: ``Classification``, a task of language
            models, or one with ``predictions`` of its own.
        data: raw examples, a DataLoader, or one batch; batches are dicts with ``labels`` ([b], or [b, t] where every
            token has one) or tuples (x, labels).

    Raises:
        InputError: when called, batches without labels, labels that are no classes of the model, or none that counts.
        NonFiniteError: when called, a logit is NaN: the most likely class would be the first of these.

    Example:
        >>> data = [(torch.ones(2), 1), (-torch.ones(2), 0)]
        >>> gs.Accuracy(gs.Classification(), data)(torch.nn.Linear(2, 2))  # doctest: +SKIP
        0.5
    """

    def __init__(self, task: Task, data: Any, batch_size: int = 32) -> None:
        self.task, self.batches = task, Batches(task, data, batch_size)

    def facts(self) -> dict[str, Any]:
        """Return what decides the value besides the model."""
        return {"task": task_facts(self.task), "data": data_facts(self.batches)}

    def __call__(self, model: nn.Module) -> float:
        right = total = 0
        with evaluating(model), torch.no_grad():
            for batch in _on_device_of(model, self.batches):
                logits, labels = self.task.predictions(model, batch)
                check_ids(labels, logits.shape[-1], "label")
                _refuse_nan(logits, labels)
                right += int((logits.argmax(-1) == labels).sum())
                total += int((labels != IGNORED).sum())
        if not total:
            raise InputError("labels that are all −100", "at least one that counts", "Check how the labels were made")
        return right / total


class Loss:
    """The mean of the task's losses over the examples, in evaluation mode; lower is better.

    Raises:
        InputError: when called, that the task returns more or fewer losses than a batch has examples.

    Example:
        >>> net = torch.nn.Linear(20, 2)
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> gs.Loss(gs.Classification(), data)(net) > 0
        True
    """

    lower_is_better = True

    def __init__(self, task: TaskLike, data: Any, batch_size: int = 32) -> None:
        self.task = as_task(task)
        self.batches = Batches(self.task, data, batch_size)

    def facts(self) -> dict[str, Any]:
        """Return what decides the value besides the model."""
        return {"task": task_facts(self.task), "data": data_facts(self.batches)}

    def __call__(self, model: nn.Module) -> float:
        total, examples = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        with evaluating(model), torch.no_grad():
            for batch in _on_device_of(model, self.batches):
                losses = per_example(self.task, model, batch).double()
                total = total.to(losses.device) + losses.sum()
                examples += len(losses)
        return float(total / examples)


class _Generated(ABC):
    """The mean score of greedy answers.

    Args:
        tokenizer: a Hugging Face tokenizer.
        data: (prompt, answer) pairs, or dicts with ``prompt`` and ``answer`` (or ``completion``), or with ``source``
            and ``target`` for encoder-decoders.
        max_new_tokens: how much is generated at most; less where the model's positions end before.
        stop: an answer ends before the first of these characters or strings, where one is given.
        batch_size: prompts that are answered at once; the answers do not depend on it.
    """

    def __init__(
        self, tokenizer: Any, data: Any, *, max_new_tokens: int = 32, stop: str | None = None, batch_size: int = 16
    ) -> None:
        self.tokenizer, self.max_new_tokens, self.stop, self.batch_size = tokenizer, max_new_tokens, stop, batch_size
        self.pairs = [_prompt_and_answer(example) for example in data]
        if not self.pairs:
            raise InputError("no examples", "at least one prompt with its answer", "Check the path or the filter")

    def facts(self) -> dict[str, Any]:
        """Return what decides the value besides the model."""
        return {
            "vocabulary": vocabulary(self.tokenizer),
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop,
            "data": {"examples": len(self.pairs), "content": digest(self.pairs)},
        }

    @abstractmethod
    def score(self, reference: str, answer: str) -> float:
        """Return how good one answer is, from 0 to 1."""

    def __call__(self, model: nn.Module) -> float:
        prompts, references = zip(*self.pairs, strict=True)
        answers = self.answers(model, list(prompts))
        scores = [self.score(r.strip(), a) for r, a in zip(references, answers, strict=True)]
        return sum(scores) / len(scores)

    def answers(self, model: nn.Module, prompts: list[str]) -> list[str]:
        """Return the model's greedy continuations of some prompts.

        Raises:
            InputError: a prompt that leaves no position to write to.
        """
        rows = [list(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        written = greedy(model, rows, self.max_new_tokens, self._padding, self.batch_size)
        texts: list[str] = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [(text.split(self.stop)[0] if self.stop else text).strip() for text in texts]

    @property
    def _padding(self) -> int:
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)


class ExactMatch(_Generated):
    """The share of prompts whose greedy answer is the reference, but for white space at the ends.

    Example:
        >>> class Parrot(torch.nn.Linear):
        ...     def generate(self, input_ids, **options):  # says token 1, whatever it is asked
        ...         return torch.cat([input_ids, torch.ones(len(input_ids), 1, dtype=torch.int64)], dim=1)
        >>> class Words:
        ...     words, pad_token_id, eos_token_id = ["Capital?", "Paris"], 0, 0
        ...     def __call__(self, text):
        ...         return {"input_ids": [self.words.index(word) for word in text.split()]}
        ...     def batch_decode(self, ids, **options):
        ...         return [" ".join(self.words[i] for i in row) for row in ids]
        >>> gs.ExactMatch(Words(), [("Capital?", " Paris"), ("Capital?", " Capital?")])(Parrot(1, 1))
        0.5
    """

    def score(self, reference: str, answer: str) -> float:
        return float(answer == reference)


class Rouge(_Generated):
    """The mean ROUGE F-measure (Lin 2004) of greedy answers, from 0 to 1, by the package rouge-score.

    ``kind`` is "rouge1", "rouge2" or "rougeL"; the rest is as for ExactMatch.

    Raises:
        InputError: rouge-score is not installed.
    """

    def __init__(
        self, tokenizer: Any, data: Any, kind: Literal["rouge1", "rouge2", "rougeL"] = "rouge1", **options: Any
    ) -> None:
        super().__init__(tokenizer, data, **options)
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise InputError(
                "no rouge-score on this machine", "that package", "Type: pip install 'gradsketch[rouge]'"
            ) from error
        self.kind, self._scorer = kind, RougeScorer([kind], use_stemmer=True)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "kind": self.kind}

    def score(self, reference: str, answer: str) -> float:
        return float(self._scorer.score(reference, answer)[self.kind].fmeasure)


def metric_facts(metric: Metric) -> dict[str, Any]:
    """Return what decides a metric: its class with its data, or the code of a function."""
    facts = getattr(metric, "facts", None)
    return {"class": type(metric).__name__, **facts()} if callable(facts) else {"code": code_digest(metric)}


def is_lower_better(metric: Metric) -> bool:
    """Whether smaller values of a metric are better: its attribute ``lower_is_better``, by default not."""
    lower = getattr(metric, "lower_is_better", False)
    if not isinstance(lower, bool):
        raise InputError(f"lower_is_better={lower!r}", "True or False", "Set the metric's attribute to one of them")
    return lower


def evaluated(metric: Metric, model: nn.Module, where: str) -> float:
    """Return the metric of the model in evaluation mode, without gradients; the modes are put back afterwards.

    Raises:
        InputError: the metric is no number.
        NonFiniteError: it is NaN or infinite.
    """
    with evaluating(model), torch.no_grad():
        came = metric(model)
    try:
        value = float(came)
    except (TypeError, ValueError) as error:
        raise InputError(f"a metric of type {type(came).__name__} {where}", "one number", "Return a float") from error
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the metric is {value} {where}", "a finite number", "Try a smaller lr, or look at what evaluate divides by"
        )
    return value


def _on_device_of(model: nn.Module, batches: Batches) -> Iterator[Any]:
    device = next(model.parameters()).device
    return (to_device(batch, device) for batch in batches)


def _refuse_nan(logits: Tensor, labels: Tensor) -> None:
    if bool((logits.isnan().any(-1) & (labels != IGNORED)).any()):
        raise NonFiniteError(
            "logits that are NaN, of which none is the largest",
            "numbers",
            "Look at the weights: a training that diverged leaves NaN",
        )


def _prompt_and_answer(example: Any) -> tuple[str, str]:
    if isinstance(example, Mapping):
        prompt = example.get("prompt", example.get("source"))
        answer = example.get("answer", example.get("completion", example.get("target")))
        example = (prompt, answer)
    if isinstance(example, tuple | list) and len(example) == 2 and all(isinstance(part, str) for part in example):
        return example[0], example[1]
    raise InputError(
        f"an example of type {type(example).__name__}",
        "(prompt, answer), or a dict with prompt and answer, or with source and target",
        "Convert it, or write evaluate as a function of the model",
    )
