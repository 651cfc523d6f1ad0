"""TRL's SFTTrainer on toy chats, with an index of the run: who taught the model to say this?

    pip install 'gradsketch[hf]' trl
    python examples/trl_sft.py [FOLDER]

The model is a GPT-2 of random weights, and its words are those of the chats, so nothing is fetched. With your own model
and data, only ``tiny_model`` and ``CHATS`` change.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import gradsketch as gs

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
    "{% endgeneration %}{% else %}{{ m.content }} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
ANIMALS = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "frog": "croaks", "owl": "sings"}


def chat(animal: str, sound: str) -> dict[str, Any]:
    """Return a question about an animal, and what the assistant shall say."""
    return {
        "messages": [
            {"role": "user", "content": f"what does the {animal} do"},
            {"role": "assistant", "content": f"the {animal} {sound}"},
        ]
    }


CHATS = [chat(animal, sound) for animal, sound in ANIMALS.items()]


def tiny_model() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """Return a small GPT-2 without training, and a tokenizer of the chats' words."""
    said = " ".join(turn["content"] for row in CHATS for turn in row["messages"])
    words = ["<pad>", "<end>", "<unk>", ":", "user", "assistant", *sorted(set(said.split()))]
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_layer=2, n_head=2, n_embd=32, n_positions=32, bos_token_id=1, eos_token_id=1,
        embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer


def main(folder: Path) -> gs.Hits:
    """Train, and ask which chat taught the model what the owl does."""
    model, tokenizer = tiny_model()
    # The loss of the index is that of the training: what the assistant says, and the token that ends it.
    callback = gs.SketchCallback(folder / "index", gs.CausalLM(tokenizer), CHATS, keep=3, d=256, progress=False)
    arguments = SFTConfig(
        str(folder / "trained"),
        assistant_only_loss=True,
        max_steps=60,
        learning_rate=5e-3,
        per_device_train_batch_size=6,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list(CHATS)
    SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]).train()
    return callback.index.query(model, [CHATS[-1]], k=3)


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sft")))
