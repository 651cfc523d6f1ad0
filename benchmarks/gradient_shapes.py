"""What sketches cost for other shapes of work: long rows, many short ones, LoRA, a large embedding, experts.

    python benchmarks/gradient_shapes.py [--quick] [--draw]      # ten minutes on two cores

Per-example sketches against one plain forward and backward pass of the same batches, which take turns, with the floor
of both (forward and backward without a weight gradient or a sketch) and peak memory beyond the weights. A pass counts
weight gradients of the parameters that the sketch takes, and no others. Then three curves for GPT-2 of 6 layers: cost
against d, against tokens a row, and against the number of parameters n (by the model's width).

Writes results/gradient_shapes.json and docs/images/gradient_cost.png; --draw draws again what is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gradient_cost import floor
from gradient_workloads import Workload
from record import RESULTS, interleaved_seconds, peak_bytes, write
from torch import Tensor, nn

import gradsketch as gs

PICTURE = RESULTS.parents[1] / "docs/images/gradient_cost.png"
VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """A workload, how many rows make a batch, and the sizes of the sketch."""

    work: Workload
    batch: int
    sizes: tuple[int, ...] = (4096,)


def tokens(rows: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def gpt2(positions: int, width: int = 256, layers: int = 6) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_head": 8, "n_embd": width, "vocab_size": VOCABULARY, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


def long_rows(quick: bool) -> Shape:
    length = 256 if quick else 2048
    return Shape(Workload("long rows", gpt2(length), tokens(2, length)), 1, (4096, 32768))


def short_rows(quick: bool) -> Shape:
    rows = 32 if quick else 256
    return Shape(Workload("many short rows", gpt2(16), tokens(rows, 16)), rows // 4, (4096, 32768))


def lora(quick: bool) -> Shape:
    """Adapters of rank 8 on the attention of GPT-2; the other weights are frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model: Any = get_peft_model(gpt2(128), config)  # type: ignore[arg-type]
    return Shape(Workload("LoRA only", model.eval(), tokens(8 if quick else 32, 128)), 8)


class Classifier(nn.Module):
    """The mean of a row's embeddings, of 100,000 words, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100_000, 64)
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
        logits: Tensor = self.layers(self.words(input_ids).mean(1))
        return logits


def classifier(quick: bool) -> Shape:
    torch.manual_seed(0)
    rows = 128 if quick else 2048

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")

    ids = tokens(rows, 64, 100_000)
    work = Workload("a large embedding", Classifier().eval(), ids, gs.Function(losses), ids[:, 0] % 8)
    return Shape(work, rows // 4)


def experts(quick: bool) -> Shape:
    """A Mixtral of 4 layers, 8 experts in each, of which every token takes two."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=1 if quick else 4,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    return Shape(Workload("experts", MixtralForCausalLM(config).eval(), tokens(8 if quick else 32, 128)), 8)


SHAPES = (long_rows, short_rows, lora, classifier, experts)


def measured(shape: Shape, repeats: int, **about: Any) -> dict[str, Any]:
    """Return seconds of every job, shares of the plain pass, and peak memory of one batch."""
    work, batches = shape.work, shape.work.batches(shape.batch)
    chosen = gs.Parameters(work.model)
    jobs: dict[str, Callable[[], Any]] = {
        "plain": lambda: work.plain(batches),
        "floor": lambda: floor(work, batches),
    }
    for d in shape.sizes:
        sketcher = gs.GradientSketcher(work.model, work.task, gs.BlockSum(chosen, d))
        jobs[f"d={d}"] = lambda sketcher=sketcher: [sketcher(batch) for batch in batches]
    seconds = {name: s["median"] for name, s in interleaved_seconds(jobs, repeats=repeats).items()}
    result = {
        "name": work.name,
        "rows": len(work.ids),
        "tokens": work.ids.shape[1],
        "batch": shape.batch,
        "n": chosen.n,
        **about,
        "seconds": seconds,
        "throughput": {name: seconds["plain"] / value for name, value in seconds.items() if name != "plain"},
        "peak_bytes": {name: peak_bytes(job) for name, job in jobs.items()},
    }
    print(json.dumps(result), flush=True)
    return result


def curves(quick: bool, repeats: int) -> dict[str, list[dict[str, Any]]]:
    rows, layers = (8, 1) if quick else (32, 6)
    lengths = (32, 64) if quick else (32, 64, 128, 256, 512)
    widths = (64, 128) if quick else (64, 128, 256, 512)
    sizes = (512, 4096) if quick else (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

    def one(name: str, length: int, width: int, sizes: tuple[int, ...], rows: int = rows) -> dict[str, Any]:
        work = Workload(name, gpt2(length, width, layers), tokens(rows, length))
        return measured(Shape(work, 8, sizes), repeats)

    return {
        "d": [one("GPT-2", 128, 256, sizes)],
        "tokens": [one("GPT-2", length, 256, (4096,), max(8, rows * 128 // length)) for length in lengths],
        "n": [one("GPT-2", 128, width, (4096,)) for width in widths],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw seconds a row, of the sketch, a plain pass and the floor, against d, tokens and n."""
    import matplotlib.pyplot as plt

    marks = {"plain pass": ("plain", "o"), "sketches": ("d=4096", "s"), "floor": ("floor", "^")}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    (by_d,) = results["curves"]["d"]
    seconds = by_d["seconds"]
    sizes = sorted(int(name[2:]) for name in seconds if name.startswith("d="))
    axes[0].plot(sizes, [1e3 * seconds[f"d={d}"] / by_d["rows"] for d in sizes], "s-", color="black", label="sketches")
    for name, line in (("plain", "--"), ("floor", ":")):
        axes[0].axhline(1e3 * seconds[name] / by_d["rows"], linestyle=line, color="gray", label=name)
    for axis, key in ((axes[1], "tokens"), (axes[2], "n")):
        found = results["curves"][key]
        for label, (name, mark) in marks.items():
            values = [1e3 * row["seconds"][name] / row["rows"] for row in found]
            axis.plot([row[key] for row in found], values, f"{mark}-", label=label,
                      color="black" if name != "plain" else "gray")  # fmt: skip
    labels = ("d", "tokens a row", "parameters n")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    lengths = [row["tokens"] for row in results["curves"]["tokens"]]
    axes[1].set_xticks(lengths, [str(length) for length in lengths])
    axes[1].minorticks_off()
    axes[0].set(yscale="linear", ylim=(0, None), ylabel="milliseconds a row")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything, once, written to no file")
    parser.add_argument("--draw", action="store_true", help="draw what was measured")
    options = parser.parse_args()
    if not options.draw:
        repeats = 1 if options.quick else 5
        shapes = [measured(make(options.quick), repeats) for make in SHAPES]
        results = {"shapes": shapes, "curves": curves(options.quick, repeats)}
        if options.quick:
            return
        print(write("gradient_shapes", results))
    draw(json.loads((RESULTS / "gradient_shapes.json").read_text())["results"], PICTURE)


if __name__ == "__main__":
    main()
