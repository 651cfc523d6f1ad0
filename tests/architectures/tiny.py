"""Configurations of any model type, shrunk by the names of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["IMAGE", "VOCABULARY", "tiny_config"]

VOCABULARY = 97
IMAGE = 16  # pixels a side
_WIDTH, _INNER, _HEADS, _EXPERTS = 32, 40, 4, 4

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size n_embd d_model dim word_embed_proj_dim emb_dim lru_width dim_model "
            "attention_hidden_size rnn_hidden_size out_hidden_size cross_attention_hidden_size text_embed_dim "
            "decoder_hidden_size"
        ).split(),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_ff n_inner dff "
            "hidden_dim dim_ff decoder_ffn decoder_intermediate_size dim_feedforward"
        ).split(),
        _INNER,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
            "shared_intermediate_size expert_ffn_hidden_size moe_intermediate moe_shared_intermediate"
        ).split(),
        24,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
            "num_decoder_layers num_blocks depth decoder_num_hidden_layers encoder_num_hidden_layers "
            "decoder_depth"
        ).split(),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads "
            "num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads "
            "decoder_num_attention_heads linear_num_value_heads mamba_n_heads mamba_num_heads"
        ).split(),
        _HEADS,
    ),
    **dict.fromkeys(
        [
            "num_key_value_heads",
            "num_kv_heads",
            "linear_num_key_heads",
            "index_n_heads",
            "encoder_num_key_value_heads",
            "decoder_num_key_value_heads",
        ],
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
            "linear_value_head_dim index_head_dim kv_channels attention_head_dim hidden_size_per_layer_input "
            "o_lora_rank"
        ).split(),
        8,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings n_positions max_seq_len n_ctx n_ctx_ original_max_position_embeddings "
            "max_source_positions max_target_positions"
        ).split(),
        64,
    ),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], _EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk"], 2),
    **dict.fromkeys(
        (
            "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace "
            "moe_layer_start_index num_dense_layers mamba_ngroups"
        ).split(),
        1,
    ),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(
        (
            "state_size mamba_d_state time_step_rank mamba_dt_rank mamba_chunk_size chunk_size ssm_state_size "
            "attention_window_size block_size index_topk sliding_window attention_chunk_size"
        ).split(),
        4,
    ),
    **dict.fromkeys(["embedding_size", "q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["embed_dim", "embed_dims", "projection_dim"], _WIDTH),
    **dict.fromkeys(["mamba_expand", "mamba_n_groups", "n_groups", "type_vocab_size", "o_groups", "o_group"], 2),
    **dict.fromkeys(["attention_dropout", "hidden_dropout", "dropout", "dropout_rate"], 0.0),
    "mamba_intermediate": 64,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
# Fields that switch something on where they are set at all.
_SWITCHES = {"n_group", "topk_group", "q_lora_rank", "attention_chunk_size", "sliding_window", "n_inner"}


def tiny_config(model_type: str, overrides: Mapping[str, Any]) -> Any:
    """Return a configuration of a few thousand parameters; overrides may reach into configurations within it."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[model_type]()
    return type(default)(**_merged(_shrunk(default, overrides), overrides))


def _shrunk(config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    aliases = getattr(config, "attribute_map", None) or {}
    fields = config.to_dict()
    fields |= {alias: fields.get(name) for alias, name in aliases.items()}
    shrunk = {
        name: size
        for name, size in _SIZES.items()
        if name in fields and (name in overrides or aliases.get(name) not in _SIZES) and not _fixed(name, fields[name])
    }
    for name, inner in vars(config).items():
        if hasattr(inner, "model_type") and hasattr(inner, "to_dict"):
            within = overrides.get(name)
            shrunk[name] = {
                "model_type": inner.model_type,
                **_shrunk(inner, within if isinstance(within, dict) else {}),
            }
    return shrunk


def _fixed(name: str, value: Any) -> bool:
    """Whether shrinking the field would change what the model is: a switch that is off, or a list of sizes."""
    return (value is None and name in _SWITCHES) or isinstance(value, list | tuple)


def _merged(into: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``into`` updated by ``other``; where both hold the configuration of a part, that is updated likewise."""
    merged = {**into, **other}
    for name in into.keys() & other.keys():
        if isinstance(into[name], Mapping) and isinstance(other[name], Mapping):
            merged[name] = _merged(into[name], other[name])
    return merged
