"""A training step in a random subspace against a step of full fine-tuning, in time and memory.

Claim: at n = 22.7 M and 134.5 M and d up to 2^20 a step costs at most 1.25 times a full one (AdamW on all n), and holds
no vectors of n numbers beyond one buffer and the gradient. Architectures of MiniLM and SmolLM2-135M, random weights.
LoRA (r = 8) and VeRA (r = 256) of peft, on the query and value projections, stand beside it: they skip the gradient of
the weights, which a subspace of all parameters needs.

Run: python benchmarks/subspace_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from record import interleaved_seconds, peak_bytes, write
from torch import Tensor, nn

import gradsketch as gs

Step = Callable[[], None]


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return transformers.BertForSequenceClassification(config), _batch(config.vocab_size, 32, 64, classes=2)


def smollm2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config), _batch(config.vocab_size, 8, 64)


def _batch(vocabulary: int, examples: int, tokens: int, classes: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (examples, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids if classes is None else ids[:, 0] % classes}


def step_of(module: nn.Module, batch: dict[str, Tensor]) -> Step:
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        module(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def trained_in(model: nn.Module, dims: list[int]) -> dict[str, nn.Module]:
    """Return the model made trainable in every way that is compared, each on a copy of its own."""
    targets = ["query", "value"] if hasattr(model, "bert") else ["q_proj", "v_proj"]
    modules = {"full": copy.deepcopy(model)}
    for d in dims:
        copied = copy.deepcopy(model)
        parameters = gs.Parameters(copied)
        modules[f"d={d}"] = gs.Subspace(copied, parameters, gs.AFFD(parameters.n, d))
    lora, vera = peft.LoraConfig(r=8, target_modules=targets), peft.VeraConfig(r=256, target_modules=targets)
    return modules | {
        "LoRA r=8": peft.get_peft_model(copy.deepcopy(model), lora),
        "VeRA r=256": peft.get_peft_model(copy.deepcopy(model), vera),
    }


def measure(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], dims: list[int], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = make()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = model.to(device), {name: value.to(device) for name, value in batch.items()}
    n = gs.Parameters(model).n
    modules = trained_in(model, dims)
    steps = {name: step_of(module, batch) for name, module in modules.items()}
    for step in steps.values():  # makes the optimiser's state, and the signs that sketches keep
        step()
    peaks = {name: _vectors(peak_bytes(step), n) for name, step in steps.items()}
    seconds = interleaved_seconds(steps, repeats)
    rows: dict[str, Any] = {}
    for name, module in modules.items():
        rows[name] = {
            "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "ratio": seconds[name]["median"] / seconds["full"]["median"],
            "seconds": seconds[name],
            "peak_vectors": peaks[name],
        }
        print(f"n={n:,} {name}: {rows[name]}", flush=True)
    return {"n": n, "tokens": batch["input_ids"].numel(), "device": device, "rows": rows}


def _vectors(peak: int | None, n: int) -> float | None:
    """Return peak memory of a step, in vectors of n float32 numbers, beyond what is held between steps.

    Held are three vectors by full fine-tuning (weights, two of Adam; the gradient is counted here), three by a subspace
    (weights, theta0 + lift, the gradient's memory), one by adapters. Counted are the activations too.
    """
    return None if peak is None else round(peak / (4 * n), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller model and one d only")
    quick = parser.parse_args().quick
    makers = (minilm,) if quick else (minilm, smollm2)
    dims = [1 << 16] if quick else [1 << 10, 1 << 16, 1 << 20]
    results = {make.__name__: measure(make, dims, repeats=3) for make in makers}
    print(write("subspace_cost" + "_quick" * quick, results))


if __name__ == "__main__":
    main()
