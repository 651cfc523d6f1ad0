"""Images with text: an image close to its own text, and text about an image."""

from __future__ import annotations

from typing import Any

from architectures.batches import Batches, images, noise, texts, together, with_images
from architectures.losses import alignment, flat_images, image_text, outputs
from architectures.tiny import VOCABULARY
from architectures.zoo import Architecture

import gradsketch as gs

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
# Places an image takes, and what shrinking by name does not know.
_TOKENS = {"image_token_index": _PLACE, "image_token_id": _PLACE}
_VISION = {"model_type": "clip_vision_model"}
_TEXT: dict[str, Any] = {"model_type": "llama"}
_DESCRIBED: dict[str, tuple[int, dict[str, Any]]] = {
    "llava": (4, {"image_seq_length": 4, "vision_feature_layer": -1}),
    "vipllava": (4, {"image_seq_length": 4, "vision_feature_layers": [-1, -2]}),
    "paligemma": (4, {"projection_dim": 32}),
}
_GRID = {"mm_token_type_ids": [0, 1, 1, 1, 1, *[0] * 6], "image_grid_thw": [1, 4, 4]}


def _aligned(model_type: str) -> Architecture:
    return _entry(model_type, _bare_class(model_type), alignment, _BOTH, _ALIGNED[model_type])


def _described(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as CLASSES

    places, overrides = _DESCRIBED[model_type]
    batches = with_images(places, images(16, labels=False))
    return _entry(model_type, CLASSES[model_type], image_text, batches, {**_TOKENS, **overrides})


def _bare_class(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    model = MODEL_MAPPING_NAMES[model_type]
    return model[0] if isinstance(model, tuple) else model


def _entry(
    model_type: str, model: str, task: gs.Task, batches: Batches, overrides: dict[str, Any], head: str = ""
) -> Architecture:
    return Architecture("multimodal", model_type, model, task, batches, overrides, head)


ENTRIES = [*map(_aligned, _ALIGNED), *map(_described, _DESCRIBED)]
