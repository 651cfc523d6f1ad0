"""A folder with a tiny model that knows a few words, and data to index with it."""

import json

import pytest

TEXTS = [f"the capital of {'abcdefghij'[i]} is {i}" for i in range(10)]


def save_model(path, kind="gpt2", key_value_heads=1):
    """Write a GPT-2 of one layer or a Llama of two, and its tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in TEXTS for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    sizes = {"vocab_size": len(words) + 1, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes |= {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
        config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=key_value_heads, **sizes)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
