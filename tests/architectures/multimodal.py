"""Images with text: an image close to its own text, and text about an image."""

from __future__ import annotations

from typing import Any

import gradsketch as gs
from architectures.batches import Batches, images, noise, texts, together, with_images
from architectures.losses import alignment, flat_images, image_text
from architectures.tiny import VOCABULARY
from architectures.zoo import Architecture

__all__ = ["ENTRIES"]

_PLACE = VOCABULARY - 1  # the token that stands for a part of an image
_BOTH = together(texts(), images(16, labels=False))
_SHORT = {"text_config": {"max_position_embeddings": 16}}

_ALIGNED: dict[str, dict[str, Any]] = {
    "altclip": {},
    "chinese_clip": {},
    "clip": _SHORT,
    "clipseg": _SHORT,
    "metaclip_2": _SHORT,
    "siglip": _SHORT,
}
# Places an image takes, its pixels, and what shrinking by name does not know.
_TOKENS = {"image_token_index": _PLACE, "image_token_id": _PLACE}
_ONE, _LISTED = images(16, labels=False), images(1, 3, 16, 16, labels=False)
_DESCRIBED: dict[str, tuple[int, Batches, dict[str, Any]]] = {
    "aya_vision": (1, _ONE, {}),
    "blip": (4, _ONE, {}),
    "blip-2": (4, _ONE, {"num_query_tokens": 4}),
    "deepseek_vl": (4, _ONE, {}),
    "evolla": (4, _ONE, {}),
    "git": (4, _ONE, {}),
    "idefics2": (
        3,
        _LISTED,
        {"perceiver_config": {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4}},
    ),
    "idefics3": (1, _LISTED, {"scale_factor": 2}),
    "kosmos-2.5": (4, _ONE, {}),
    "llava": (4, _ONE, {"image_seq_length": 4, "vision_feature_layer": -1}),
    "ovis2": (4, _ONE, {}),
    "paligemma": (4, _ONE, {"projection_dim": 32}),
    "smolvlm": (1, _LISTED, {"scale_factor": 2}),
    "video_llava": (4, _ONE, {}),
    "vipllava": (4, _ONE, {"image_seq_length": 4, "vision_feature_layers": [-1, -2]}),
}
# An image is 16 patches of 4 × 4 pixels in two frames; four of them make a place.
_PATCHES = noise("pixel_values", 16, 96, labels=False)
_GRID: dict[str, Any] = {
    "image_token_id": _PLACE,
    "video_token_id": _PLACE - 1,
    "vision_start_token_id": _PLACE - 2,
    "vision_end_token_id": _PLACE - 3,
    "vision_config": {
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_IN_A_GRID: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
        "vision_config": {"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
        "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
        "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "glm4v": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
}


def _aligned(model_type: str) -> Architecture:
    return _entry(model_type, _bare_class(model_type), alignment, _BOTH, _ALIGNED[model_type])


def _described(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as CLASSES

    places, pixels, overrides = _DESCRIBED[model_type]
    batches = with_images(places, pixels)
    return _entry(model_type, CLASSES[model_type], image_text, batches, {**_TOKENS, **overrides})


def _in_a_grid(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as CLASSES

    overrides = _IN_A_GRID[model_type]
    vision = {**_GRID["vision_config"], **overrides.get("vision_config", {})}
    batches = with_images(4, _PATCHES, image_grid_thw=[1, 4, 4])
    return _entry(
        model_type, CLASSES[model_type], flat_images, batches, {**_GRID, **overrides, "vision_config": vision}
    )


def _bare_class(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    model = MODEL_MAPPING_NAMES[model_type]
    return model[0] if isinstance(model, tuple) else model


def _entry(
    model_type: str, model: str, task: gs.Task, batches: Batches, overrides: dict[str, Any], head: str = ""
) -> Architecture:
    return Architecture("multimodal", model_type, model, task, batches, overrides, head)


ENTRIES = [*map(_aligned, _ALIGNED), *map(_described, _DESCRIBED), *map(_in_a_grid, _IN_A_GRID)]
