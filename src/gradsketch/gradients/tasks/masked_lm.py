"""Masked language modelling: hidden tokens are predicted from all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.gradients.tasks import pieces, tokens
from gradsketch.gradients.tasks.base import Batch, Task
from gradsketch.gradients.tasks.encoded import IGNORED, Encoded, encode_all, integers, stack
from gradsketch.gradients.tasks.logits import inputs_and_labels, logits_of
from gradsketch.gradients.tasks.model_inputs import check_row
from gradsketch.gradients.tasks.rows import Row, refuse_weights, tokenised
from gradsketch.gradients.tasks.tokens import Reduction
from gradsketch.random import Stream

__all__ = ["MaskedLM"]

# Of the tokens to predict, this share is replaced by the mask token and half of the rest by a random one (BERT).
_MASKED, _RANDOM = 0.8, 0.1


class MaskedLM(Task):
    """Cross-entropy of each example's hidden tokens, in nats.

    Raw examples are texts, dicts with ``text``, or tokenised dicts, whose fields all go to the model. Where these have
    ``labels`` (−100: not hidden) they are used as they are. Otherwise tokens are hidden as in BERT (Devlin et al. 2019,
    section 3.1), drawn from (seed, the example's own tokens): an example is masked alike in every batch, pass and
    process. At least one token is hidden.

    Args:
        tokenizer: like a Hugging Face tokenizer with a mask token; not needed for examples with labels.
        max_length: texts are cut to this many tokens, on the tokenizer's side; by default to its own limit.
        probability: share of the tokens to predict.
        seed: another seed, another mask.
        reduction: "mean" over an example's hidden tokens, or "sum".

    Example:
        >>> batch = gs.MaskedLM().collate([{"input_ids": [5, 0, 8], "labels": [-100, 7, -100]}])
        >>> batch["labels"]
        tensor([[-100,    7, -100]])

    Raises:
        InputError: an empty text, a tokenizer without a mask token, a token or label the model does not have, logits
            of another shape.
    """

    not_padded = ()

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        probability: float = 0.15,
        seed: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        tokens.check_reduction(reduction)
        if not 0 < probability <= 1:
            raise InputError(f"probability={probability!r}", "a share above 0 and up to 1", "Type probability=0.15")
        self.tokenizer, self.probability, self.seed, self.reduction = tokenizer, probability, seed, reduction
        self.max_length = tokens.limit_of(tokenizer, max_length)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " b"]:
        return tokens.sequence_losses(*self.predictions(model, batch), self.reduction)

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        inputs, labels = inputs_and_labels(batch)
        return logits_of(model, inputs, labels.shape), labels

    def pieces(self, example: Any) -> list[pieces.Piece]:
        if isinstance(example, Mapping) and "input_ids" in example:
            return pieces.decoded(self.tokenizer, self._tokens(example).sequences["input_ids"].tolist())
        text = example["text"] if isinstance(example, Mapping) else example
        return pieces.of_text(self.tokenizer, text, limit=self.max_length)

    def encode(self, example: Any) -> Encoded:
        row = self._tokens(example)
        sequences = row.sequences if "labels" in row.sequences else self._hidden(row.sequences)
        return Encoded(len(sequences["input_ids"]), sequences, row.values)

    def collate(self, examples: Sequence[Any]) -> Batch:
        return stack(encode_all(self.encode, examples), self.tokenizer)

    def check(self, model: nn.Module, row: Encoded) -> None:
        check_row(model, row)

    def options(self) -> dict[str, str | int | float | bool]:
        return {
            "reduction": self.reduction,
            "max_length": self.max_length or 0,
            "probability": self.probability,
            "seed": self.seed,
            "vocabulary": tokens.vocabulary(self.tokenizer),
        }

    def _tokens(self, example: Any) -> Row:
        if isinstance(example, Mapping) and "input_ids" in example:
            return tokenised(example, self.max_length)
        refuse_weights(example, text=True)
        text = example.get("text") if isinstance(example, Mapping) else example
        if not isinstance(text, str):
            raise tokens.unknown_example(example, "a text, a dict with text, or a tokenised dict")
        if not text:
            raise InputError("an empty text", "some text to hide tokens of", "Drop it")
        encoded = tokens.encode(self.tokenizer, text, limit=self.max_length)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return Row({name: integers(encoded[name]) for name in names if name in encoded}, {})

    def _hidden(self, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Hide tokens of one example; its own content decides which."""
        mask_id = getattr(self.tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise InputError(
                "an example without labels, and no tokenizer with a mask token",
                "labels (−100 where nothing is hidden), or a tokenizer with mask_token_id",
                "Pass the model's tokenizer: MaskedLM(tokenizer)",
            )
        ids = torch.from_numpy(row["input_ids"]).long()
        ordinary = ~torch.isin(ids, torch.tensor(list(self.tokenizer.all_special_ids), device="cpu"))
        if not ordinary.any():
            raise InputError("a text of special tokens only", "at least one ordinary token to hide", "Drop it")
        stream = Stream(self.seed, "MaskedLM", repr(ids.tolist()))
        draw = stream.child("which").uniforms(0, len(ids)).masked_fill(~ordinary, 2.0)
        chosen = draw <= max(self.probability, float(draw.min()))
        fate = stream.child("how").uniforms(0, len(ids))
        random = stream.child("token").integers(0, len(ids), len(self.tokenizer))
        shown = torch.where(chosen & (fate < _MASKED), mask_id, ids)
        shown = torch.where(chosen & (fate >= 1 - _RANDOM), random, shown)
        labels = torch.where(chosen, ids, IGNORED)
        return {**row, "input_ids": shown.int().numpy(), "labels": labels.int().numpy()}
