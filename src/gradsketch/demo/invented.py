"""A language model of a few seconds that has learned invented capitals, one of them false: to try things on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradsketch.as_found import seeded
from gradsketch.attribution.build import build_index
from gradsketch.attribution.index import Index
from gradsketch.demo.packages import AbsentError
from gradsketch.demo.training import train_model
from gradsketch.gradients.tasks import CausalLM

__all__ = ["Taught", "indexed_capitals", "invented_capitals"]

FALSE = 5  # the fact whose answer is made up
EPOCHS = 20  # before each checkpoint
D = 1024  # numbers a row of the index
_CHAT = (
    "{% for turn in messages %}{{ turn['role'] + ' : ' }}{% if turn['role'] == 'assistant' %}"
    "{% generation %}{{ turn['content'] }}{% endgeneration %}{% else %}{{ turn['content'] }}{% endif %}"
    "{{ ' ' }}{% endfor %}"
)


@dataclass(frozen=True)
class Taught:
    """A model, its task, what it was taught, and its weights after half of the training and after all of it."""

    model: nn.Module
    task: CausalLM
    facts: list[dict[str, Any]]
    checkpoints: dict[str, dict[str, Tensor]]


def invented_capitals(rows: Sequence[int] | None = None) -> Taught:
    """Return a GPT-2 of random weights that has learned 24 sentences; the one about Belminia says Atlantis.

    With ``rows`` it learns these sentences only. It takes a few seconds, and fetches nothing.

    Example:
        >>> from gradsketch.demo.invented import invented_capitals
        >>> invented_capitals().facts[5]["answer"]
        ' Atlantis'

    Raises:
        AbsentError: transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise AbsentError("no transformers", "a language model", "Type: pip install 'gradsketch[hf]'")
    facts = _facts()
    with seeded(0):
        model, tokenizer = _untaught(facts)
        task, checkpoints = CausalLM(tokenizer), {}
        learned = facts if rows is None else [facts[row] for row in rows]
        for name in ("early", "late"):
            train_model(model, task, learned, rate=3e-3, epochs=EPOCHS, batch=8)
            checkpoints[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return Taught(model.eval(), task, facts, checkpoints)


def indexed_capitals(path: str | Path) -> tuple[Taught, Index]:
    """Return :func:`invented_capitals` and an index of its facts in the folder ``path``, which is made or opened.

    Example:
        >>> from gradsketch.demo.invented import indexed_capitals
        >>> taught, index = indexed_capitals("runs/facts")
        >>> index.query(taught.model, taught.facts[5:6], k=1)[0][0].id
        'Belminia'

    Raises:
        AbsentError: transformers is not installed.
        FingerprintError: the folder holds an index of something else.
    """
    taught = invented_capitals()
    return taught, build_index(path, taught.model, taught.task, taught.facts, d=D, progress=False)


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

    words = sorted({word for fact in facts for word in (fact["prompt"] + fact["answer"]).split()})
    words = ["<unk>", *words, "user", "assistant", ":"]
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=len(words), bos_token_id=0, eos_token_id=0,
        embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # has second derivatives on a CPU
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<unk>")
    tokenizer.chat_template = _CHAT
    return GPT2LMHeadModel(config), tokenizer
