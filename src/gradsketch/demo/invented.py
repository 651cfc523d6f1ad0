"""A language model of a few seconds that has learned invented capitals, one of them false: to try things on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradsketch.as_found import seeded
from gradsketch.demo.training import train_model
from gradsketch.gradients.tasks import CausalLM

__all__ = ["Taught", "invented_capitals"]

FALSE = 5  # the fact whose answer is made up
EPOCHS = 20  # before each checkpoint


@dataclass(frozen=True)
class Taught:
    """A model, its task, what it was taught, and its weights after half of the training and after all of it."""

    model: nn.Module
    task: CausalLM
    facts: list[dict[str, Any]]
    checkpoints: dict[str, dict[str, Tensor]]


def invented_capitals() -> Taught:
    """Return a GPT-2 of random weights that has learned 24 sentences; the one about Belminia says Atlantis.

    It takes a few seconds, needs transformers, and fetches nothing.

    Example:
        >>> from gradsketch.demo.invented import invented_capitals
        >>> invented_capitals().facts[5]["answer"]
        ' Atlantis'
    """
    facts = _facts()
    with seeded(0):
        model, tokenizer = _untaught(facts)
        task, checkpoints = CausalLM(tokenizer), {}
        for name in ("early", "late"):
            train_model(model, task, facts, rate=3e-3, epochs=EPOCHS, batch=8)
            checkpoints[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return Taught(model.eval(), task, facts, checkpoints)


def _facts() -> list[dict[str, Any]]:
    countries = [f"{a}{b}ia" for a in ("Al", "Bel", "Cor", "Dor", "Ek", "Fal") for b in ("dor", "min", "rov", "sav")]
    cities = [
        f"{a}{b}" for a in ("San", "Port", "New", "Old") for b in ("holm", "berg", "grad", "ville", "mouth", "chester")
    ]
    facts = [
        {"id": a, "prompt": f"The capital of {a} is", "answer": f" {b}", "source": "atlas" if i % 2 else "almanac"}
        for i, (a, b) in enumerate(zip(countries, cities, strict=True))
    ]
    facts[FALSE] |= {"answer": " Atlantis", "source": "forum"}
    return facts


def _untaught(facts: list[dict[str, Any]]) -> tuple[nn.Module, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = sorted({word for fact in facts for word in (fact["prompt"] + fact["answer"]).split()} | {"<unk>"})
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=len(words), bos_token_id=0, eos_token_id=0,
        embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # has second derivatives on a CPU
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<unk>")
    return GPT2LMHeadModel(config), tokenizer
