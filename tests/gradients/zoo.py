"""Tiny random models of every architecture we promise, each with a task and examples that are awkward on purpose.

A case is built when a test asks for it. Every list of examples has variable lengths, a repeated example and, where
the task allows it, an example whose loss is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch import CausalLM, Classification, MaskedLM, Seq2SeqLM, Task
from gradsketch.gradients.parameters import Parameters

VOCABULARY = 41


@dataclass(frozen=True)
class Case:
    """A model, a task and raw examples; ``build`` returns the model in float32, train mode as constructed."""

    name: str
    build: Callable[[], nn.Module]
    task: Task
    examples: list[Any]

    def model(self, seed: int = 0) -> nn.Module:
        """Return the model in float64 and eval mode, every parameter random (none left at 0 or 1)."""
        torch.manual_seed(seed)
        model = self.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * parameter)
        return model


def _tokens(length: int, seed: int) -> list[int]:
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _hf(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        model: nn.Module = getattr(transformers, name)(made)
        return model

    return build


def _lengths() -> list[dict[str, list[int]]]:
    answer = _tokens(6, 2)
    return [
        {"input_ids": _tokens(7, 0)},
        {"input_ids": _tokens(4, 1)},
        {"input_ids": answer, "labels": [-100, -100, *answer[2:]]},
        {"input_ids": answer, "labels": [-100, -100, *answer[2:]]},
        {"input_ids": _tokens(3, 3), "labels": [-100] * 3},
    ]


def _masked() -> list[dict[str, list[int]]]:
    rows = []
    for seed, length in enumerate((7, 4, 6)):
        ids = _tokens(length, seed)
        rows.append({"input_ids": [5 if t % 2 else i for t, i in enumerate(ids)],
                     "labels": [i if t % 2 else -100 for t, i in enumerate(ids)]})  # fmt: skip
    return [*rows, rows[1], {"input_ids": _tokens(3, 9), "labels": [-100] * 3}]


def _pairs() -> list[dict[str, list[int]]]:
    rows = [{"input_ids": _tokens(s, s), "labels": _tokens(t, 20 + t)} for s, t in ((7, 3), (3, 5), (5, 4))]
    return [*rows, rows[2], {"input_ids": _tokens(4, 9), "labels": [-100, -100]}]


def _images(size: int = 8) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(3, size, size, generator=generator, dtype=torch.float64), i % 3) for i in range(3)]
    return [*rows, rows[0]]


def _vectors() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(6, generator=generator, dtype=torch.float64), i % 3) for i in range(4)]
    return [*rows, rows[1]]


class LSTM(nn.Module):
    """A recurrent language model of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(input_ids))[0])
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 3))


def convolutions() -> nn.Module:
    """Strides, dilations, groups, padding of every kind; channels of a GroupNorm."""
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, stride=2, padding=1, groups=3),
        nn.GroupNorm(2, 6),
        nn.Conv1d(6, 4, 2, dilation=2, padding=1, padding_mode="circular"),
        nn.Unflatten(1, (4, 1)),
        nn.Conv2d(4, 4, (1, 3), padding="same", bias=False),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def _signals() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(3, 12, generator=generator, dtype=torch.float64), i % 3) for i in range(4)]
    return [*rows, rows[2]]


_SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
_LLAMA = dict(**_SMALL, intermediate_size=12, num_key_value_heads=1, max_position_embeddings=16)
_BERT = dict(**_SMALL, intermediate_size=12, max_position_embeddings=16)
_GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": VOCABULARY, "n_positions": 16}
_T5 = {
    "d_model": 8,
    "d_ff": 12,
    "d_kv": 4,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
_BART = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
}
_OPT = dict(**_SMALL, ffn_dim=12, word_embed_proj_dim=8, max_position_embeddings=16)
# The grouped kernel of transformers takes no float64.
_MIXTRAL = dict(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
_ALBERT = dict(**(_BERT | {"num_hidden_layers": 12}), embedding_size=6)
_VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
_DISTILBERT = {
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
}

CASES = {
    case.name: case
    for case in (
        Case("gpt2", _hf("GPT2LMHeadModel", "GPT2Config", **_GPT2), CausalLM(), _lengths()),
        Case("llama", _hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA), CausalLM(reduction="sum"), _lengths()),
        Case("mistral", _hf("MistralForCausalLM", "MistralConfig", **_LLAMA, sliding_window=4), CausalLM(), _lengths()),
        Case("qwen3", _hf("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=4), CausalLM(), _lengths()),
        Case("gemma", _hf("GemmaForCausalLM", "GemmaConfig", **_LLAMA, head_dim=4), CausalLM(), _lengths()),
        Case("opt", _hf("OPTForCausalLM", "OPTConfig", **_OPT), CausalLM(), _lengths()),
        Case("gpt-neox", _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_BERT), CausalLM(), _lengths()),
        Case("mixtral", _hf("MixtralForCausalLM", "MixtralConfig", **_MIXTRAL), CausalLM(), _lengths()),
        Case("bert", _hf("BertForMaskedLM", "BertConfig", **_BERT), MaskedLM(), _masked()),
        Case("roberta", _hf("RobertaForMaskedLM", "RobertaConfig", **_BERT), MaskedLM(), _masked()),
        Case("albert", _hf("AlbertForMaskedLM", "AlbertConfig", **_ALBERT), MaskedLM(), _masked()),
        Case("distilbert", _hf("DistilBertForMaskedLM", "DistilBertConfig", **_DISTILBERT), MaskedLM(), _masked()),
        Case("t5", _hf("T5ForConditionalGeneration", "T5Config", **_T5), Seq2SeqLM(), _pairs()),
        Case("bart", _hf("BartForConditionalGeneration", "BartConfig", **_BART), Seq2SeqLM(), _pairs()),
        Case(
            "vit",
            _hf("ViTForImageClassification", "ViTConfig", **_VIT, image_size=8, patch_size=4, num_labels=3),
            Classification(),
            _images(),
        ),
        Case("resnet", _hf("ResNetForImageClassification", "ResNetConfig", **_RESNET), Classification(), _images(16)),
        Case("lstm", LSTM, CausalLM(), _lengths()),
        Case("mlp", mlp, Classification(), _vectors()),
        Case("convolutions", convolutions, Classification(), _signals()),
    )
}


def exact_gradients(model: nn.Module, task: Task, examples: list[Any], parameters: Parameters) -> Tensor:
    """Return per-example gradients ``[b, n]`` by torch.func, each example collated alone, without padding."""
    values = {name: tensor.detach() for name, tensor in parameters}
    rows = []
    for example in examples:
        batch = task.collate([example])

        def loss(tensors: dict[str, Tensor], batch: Any = batch) -> Tensor:
            with torch.nn.utils.stateless._reparametrize_module(model, tensors, tie_weights=True):
                return task.losses(model, batch)[0]

        rows.append(parameters.flatten(torch.func.grad(loss)(values)))
    return torch.stack(rows)
