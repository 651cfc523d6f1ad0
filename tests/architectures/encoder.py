"""Encoders of text: hidden tokens, classes, and everything a model without a head returns."""

from __future__ import annotations

from typing import Any

import torch

import gradsketch as gs
from architectures.batches import classified, masked, texts
from architectures.losses import outputs
from architectures.zoo import Architecture

__all__ = ["ENTRIES"]

_MASKED = (
    "albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm "
    "esmc eurobert flaubert fnet funnel gte ibert jina_embeddings_v3 layoutlm longformer luke megatron-bert "
    "mobilebert modernbert mpnet mra neomme nomic_bert nystromformer reformer rembert roberta "
    "roberta-prelayernorm roc_bert roformer squeezebert tapas ultrabert xlm xlm-roberta xlm-roberta-xl xmod "
    "yoso"
).split()
_CLASSIFIED = (
    "bart bert canine deberta-v2 electra esm funnel gpt2 gpt_neo layoutlmv3 lilt llama longformer markuplm "
    "mixtral mobilebert mpnet opt t5 xlnet"
).split()
_WITHOUT_A_HEAD = (
    "bert-generation clip_text_model dpr embedding_gemma2_text molmo2_text openai_privacy_filter splinter "
    "tipsv2_text_model visual_bert"
).split()

_OVERRIDES: dict[str, dict[str, Any]] = {
    "albert": {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 1},
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2, "num_groups": 1},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 16,
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
    },
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "flaubert": {"emb_dim": 32},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "n_head": 4, "d_head": 8, "d_inner": 40},
    "gpt2": {"pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 5, "shape_size": 6},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": 2, "segment_means_seq_len": 8},
    "reformer": {
        "num_attention_heads": 2,
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": 40,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
        "is_decoder": False,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 97,
        "shape_embed_dim": 8,
        "shape_vocab_size": 97,
    },
    "squeezebert": {"embedding_size": 32},
    "t5": {"decoder_start_token_id": 0},
    "xlm": {"emb_dim": 32},
    "xlnet": {"d_inner": 40, "d_head": 8},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "yoso": {"use_expectation": True},
}
# Lengths that these models want; FNet takes no mask, so that its rows must be of one length.
_FIXED = {"reformer": 8, "mra": 32, "nystromformer": 8, "canine": 16, "longformer": 8, "fnet": 8}
_LAST = {"bart": 2, "t5": 2}  # they read their answer at the end of the text


def _masked(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as CLASSES

    batches = masked(_FIXED.get(model_type))
    return _entry(model_type, CLASSES[model_type], gs.MaskedLM(), batches)


def _classified(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    last = _LAST.get(model_type)
    batches = classified(_FIXED.get(model_type) or (last and 6), last)
    return _entry(model_type, CLASSES[model_type], gs.Classification(), batches, head="classes", num_labels=3)


def _bare(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as CLASSES

    return _entry(model_type, CLASSES[model_type], outputs, texts(), head="bare")


def _entry(model_type: str, model: str, task: gs.Task, batches: Any, head: str = "", **more: Any) -> Architecture:
    overrides = {**_OVERRIDES.get(model_type, {}), **more}
    training, dtype = model_type == "reformer", torch.float32 if model_type == "mra" else torch.float64
    return Architecture("encoder", model_type, model, task, batches, overrides, head, dtype, training)


ENTRIES = [*map(_masked, _MASKED), *map(_classified, _CLASSIFIED), *map(_bare, _WITHOUT_A_HEAD)]
