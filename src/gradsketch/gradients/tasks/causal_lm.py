"""Causal language modelling: every counted token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import pieces, tokens
from gradsketch.gradients.tasks.base import Batch, Task
from gradsketch.gradients.tasks.chat import encode_chat, pieces_of_chat, template_digest
from gradsketch.gradients.tasks.conversations import Turns, check_turns, conversation_of
from gradsketch.gradients.tasks.encoded import IGNORED, Encoded, encode_all, integers, stack
from gradsketch.gradients.tasks.logits import logits_of
from gradsketch.gradients.tasks.model_inputs import check_row, right_padded
from gradsketch.gradients.tasks.rows import counted_labels, refuse_weights, tokenised
from gradsketch.gradients.tasks.tokens import Reduction
from gradsketch.reading.formats import refuse_unmapped

__all__ = ["CausalLM"]


class CausalLM(Task):
    """Next-token cross-entropy of each example, in nats.

    Raw examples are texts (every token but the first counts), ``(prompt, answer)`` pairs or dicts with ``prompt`` and
    ``answer`` (or ``completion``), of which only the answer's tokens count, dicts with ``text``, conversations, or
    tokenised dicts.
    Prompt and answer are joined as they are, so the answer brings its own leading space, and tokenised together; a
    token that spans the boundary belongs to the answer. A first token that the text brings along, as chat templates
    write it, is not added again.

    A conversation is a dict with ``messages``, a list of turns with ``role`` and ``content``, or with ``prompt`` and
    ``completion`` as such lists, of which only the completion's turns count. It is written and tokenised by the
    tokenizer's chat template, which gets the row's ``tools`` and ``chat_template_kwargs``. What the assistant says
    counts, and the token that ends each of its turns. A turn whose tokens the template does not show is refused.

    A tokenised dict has ``input_ids`` and optionally ``attention_mask``, ``labels`` (−100: does not count), a mask of
    the tokens that count (``completion_mask``, ``assistant_masks`` or ``loss_mask``) and ``position_ids``. Positions
    that start again at 0 say that the row packs several documents: none of them sees the others. Every other list as
    long as ``input_ids``, and every array, goes to the model, and is refused by name if the model does not take it.

    ``losses`` takes a batch of ``input_ids``, optional ``attention_mask`` and ``labels`` ``[b, t]`` and shifts the
    labels itself. Padding never counts, on whichever side it stands.

    Args:
        tokenizer: any callable like a Hugging Face tokenizer; not needed for tokenised examples.
        max_length: texts are cut to this many tokens, on the tokenizer's side; by default to its own limit.
        reduction: "mean" over an example's counted tokens (what Hugging Face reports for a batch of one) or "sum"
            (minus the log-probability of the answer).
        turns: which of the assistant's turns count in a conversation: "all", or the "last".

    Example:
        >>> words = "the capital of France is Paris".split()
        >>> def tokenizer(text, **options):
        ...     return {"input_ids": [words.index(word) for word in text.split()]}
        >>> gs.CausalLM(tokenizer).collate([("the capital of France is", " Paris")])["labels"]
        tensor([[-100, -100, -100, -100, -100,    5]])

    Raises:
        InputError: an empty text, an answer without a token (left), a conversation that the template does not take,
            weights of rows or tokens, a token, label, field or position the model does not have, logits of another
            shape.
    """

    not_padded = ()

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        reduction: Reduction = "mean",
        turns: Turns = "all",
    ) -> None:
        tokens.check_reduction(reduction)
        check_turns(turns)
        self.tokenizer, self.reduction, self.turns = tokenizer, reduction, turns
        self.max_length = tokens.limit_of(tokenizer, max_length)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        return tokens.sequence_losses(*self.predictions(model, batch), self.reduction)

    def token_losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b t"]:
        following = tokens.each_loss(*self.predictions(model, batch), self.reduction)
        return torch.cat([torch.zeros_like(following[:, :1]), following[:, :-1]], dim=1)

    def sampled(self, model: nn.Module, batch: Batch, draw: Callable[[Tensor], Tensor]) -> Batch:
        logits, following = self.predictions(model, batch)
        drawn = draw(logits).masked_fill(following == IGNORED, IGNORED)
        labels = torch.cat([torch.full_like(drawn[:, :1], IGNORED), drawn[:, :-1]], dim=1)
        return {**right_padded(batch), "labels": labels}

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        """Return logits and, at the place of each token, the label that follows it."""
        batch = right_padded(batch)
        labels, mask, positions = _labels(batch), batch.get("attention_mask"), batch.get("position_ids")
        # A token counts where it and the token before it are shown, and stand in one document.
        if mask is not None and mask.ndim == 2:
            labels = labels.masked_fill(mask == 0, IGNORED)
            labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(mask[:, :-1] == 0, IGNORED)], dim=1)
        if positions is not None and positions.shape == labels.shape:
            labels = labels.masked_fill(positions == 0, IGNORED)
        logits = logits_of(model, {n: v for n, v in batch.items() if n != "labels"}, labels.shape, causal=True)
        # Moving the labels, not the logits, saves a copy of [b, t, vocabulary].
        return logits, torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)

    def pieces(self, example: Any) -> list[pieces.Piece] | None:
        if isinstance(example, Mapping) and "input_ids" in example:
            return pieces.decoded(self.tokenizer, self.encode(example).sequences["input_ids"].tolist())
        if (conversation := conversation_of(example)) is not None:
            return pieces_of_chat(self.tokenizer, conversation, self.max_length)
        return pieces.of_text(self.tokenizer, "".join(_prompt_and_answer(example)), limit=self.max_length)

    def encode(self, example: Any) -> Encoded:
        if isinstance(example, Mapping) and "input_ids" in example:
            row = tokenised(example, self.max_length)
            return Encoded(len(row.sequences["input_ids"]), counted_labels(row.sequences), row.values)
        refuse_weights(example, text=True)
        if (conversation := conversation_of(example)) is not None:
            ids, counted = encode_chat(self.tokenizer, conversation, self.turns, self.max_length)
            return _row(ids, counted)
        prompt, answer = _prompt_and_answer(example)
        if not answer:
            raise InputError("an empty text" if not prompt else "an empty answer", "some text to predict", "Drop it")
        ids, first = self._boundary(prompt, answer)
        first = max(first, 1)  # the first token has nothing before it to be predicted from
        if len(ids) <= first:
            raise InputError(
                f"{answer[:40]!r} leaves no token to predict ({len(ids)} tokens in all, {first} before the answer)",
                "at least one predicted token" + (f" within max_length={self.max_length}" if self.max_length else ""),
                "Shorten the prompt, raise max_length, or drop the example",
            )
        return _row(ids, [place >= first for place in range(len(ids))])

    def collate(self, examples: Sequence[Any]) -> Batch:
        rows = encode_all(self.encode, examples)
        batch = stack(rows, self.tokenizer)
        # Models tell the documents of packed rows apart by positions that start again, but only where no mask is given;
        # the padding is one more document then.
        if any((np.diff(row.sequences.get("position_ids", ())) != 1).any() for row in rows):
            del batch["attention_mask"]
        return batch

    def check(self, model: nn.Module, row: Encoded) -> None:
        check_row(model, row)

    def options(self) -> dict[str, str | int | float | bool]:
        return {
            "reduction": self.reduction,
            "max_length": self.max_length or 0,
            "turns": self.turns,
            "chat_template": template_digest(self.tokenizer),
            "vocabulary": tokens.vocabulary(self.tokenizer),
        }

    def _boundary(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Return the token ids of the joined text and the position of the answer's first token."""
        whole = prompt + answer
        if not prompt:
            return list(tokens.encode(self.tokenizer, whole, limit=self.max_length)["input_ids"]), 0
        if getattr(self.tokenizer, "is_fast", False):
            encoded = tokens.encode(self.tokenizer, whole, limit=self.max_length, return_offsets_mapping=True)
            ends = [end for _, end in encoded["offset_mapping"]]
            first = next((t for t, end in enumerate(ends) if end > len(prompt)), len(ends))
            return list(encoded["input_ids"]), first
        ids = list(tokens.encode(self.tokenizer, whole, limit=self.max_length)["input_ids"])
        side = getattr(self.tokenizer, "truncation_side", "right")
        if self.max_length and len(ids) >= self.max_length and side == "left":
            raise InputError(
                f"a prompt and an answer of at least {self.max_length} tokens, cut on the left by a tokenizer without "
                "offsets: nothing says where the answer begins",
                "a fast tokenizer, or one that cuts on the right",
                'Load it with use_fast=True, set tokenizer.truncation_side = "right", or drop the example',
            )
        alone = list(tokens.encode(self.tokenizer, prompt, limit=None)["input_ids"])
        differ = (t for t, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b)
        return ids, next(differ, min(len(ids), len(alone)))


