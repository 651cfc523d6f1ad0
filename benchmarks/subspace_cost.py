"""A training step in a random subspace against a step of full fine-tuning, in time and memory.

Claim: at n = 22.7 M and 134.5 M and d up to 2^20 a step costs at most 1.25 times a full one (AdamW on all n), and holds
no vectors of n numbers beyond one buffer and the gradient. Architectures of MiniLM and SmolLM2-135M, random weights.

Run: python benchmarks/subspace_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

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


def step_of(module: nn.Module, trained: list[Tensor], batch: dict[str, Tensor]) -> Step:
    optimiser = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        optimiser.zero_grad()
        module(**batch).loss.backward()
        optimiser.step()

    return step


def measure(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], dims: list[int], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = make()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = model.to(device), {name: value.to(device) for name, value in batch.items()}
    n = gs.Parameters(model).n
    full = copy.deepcopy(model)
    full_step = step_of(full, list(full.parameters()), batch)
    full_step()
    result: dict[str, Any] = {"n": n, "tokens": batch["input_ids"].numel(), "device": device, "d": {}}
    result["full_peak_vectors"] = _vectors(peak_bytes(full_step), n)
    for d in dims:
        parameters = gs.Parameters(model)
        with gs.Subspace(model, parameters, gs.AFFD(n, d)) as subspace:
            step = step_of(subspace, [subspace.w], batch)
            step()
            peak = _vectors(peak_bytes(step), n)
            seconds = interleaved_seconds({"full": full_step, "subspace": step}, repeats)
        ratio = seconds["subspace"]["median"] / seconds["full"]["median"]
        result["d"][d] = {"seconds": seconds, "ratio": ratio, "peak_vectors": peak}
        print(
            f"n={n:,} d={d:,}: ratio {ratio:.3f} of {seconds['full']['median']:.2f} s; peak {peak} vectors", flush=True
        )
    return result


def _vectors(peak: int | None, n: int) -> float | None:
    """Peak memory of a step, activations included, in vectors of n float32 numbers."""
    return None if peak is None else round(peak / (4 * n), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller model and one d only")
    quick = parser.parse_args().quick
    makers = (minilm,) if quick else (minilm, smollm2)
    dims = [1 << 16] if quick else [1 << 10, 1 << 16, 1 << 20]
    results = {make.__name__: measure(make, dims, repeats=3 if quick else 7) for make in makers}
    print(write("subspace_cost" + "_quick" * quick, results))


if __name__ == "__main__":
    main()
