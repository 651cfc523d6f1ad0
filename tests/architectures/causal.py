"""Causal language models: next-token loss on rows of different lengths."""

from __future__ import annotations

from typing import Any

import torch

import gradsketch as gs
from architectures.batches import causal
from architectures.zoo import Architecture

__all__ = ["ENTRIES"]

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
_SHRUNK_BY_NAME = (
    "afmoe apertus arcee aria_text bart beam bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom "
    "cohere cohere2_moe ctrl cwm diffllama doge dots1 ernie4_5 ernie4_5_moe exaone_moe falcon falcon_mamba "
    "flex_olmo flint gemma glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite "
    "granitemoe granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax "
    "jais2 jetmoe kolibri1 laguna llama llama4_text mamba marian mbart mellum mimo_v2_flash minimax "
    "minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder mpt mvp nanochat "
    "nemotron nemotron_h olmo olmo2 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phimoe plbart "
    "prophetnet qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr "
    "whisper xglm xlm"
).split()

_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "bailing_hybrid": {
        "layer_types": [LINEAR, FULL],
        "mlp_layer_types": ["dense", "sparse"],
        "num_expert_group": 1,
        "topk_group": 1,
        "num_experts_per_token": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "num_key_value_heads": 4,
    },
    "bamba": {"attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "camembert": {"is_decoder": True},
    "codegen": {"rotary_dim": 8},
    "cohere2": {"layer_types": [SLIDING, FULL]},
    "cpmant": {
        "dim_head": 8,
        "prompt_length": 4,
        "prompt_types": 4,
        "position_bias_num_buckets": 8,
        "position_bias_max_distance": 16,
    },
    "data2vec-text": {"is_decoder": True},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe"],
        "hc_mult": 2,
        "partial_rotary_factor": 0.5,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "electra": {"is_decoder": True},
    "ernie": {"is_decoder": True},
    "exaone4": {"layer_types": [SLIDING, FULL]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"layer_types": [SLIDING, FULL]},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "intermediate_size": [40, 40, 40],
        "layer_types": [SLIDING, FULL, SLIDING],
        "num_kv_shared_layers": 1,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0, 0.5],
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "per_layer_config": {},
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "global_head_dim": 8,
    },
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 8},
    "granite_swa": {"sliding_window": 16},
    "granitemoe_swa": {"sliding_window": 16},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "sliding_window_size": 4,
    },
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "sliding_window_size": 4,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        "num_experts": 4,
        "num_experts_per_token": 2,
        "layer_types": [LINEAR, FULL],
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
    },
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", FULL]},
    "longcat_flash": {
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_key_value_heads": 4,
        "qk_head_dim": 16,
        "head_dim": 8,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "megatron-bert": {"is_decoder": True},
    "minicpm3": {"num_key_value_heads": 4},
    "olmo3": {"layer_types": [SLIDING, FULL]},
    "qwen3_5_moe_text": {"layer_types": [LINEAR, FULL]},
    "qwen3_5_text": {"layer_types": [LINEAR, FULL]},
    "qwen3_next": {"layer_types": [LINEAR, FULL]},
    "qwen4_exp_text": {
        "layer_types": [LINEAR, "indexed_attention"],
        "hc_lowrank": 4,
        "hc_count": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 16],
        "axial_pos_embds_dim": [8, 24],
        "feed_forward_size": 40,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "max_position_embeddings": 64,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "axial_pos_embds": False,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24, "is_decoder": True},
    "roberta": {"is_decoder": True},
    "roberta-prelayernorm": {"is_decoder": True},
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 97,
        "shape_embed_dim": 8,
        "shape_vocab_size": 97,
    },
    "roformer": {"is_decoder": True},
    "vaultgemma": {"sliding_window": 16},
    "xlm-roberta": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True},
    "xlnet": {"d_inner": 40, "d_head": 8},
    "xlstm": {"mode": "train", "return_last_states": True, "ffn_round_up_to_multiple_of": 8, "embedding_dim": 32},
    "xmod": {"is_decoder": True, "default_language": "en_XX", "languages": ["en_XX"]},
    "youtu": {"num_key_value_heads": 4},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "num_key_value_heads": 4,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "use_mamba_kernels": False,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "router_hidden_size": 8,
        "sliding_window": 4,
    },
}
_NARROW = {"xglm", "inkling2_text", "xlstm", "prophetnet"}  # they compute in float32 themselves
_FIXED = {"xlstm": 8, "reformer": 8}  # lengths that their blocks divide


def _entry(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return Architecture(
        "causal",
        model_type,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
        gs.CausalLM(),
        causal(_FIXED.get(model_type)),
        _OVERRIDES.get(model_type, {}),
        dtype=torch.float32 if model_type in _NARROW else torch.float64,
        training=model_type == "reformer",
    )


ENTRIES = [_entry(model_type) for model_type in sorted([*_SHRUNK_BY_NAME, *_OVERRIDES])]