def _row(ids: Sequence[int], counted: Sequence[bool]) -> Encoded:
    labels = [i if counts and place else IGNORED for place, (i, counts) in enumerate(zip(ids, counted, strict=True))]
    return Encoded(len(ids), {"input_ids": integers(ids), "labels": integers(labels)})


def _labels(batch: Batch) -> Int[Tensor, "b t"]:
    """Return the batch's labels, by default its tokens."""
    labels: Tensor | None = batch.get("labels")
    if labels is None and (mask := batch.get("attention_mask")) is not None and mask.ndim != 2:
        raise InputError(
            f"an attention_mask of shape {list(mask.shape)} without labels",
            "a mask [b, t], or labels that say which tokens count",
            "Put labels in the batch, -100 where nothing counts",
        )
    labels = batch.get("input_ids") if labels is None else labels
    if labels is None:
        raise InputError(
            f"a batch with neither labels nor input_ids (but {', '.join(batch)})", "one of the two", "Put labels in it"
        )
    return labels


def _prompt_and_answer(example: Any) -> tuple[str, str]:
    """Return (prompt, answer); the prompt of a plain text is empty."""
    if isinstance(example, str):
        return "", example
    if isinstance(example, tuple | list) and len(example) == 2 and all(isinstance(part, str) for part in example):
        return example[0], example[1]
    if isinstance(example, Mapping):
        _refuse_two_readings(example)
        answer = example.get("answer", example.get("completion"))
        if isinstance(example.get("prompt"), str) and isinstance(answer, str):
            return example["prompt"], answer
        if isinstance(example.get("text"), str):
            return "", example["text"]
    refuse_unmapped(example)
    raise tokens.unknown_example(
        example, "a text, (prompt, answer), or a dict with text, prompt and answer, or messages"
    )


def _refuse_two_readings(row: Mapping[str, Any]) -> None:
    """Refuse a row of two texts, either of which could be what the model learns."""
    given = [name for name in ("text", "prompt", "answer", "completion") if isinstance(row.get(name), str)]
    answers = [name for name in given if name in ("answer", "completion")]
    if len({row[name] for name in answers}) > 1:
        two, fix = answers, "Type --answer-column answer to read that one, or rename the column answer"
    elif "prompt" in given and answers and "text" in given:
        two, fix = ["text", f"prompt with {answers[0]}"], "Type --text-column text, or --prompt-column prompt"
    else:
        return
    raise InputError(
        f"a row with {' and '.join(two)}, either of which could be what the model learns",
        "one of them",
        f"{fix}; or drop the other",
    )
