"""Sequence to sequence: a target predicted from a source."""

from __future__ import annotations

from typing import Any

import torch

import gradsketch as gs
from architectures.batches import pairs
from architectures.tiny import VOCABULARY
from architectures.zoo import Architecture

__all__ = ["ENTRIES"]

_T5 = {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
_SPARSE = {
    "num_experts": 4,
    "expert_capacity": 64,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
}
_TOWER = {"hidden_size": 32, "sliding_window": 16}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bart": {},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "blenderbot-small": {},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    "led": {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
    "longt5": {
        **_T5,
        "local_radius": 3,
        "encoder_attention_type": "transient-global",
        "global_block_size": 2,
    },
    "m2m_100": {},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "mbart": {},
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "mvp": {},
    "nllb-moe": {**_SPARSE, "moe_eval_capacity_token_fraction": -1.0},
    "pegasus": {},
    "pegasus_x": {"num_global_tokens": 2, "block_size": 4},
    "plbart": {"decoder_start_token_id": 1},
    "prophetnet": {"ngram": 2, "num_buckets": 8, "relative_max_distance": 16},
    "switch_transformers": {**_T5, **_SPARSE, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "t5": _T5,
    "t5gemma": {"encoder": _TOWER, "decoder": _TOWER, "decoder_start_token_id": 1},
    "t5gemma2": {"decoder_start_token_id": 1},
    "umt5": _T5,
}
_FIXED = {"led": 8, "longt5": 8, "pegasus_x": 8}
_NARROW = {"fsmt", "prophetnet"}  # they compute in float32 themselves


def _entry(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return Architecture(
        "seq2seq",
        model_type,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[model_type],
        gs.Seq2SeqLM(),
        pairs(_FIXED.get(model_type)),
        _OVERRIDES[model_type],
        dtype=torch.float32 if model_type in _NARROW else torch.float64,
    )


ENTRIES = [_entry(model_type) for model_type in _OVERRIDES]
