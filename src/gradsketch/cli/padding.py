"""A tokenizer and a model that agree on the padding token, also where one or both have none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["pad_alike"]


def pad_alike(tokenizer: Any, model: nn.Module) -> None:
    """Give tokenizer and model the padding token of the other, or where both have none, one that no text ends with.

    Padding is masked, so that most models need none. A classifier that is a causal model reads its answer off the last
    token that is no padding, by the id: it refuses batches without one, and takes a foreign one for text.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is None or not hasattr(text, "vocab_size"):
        return
    known = getattr(text, "pad_token_id", None)
    if tokenizer.pad_token_id is None:
        token = None if known is None or not 0 <= known < len(tokenizer) else tokenizer.convert_ids_to_tokens(known)
        token = token or _unused(tokenizer)
        if token is None:
            return
        tokenizer.pad_token = token
    if known is None:
        config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id


def _unused(tokenizer: Any) -> str | None:
    """Return a special token that the tokenizer puts to no text of its own accord."""
    added = set(tokenizer("a")["input_ids"])
    names = ("eos_token", "unk_token", "bos_token")
    tokens = [token for name in names if (token := getattr(tokenizer, name, None)) is not None]
    return next((token for token in tokens if tokenizer.convert_tokens_to_ids(token) not in added), None)
