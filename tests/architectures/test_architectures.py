"""Every architecture transformers builds: per-example gradients are right, or refused in one clear message."""

from __future__ import annotations

import pytest

from architectures.known import REFUSED, SLOW, TORCH_WRONG
from architectures.survey import survey
from architectures.table import FAST
from architectures.zoo import GROUPS, architectures

ALL = architectures()
# One of each kind of layer, attention, routing and input; the others run with ``-m slow``.
QUICK = """
causal/afmoe causal/aria_text causal/bamba causal/beam causal/bert causal/bloom causal/codegen causal/cohere
causal/cpmant causal/ctrl causal/dbrx causal/deepseek_v2 causal/deepseek_v3 causal/diffllama causal/doge causal/falcon
causal/falcon_h1 causal/falcon_mamba causal/gemma2 causal/gemma3n_text causal/gemma4_text causal/glm4_moe causal/gpt2
causal/gpt_bigcode causal/gpt_neo causal/gpt_neox causal/gpt_oss causal/gptj causal/granitemoehybrid causal/jamba
causal/jetmoe causal/lfm2 causal/llama causal/llama4_text causal/longcat_flash causal/mamba causal/mamba2
causal/mixtral causal/mpt causal/nemotron causal/olmo2 causal/olmoe causal/opt causal/phi causal/phi3
causal/prophetnet causal/qwen2_moe causal/qwen3 causal/qwen3_next causal/recurrent_gemma causal/reformer
causal/roc_bert causal/rwkv causal/stablelm causal/whisper causal/xglm causal/xlm causal/xlnet causal/xlstm
causal/zamba2 encoder/albert encoder/bert encoder/big_bird encoder/canine-classes encoder/convbert encoder/deberta
encoder/deberta-v2 encoder/distilbert encoder/esm encoder/fnet encoder/funnel encoder/longformer-classes
encoder/mobilebert encoder/modernbert encoder/mpnet encoder/mra encoder/nystromformer encoder/roformer
encoder/squeezebert encoder/tapas encoder/t5-classes encoder/yoso seq2seq/bart seq2seq/fsmt seq2seq/led seq2seq/longt5
seq2seq/mbart seq2seq/nllb-moe seq2seq/pegasus_x seq2seq/switch_transformers seq2seq/t5 seq2seq/t5gemma
vision/bit-classes vision/convnext-classes vision/dinov2-classes vision/focalnet-classes vision/mobilenet_v2-classes
vision/mobilevit-classes vision/poolformer-classes vision/pvt-classes vision/regnet-classes vision/resnet-classes
vision/segformer-classes vision/swin-classes vision/swinv2-classes vision/vit-classes
speech/audio-spectrogram-transformer speech/hubert-symbols speech/sew-d-classes speech/wav2vec2-classes
speech/wav2vec2-conformer-classes speech/wavlm-classes speech/whisper multimodal/clip multimodal/clipseg
multimodal/llava multimodal/paligemma multimodal/siglip multimodal/qwen2_vl multimodal/git vision/cvt-classes
vision/dinov3_vit-bare vision/levit-classes vision/vjepa2-bare
""".split()


def _cases() -> list[object]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in ALL]


@pytest.mark.parametrize("name", _cases())
def test_gradients_are_right_or_refused(name):
    [found] = survey([ALL[name]])
    assert found.outcome == expected(name), found
    if name not in REFUSED:  # how fast a refusal would be says nothing
        assert (found.fast_share >= FAST) == (name not in SLOW), found


def expected(name: str) -> str:
    if name in TORCH_WRONG:
        return "wrong"
    return "refused" if name in REFUSED else "right"


def test_the_lists_name_architectures():
    assert set(QUICK) <= set(ALL)
    assert {*REFUSED, *SLOW, *TORCH_WRONG} <= set(ALL)
    assert len(QUICK) == len(set(QUICK)) >= len(ALL) / 3


def test_enough_architectures():
    by_group = {group: {one.model_type for one in ALL.values() if one.group == group} for group in GROUPS}
    assert len(by_group.pop("causal")) >= 160
    assert sum(map(len, by_group.values())) >= 150
