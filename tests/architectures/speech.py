"""Sounds: classes, symbols in time, dictation, and everything a model without a head returns."""

from __future__ import annotations

from typing import Any

import gradsketch as gs
from architectures.batches import Batches, noise
from architectures.losses import ctc, dictation, outputs
from architectures.zoo import Architecture

__all__ = ["ENTRIES"]

_WAVE = noise("input_values", 96)
_WAV2VEC: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
    "mask_time_prob": 0.0,
    "classifier_proj_size": 16,
    "num_labels": 3,
}
_LIKE_WAV2VEC: dict[str, tuple[str, dict[str, Any]]] = {
    "data2vec-audio": ("Data2VecAudio", {}),
    "hubert": ("Hubert", {}),
    "sew": ("SEW", {"squeeze_factor": 2}),
    "sew-d": ("SEWD", {"squeeze_factor": 2, "max_position_embeddings": 64, "position_buckets": 8}),
    "unispeech": ("UniSpeech", {}),
    "unispeech-sat": ("UniSpeechSat", {}),
    "wav2vec2": ("Wav2Vec2", {}),
    "wav2vec2-conformer": (
        "Wav2Vec2Conformer",
        {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3},
    ),
    "wavlm": ("WavLM", {"num_buckets": 8, "max_bucket_distance": 16}),
}
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


def _classified(model_type: str, head: str = "classes", **more: Any) -> Architecture:
    name, overrides = _LIKE_WAV2VEC[model_type]
    model = f"{name}ForSequenceClassification"
    return _entry(model_type, model, gs.Classification(), _WAVE, head, **{**_WAV2VEC, **overrides, **more})


def _symbols(model_type: str) -> Architecture:
    name, overrides = _LIKE_WAV2VEC[model_type]
    return _entry(model_type, f"{name}ForCTC", ctc, _WAVE, "symbols", **{**_WAV2VEC, **overrides})


def _bare(model_type: str, batches: Batches, **overrides: Any) -> Architecture:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return _entry(model_type, MODEL_MAPPING_NAMES[model_type], outputs, batches, "bare", **overrides)


def _entry(
    model_type: str, model: str, task: gs.Task, batches: Batches, head: str = "", **overrides: Any
) -> Architecture:
    return Architecture("speech", model_type, model, task, batches, overrides, head)


ENTRIES = [
    *map(_classified, _LIKE_WAV2VEC),
    _classified("wav2vec2", "layer-norm", **_LAYER_NORM),
    _symbols("wav2vec2"),
    _symbols("hubert"),
    _entry(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        gs.Classification(),
        noise("input_values", 24, 16),
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=16,
        num_labels=3,
    ),
    _entry(
        "whisper",
        "WhisperForConditionalGeneration",
        dictation,
        noise("input_features", 8, 32),
        num_mel_bins=8,
        max_source_positions=16,
    ),
    _entry(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        dictation,
        noise("input_features", 32, 8),
        input_feat_per_channel=8,
        conv_channels=16,
    ),
    _entry(
        "moonshine",
        "MoonshineForConditionalGeneration",
        dictation,
        noise("input_values", 1600),
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
    ),
    _bare("wav2vec2-bert", noise("input_features", 32, 16, labels=False), feature_projection_input_dim=16),
    _bare("qwen2_audio_encoder", noise("input_features", 8, 32, labels=False), num_mel_bins=8, max_source_positions=16),
    _bare("voxtral_encoder", noise("input_features", 8, 32, labels=False), num_mel_bins=8, max_source_positions=16),
    _bare("glmasr_encoder", noise("input_features", 8, 32, labels=False), num_mel_bins=8),
    _bare(
        "parakeet_encoder",
        noise("input_features", 32, 16, labels=False),
        num_mel_bins=16,
        subsampling_conv_channels=8,
        scale_input=False,
    ),
    _bare("lasr_encoder", noise("input_features", 64, 16, labels=False), num_mel_bins=16, subsampling_conv_channels=8),
    _bare(
        "encodec",
        noise("input_values", 1, 400, labels=False),
        num_filters=4,
        num_residual_layers=1,
        codebook_size=8,
        codebook_dim=32,
    ),
]
