"""Images and films: classes, pixels, and everything a model without a head returns."""

from __future__ import annotations

from typing import Any

import gradsketch as gs
from architectures.batches import Batches, images
from architectures.losses import outputs
from architectures.zoo import Architecture

__all__ = ["ENTRIES"]

_TWO_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    **_TWO_STAGES,
}
_WINDOWS = {"embed_dim": 8, "patch_size": 2, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2}
_TOWERS = {"text_config": {"max_position_embeddings": 16}}

# Pixels a side, and what shrinking by name does not know.
_CLASSIFIED: dict[str, tuple[int, dict[str, Any]]] = {
    "beit": (16, {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}),
    "bit": (32, {"embedding_size": 8, "num_groups": 2, **_TWO_STAGES}),
    "clip": (16, _TOWERS),
    "convnext": (32, {"num_stages": 2, "patch_size": 2, **_TWO_STAGES}),
    "convnextv2": (32, {"num_stages": 2, "patch_size": 2, **_TWO_STAGES}),
    "cvt": (32, {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3], "mlp_ratio": [2.0] * 3}),
    "data2vec-vision": (16, {"use_shared_relative_position_bias": True}),
    "deit": (16, {}),
    "dinov2": (16, {}),
    "dinov2_with_registers": (16, {}),
    "donut-swin": (16, _WINDOWS),
    "efficientnet": (
        32,
        {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "depth_divisor": 4, "hidden_dim": 128},
    ),
    "focalnet": (
        16,
        {
            "embed_dim": 8,
            "patch_size": 4,
            "depths": [1, 1],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
            "use_layerscale": True,
        },
    ),
    "hgnet_v2": (
        32,
        {
            "embedding_size": 8,
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 8],
            "stage_mid_channels": [8, 8],
            "stage_out_channels": [8, 16],
            "stage_num_blocks": [1, 1],
            "stage_downsample": [False, True],
            "stage_downsample_strides": [2, 2],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [1, 1],
            "use_learnable_affine_block": True,
        },
    ),
    "hiera": (
        32,
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "num_heads": [1, 2],
            "depths": [1, 1],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "query_stride": [2, 2],
        },
    ),
    "ijepa": (16, {}),
    "levit": (
        64,
        {
            "image_size": 64,
            "hidden_sizes": [16] * 3,
            "num_attention_heads": [2] * 3,
            "depths": [1] * 3,
            "key_dim": [4] * 3,
            "patch_size": 16,
        },
    ),
    "metaclip_2": (16, _TOWERS),
    "mobilenet_v1": (32, {"depth_multiplier": 0.05, "min_depth": 4, "image_size": 32}),
    "mobilenet_v2": (32, {"depth_multiplier": 0.1, "min_depth": 4, "image_size": 32, "finegrained_output": False}),
    "mobilevit": (
        32,
        {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16]},
    ),
    "mobilevitv2": (
        64,
        {"image_size": 64, "width_multiplier": 0.125, "base_attn_unit_dims": [16, 16, 16], "patch_size": 2},
    ),
    "poolformer": (32, {"padding": [1, 1], **_PYRAMID}),
    "pvt": (
        32,
        {
            "image_size": 32,
            "num_encoder_blocks": 2,
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "sequence_reduction_ratios": [2, 1],
            "mlp_ratios": [2, 2],
            **_TWO_STAGES,
        },
    ),
    "pvt_v2": (
        64,
        {
            "image_size": 64,
            "depths": [1] * 4,
            "hidden_sizes": [8, 8, 8, 16],
            "num_attention_heads": [1, 1, 1, 2],
            "mlp_ratios": [2] * 4,
        },
    ),
    "regnet": (16, {"embedding_size": 8, "groups_width": 4, "layer_type": "y", **_TWO_STAGES}),
    "resnet": (16, {"embedding_size": 8, "layer_type": "bottleneck", **_TWO_STAGES}),
    "segformer": (
        32,
        {
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            **_PYRAMID,
        },
    ),
    "siglip": (16, _TOWERS),
    "swiftformer": (64, {"image_size": 64, "depths": [1] * 4, "embed_dims": [8, 8, 8, 16]}),
    "swin": (16, {"use_absolute_embeddings": True, **_WINDOWS}),
    "swinv2": (16, _WINDOWS),
    "textnet": (32, {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 12, 16]}),
    "vit": (16, {}),
    "vit_msn": (16, {}),
}


def _classified(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    model = CLASSES[model_type]
    size, overrides = _CLASSIFIED[model_type]
    return Architecture(
        "vision",
        model_type,
        model[0] if isinstance(model, tuple) else model,
        gs.Classification(),
        images(size),
        {**overrides, "num_labels": 3},
        "classes",
    )


# Inputs, and what shrinking by name does not know.
_IMAGE, _FILM = images(16, labels=False), images(4, 3, 16, 16, labels=False)
_BARE: dict[str, tuple[Batches, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            "aimv2_vision_model chinese_clip_vision_model clip_vision_model dinov3_vit dpt internvl_vision "
            "mlcd_vision_model pixio qianfan_ocr_vision sam3_vit_model sapiens2 siglip_vision_model "
            "tipsv2_vision_model vitdet"
        ).split(),
        (_IMAGE, {}),
    ),
    "glpn": (
        images(32, labels=False),
        {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2], **_PYRAMID},
    ),
    "radio": (_IMAGE, {"max_img_size": 32}),
    "sam_vision_model": (_IMAGE, {"mlp_dim": 40, "output_channels": 16, "num_pos_feats": 8, "window_size": 2}),
    "swin2sr": (_IMAGE, {**_WINDOWS, "patch_size": 1, "embed_dim": 8}),
    "timesformer": (_FILM, {"num_frames": 4}),
    "videomae": (_FILM, {"num_frames": 4, "tubelet_size": 2}),
    "vivit": (_FILM, {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "vjepa2": (
        images(4, 3, 16, 16, name="pixel_values_videos", labels=False),
        {
            "crop_size": 16,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_hidden_layers": 1,
            "pred_num_attention_heads": 4,
            "mlp_ratio": 2,
        },
    ),
    "yolos": (_IMAGE, {"image_size": [16, 16], "num_detection_tokens": 4}),
}


def _bare(model_type: str) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as CLASSES

    batches, overrides = _BARE[model_type]
    return Architecture("vision", model_type, CLASSES[model_type], outputs, batches, overrides, "bare")


ENTRIES = [*map(_classified, _CLASSIFIED), *map(_bare, _BARE)]
