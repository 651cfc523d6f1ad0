"""How many random directions fine-tuning needs: a classification task against a generation task, real weights.

Classification: MiniLM (22.7 M parameters and a fresh head) tells spam from ham. Generation: SmolLM2-135M, the last 8
layers (28.3 M), learns to write "Cuba | Cuban | Latin America and the Caribbean | Havana". Each is fine-tuned in full
first; the target is 90 % of what that gains. For the accuracy the weaker target of Schioppa (arXiv 2402.03994), 90 % of
the metric itself, is read off the same search. The claim, in kind: generation needs a far larger share of its
parameters.

Run: python benchmarks/intrinsic_dimension.py [--quick] [--only spam|countries] [--seeds 3] [--curve] [--state FOLDER]
With --state an interrupted run, or one with fewer seeds, is gone on with.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import write

import gradsketch as gs
from gradsketch.demo.mails import spam_assassin
from gradsketch.demo.packages import package_folder
from gradsketch.demo.weights import minilm, smollm2
from gradsketch.dimension.results import IntrinsicDimension
from gradsketch.random import Stream


@dataclass
class Setting:
    """A model with a task, and what to spend on it."""

    model: torch.nn.Module
    task: gs.Task
    train: list[Any]
    evaluate: Any
    parameters: gs.Parameters
    steps: int
    batch_size: int
    full_lr: float
    lr: float
    d_min: int
    check_every: int
    dims: list[int]


def spam(quick: bool) -> Setting:
    """256 mails of 32 tokens for training and 400 for the metric, drawn evenly from both classes as they come."""
    model, tokenizer = minilm(seed=0)
    mails = spam_assassin()
    order = Stream(0, "spam").permutation(len(mails)).tolist()
    by_class = [[mails[i] for i in order if mails[i]["label"] == label and mails[i]["text"]] for label in (0, 1)]
    train = [mail for pair in zip(*(c[:128] for c in by_class), strict=True) for mail in pair]
    size = 100 if quick else 200
    test = [mail for pair in zip(*(c[128 : 128 + size] for c in by_class), strict=True) for mail in pair]
    task = gs.Classification(tokenizer, max_length=32)
    return Setting(
        model,
        task,
        train,
        gs.Accuracy(task, test, batch_size=100),
        gs.Parameters(model),
        steps=64,
        batch_size=16,
        full_lr=2e-4,
        lr=2e-3,
        d_min=16,
        check_every=32,
        dims=[128, 1024] if quick else [128, 512, 2048, 8192],
    )


def countries(quick: bool) -> Setting:
    """96 lines for training and 40 for the metric, the mean loss of a line."""
    model, tokenizer = smollm2()
    lines = [line for line in map(_line, sorted((package_folder("countryinfo") / "data").glob("*.json"))) if line]
    order = Stream(0, "countries").permutation(len(lines)).tolist()
    examples = [{"text": lines[i]} for i in order]
    task = gs.CausalLM(tokenizer, max_length=32)
    last = [f"*.layers.{i}.*" for i in range(22, 30)]
    return Setting(
        model,
        task,
        examples[:96],
        gs.Loss(task, examples[96 : 96 + (20 if quick else 40)], batch_size=20),
        gs.Parameters(model, last),
        steps=18,
        batch_size=16,
        full_lr=2e-4,
        lr=2e-3,
        d_min=64,
        check_every=9,
        dims=[256, 4096] if quick else [256, 1024, 4096, 16384],
    )


def _line(path: Any) -> str:
    facts = json.loads(path.read_text())
    parts = [facts.get(key) for key in ("name", "demonym", "subregion", "capital")]
    return " | ".join(parts) if all(isinstance(part, str) and part for part in parts) else ""


def measure(name: str, setting: Setting, seeds: range, state: Path | None, with_curve: bool) -> dict[str, Any]:
    """Fine-tune in full and search; with_curve also trains from scratch in several dimensions, with the first seed."""
    common = (setting.model, setting.task, setting.train, setting.evaluate)
    shared: dict[str, Any] = {"parameters": setting.parameters, "batch_size": setting.batch_size}
    kept = {part: None if state is None else state / name / part for part in ("full.json", "search", "curve.json")}
    full = gs.fine_tune(*common, steps=setting.steps, lr=setting.full_lr, resume=kept["full.json"], **shared)
    start = float(setting.evaluate(setting.model))
    targets = {"gain": start + 0.9 * (full.value - start)}
    if not getattr(setting.evaluate, "lower_is_better", False):
        targets["metric"] = 0.9 * full.value
    print(f"{name}: start {start:.4g}, full {full.value:.4g} after {full.steps} steps, targets {targets}", flush=True)
    shared |= {"lr": setting.lr, "seeds": seeds, "full": full.value, "progress": False}
    search = gs.intrinsic_dimension(
        *common,
        target=targets["gain"],
        d_min=setting.d_min,
        d_max=1 << 18,
        check_every=setting.check_every,
        resume=kept["search"],
        **shared,
    )
    print(search, [s.d for s in search.searches], flush=True)
    result: dict[str, Any] = {
        "n": setting.parameters.n,
        "start": start,
        "full": asdict(full),
        "found": {kind: {"target": t, "d": reached_at(search, t)} for kind, t in targets.items()},
        "search": json.loads(search.to_json()),
    }
    if with_curve:
        shared["seeds"] = seeds[:1]
        curve = gs.dimension_curve(*common, setting.dims, steps=setting.steps, resume=kept["curve.json"], **shared)
        print(curve, flush=True)
        result["curve"] = json.loads(curve.to_json())
        result["curve_d"] = {kind: curve.d(target) for kind, target in targets.items()}
    return result


def reached_at(search: IntrinsicDimension, target: float) -> list[int | None]:
    """Return for every seed the dimension in which its search first reached a target."""
    sign = -1 if search.lower_is_better else 1
    return [next((c.d for c in s.checks if sign * c.value >= sign * target), None) for s in search.searches]


def share_ratio(results: dict[str, Any]) -> float | None:
    """Return how many times the share of its parameters generation needs, medians over seeds; None if not reached."""
    d = {name: results[name]["search"]["d"] for name in ("spam", "countries")}
    if not all(d.values()):
        return None
    return float(d["countries"] / results["countries"]["n"] / (d["spam"] / results["spam"]["n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer dimensions and test examples; one seed")
    parser.add_argument("--only", choices=["spam", "countries"])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--curve", action="store_true", help="also train from scratch in several dimensions")
    parser.add_argument("--state", type=Path, help="folder for what a later run goes on with")
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    results: dict[str, Any] = {"quick": options.quick}
    for make in (spam, countries):
        if options.only in (None, make.__name__):
            results[make.__name__] = measure(make.__name__, make(options.quick), seeds, options.state, options.curve)
    if options.only is None:
        results["share_ratio"] = share_ratio(results)
        print(f"generation needs so many times the share of its parameters: {results['share_ratio']}")
    name = "intrinsic_dimension" + ("" if options.only is None else f"_{options.only}")
    print(write(name + "_quick" * options.quick, results))


if __name__ == "__main__":
    main()
