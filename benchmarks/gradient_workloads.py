"""The workloads on which per-example gradient sketches are measured: three for any machine, two for a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import gradsketch as gs

__all__ = ["WORKLOADS", "Workload", "gpt2_small", "llama_1b", "minilm", "smollm2", "w1"]


@dataclass(frozen=True)
class Workload:
    """A model, a task, and sequences of equal length; ``labels`` where the task is not to predict the sequences."""

    name: str
    model: nn.Module
    ids: Tensor
    task: gs.Task = field(default_factory=gs.CausalLM)
    labels: Tensor | None = None

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Return the sequences in batches."""
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in self.ids.split(size)]
        if self.labels is None:
            return batches
        return [batch | {"labels": part} for batch, part in zip(batches, self.labels.split(size), strict=True)]

    def plain(self, batches: list[dict[str, Tensor]]) -> None:
        """Run one ordinary forward and backward pass of every batch, weight gradients included."""
        for batch in batches:
            self.model.zero_grad(set_to_none=True)
            self.task.losses(self.model, batch).sum().backward()
        self.model.zero_grad(set_to_none=True)


def w1(quick: bool = False) -> Workload:
    """A random-weight GPT-2 of 6 layers, width 256, vocabulary 8192, on 64 sequences of 128 random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    layers, sequences = (2, 16) if quick else (6, 64)
    config = GPT2Config(
        n_layer=layers,
        n_head=8,
        n_embd=256,
        vocab_size=8192,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    ids = torch.randint(0, 8192, (sequences, 128), generator=torch.Generator().manual_seed(1))
    return _placed("w1", GPT2LMHeadModel(config), ids)


def smollm2(quick: bool = False) -> Workload:
    """SmolLM2-135M, real weights (vocabulary 49,152, tied), on 16 pieces of 64 tokens of torch's documentation."""
    from gradsketch.demo.weights import smollm2 as load

    model, tokenizer = load()
    layers = (nn.Module, nn.Transformer, nn.Linear, nn.Conv2d, nn.LSTM, nn.Embedding, nn.MultiheadAttention)
    text = "\n".join(inspect.getdoc(layer) or "" for layer in layers)
    sequences = 4 if quick else 16
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: sequences * 64].view(sequences, 64)
    return _placed("smollm2", model, ids)


def minilm(quick: bool = False) -> Workload:
    """all-MiniLM-L6-v2 (22.7 M parameters) and a fresh head, on 64 mails of 32 tokens, spam and ham by turns."""
    from gradsketch.demo.mails import spam_assassin
    from gradsketch.demo.weights import minilm as load

    model, tokenizer = load(seed=0)
    task = gs.Classification(tokenizer, max_length=32)
    long = [mail for mail in spam_assassin() if len(mail["text"]) > 400]
    by_class = [[mail for mail in long if mail["label"] == label] for label in (0, 1)]
    half = 8 if quick else 32
    batch = task.collate([mail for pair in zip(*(mails[:half] for mails in by_class), strict=True) for mail in pair])
    assert bool(batch["attention_mask"].all()), "every mail fills the 32 tokens"
    return replace(_placed("minilm", model, batch["input_ids"]), task=task, labels=batch["labels"])


def gpt2_small(quick: bool = False) -> Workload:
    """GPT-2 small (124 M), random weights, bfloat16, on 64 sequences of 512 random tokens: for a GPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device(_device()):  # where drawing the weights takes no time
        model = GPT2LMHeadModel(GPT2Config()).bfloat16()
    return _placed("gpt2-small", model, _random(50257, 8 if quick else 64))


def llama_1b(quick: bool = False) -> Workload:
    """A Llama of 1.1 B parameters, random weights, bfloat16, on 16 sequences of 512 random tokens: for a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device(_device()):
        model = LlamaForCausalLM(config).bfloat16()
    return _placed("llama-1b", model, _random(config.vocab_size, 4 if quick else 16))


def _random(vocabulary: int, sequences: int) -> Tensor:
    return torch.randint(0, vocabulary, (sequences, 512), generator=torch.Generator().manual_seed(1))


def _placed(name: str, model: nn.Module, ids: Tensor) -> Workload:
    return Workload(name, model.eval().to(_device()), ids.to(_device()))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "w1": w1,
    "smollm2": smollm2,
    "minilm": minilm,
    "gpt2-small": gpt2_small,
    "llama-1b": llama_1b,
}
