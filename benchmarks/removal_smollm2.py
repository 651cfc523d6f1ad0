"""Do the rows that sketches find matter to a real model? SmolLM2-135M, fine-tuned on real mails with and without them.

    python benchmarks/removal_smollm2.py --kept FOLDER       # half an hour on two cores
    python benchmarks/removal_smollm2.py --tiny              # two minutes: everything once, written to no file

All weights learn 96 mails of mailing lists (SpamAssassin, 48 tokens each) for two epochs; the questions are mails that
are held out, of lists that are in the training data. For each question its ten best rows go, and the model is trained
again from the start: rows found by sketches in K-FAC's metric, by plain sketches, by BM25, and random ones. Each row
keeps its place in the order of training, so that nothing else changes. ``rise`` is how much the question's loss rises
beyond the mean of the random removals, with Student's 95 % interval over questions; ``gain`` is the rise beyond
BM25's, in pairs. Writes benchmarks/results/removal_smollm2.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import selection
import torch
from jaxtyping import Float
from record import write
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.demo.mails import spam_assassin
from gradsketch.demo.weights import smollm2
from gradsketch.evaluation.retraining import retrained_losses
from gradsketch.random import Stream

TOKENS, BATCH, RATE = 48, 8, 5e-5
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int = 96
    questions: int = 6
    removed: int = 10
    controls: int = 4
    epochs: int = 2
    d: int = 4096


TINY = Size(rows=16, questions=2, removed=4, controls=2, epochs=1, d=512)


def read(size: Size) -> tuple[list[Row], list[Row]]:
    """Return training rows and questions: mails of at least so many tokens, each subject's mails together."""
    _, tokenizer = smollm2()
    mails = [mail for mail in spam_assassin() if mail["group"].startswith("easy-ham")]
    chosen: list[Row] = []
    for i in Stream(0, "mails").permutation(len(mails)).tolist():
        ids = tokenizer(mails[i]["text"][:600]).input_ids[:TOKENS]
        if len(ids) == TOKENS:
            chosen.append({"input_ids": ids, "labels": ids, "text": tokenizer.decode(ids)})
        if len(chosen) == size.rows + size.questions:
            break
    return chosen[: size.rows], chosen[size.rows :]


class Trainer:
    """Trains from the same start on some of the rows, and keeps what the questions' losses were."""

    def __init__(self, size: Size, rows: list[Row], questions: list[Row], kept: Path | None) -> None:
        self.size, self.rows, self.questions, self.kept = size, rows, questions, kept
        self.model, self.task = smollm2()[0], gs.CausalLM()
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.known: dict[str, list[float]] = json.loads(kept.read_text()) if kept and kept.exists() else {}

    def trained(self, rows: list[int]) -> nn.Module:
        self.model.load_state_dict(self.start)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01)
        wanted = set(rows)
        for epoch in range(self.size.epochs):
            order = Stream(0, "order", str(epoch)).permutation(len(self.rows))
            for places in order.split(BATCH):
                part = [self.rows[i] for i in places.tolist() if i in wanted]
                if part:
                    self.task.losses(self.model, self.task.collate(part)).sum().div(BATCH).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return self.model

    @torch.no_grad()
    def asked(self, model: nn.Module) -> Float[Tensor, " q"]:
        return self.task.losses(model, self.task.collate(self.questions))

    def without(self, gone: list[int]) -> list[float]:
        """Return the questions' losses where some rows are not there."""
        key = ",".join(map(str, sorted(gone)))
        if key not in self.known:
            began, rest = time.perf_counter(), [i for i in range(len(self.rows)) if i not in set(gone)]
            self.known[key] = retrained_losses(self.trained, self.asked, rest, f"without {key}").tolist()
            print(f"without {key or 'none'}: {time.perf_counter() - began:.0f} s", flush=True)
            if self.kept:
                self.kept.write_text(json.dumps(self.known))
        return self.known[key]


def found(trainer: Trainer) -> dict[str, list[list[int]]]:
    """Return the best rows for each question, by every method."""
    size, rows, questions = trainer.size, trainer.rows, trainer.questions
    model = trainer.trained(list(range(len(rows))))
    states = [trainer.start, {name: value.clone() for name, value in model.state_dict().items()}]
    chosen: dict[str, list[list[int]]] = {}
    for name, metric in (("K-FAC", "kfac"), ("plain", None)):
        with tempfile.TemporaryDirectory() as folder:
            index = gs.build_index(
                folder, model, trainer.task, rows, d=size.d, checkpoints=states, precondition=metric, progress=False
            )
            hits = index.query(model, questions, k=size.removed, score="ridge", damping=1.0)
            chosen[name] = [[hit.row for hit in query] for query in hits]
    words = selection.bm25(rows, questions)
    chosen["BM25"] = words.topk(size.removed, dim=0).indices.T.tolist()
    return chosen


def measured(size: Size, kept: Path | None) -> dict[str, Any]:
    rows, questions = read(size)
    trainer = Trainer(size, rows, questions, kept / "losses.json" if kept else None)
    choices = kept / "chosen.json" if kept else None
    if choices and choices.exists():
        chosen = json.loads(choices.read_text())
    else:
        chosen = found(trainer)
        if choices:
            choices.write_text(json.dumps(chosen))
    before = trainer.without([])
    drawn = [Stream(0, "control", str(j)).permutation(len(rows))[: size.removed].tolist() for j in range(size.controls)]
    controls = [trainer.without(gone) for gone in drawn]
    random = [statistics.fmean(losses) for losses in zip(*controls, strict=True)]
    rises = {
        name: [trainer.without(gone)[q] - random[q] for q, gone in enumerate(groups)] for name, groups in chosen.items()
    }
    spread = [c[q] - random[q] for c in controls for q in range(len(questions))]
    with torch.no_grad():
        trainer.model.load_state_dict(trainer.start)
        untrained = trainer.asked(trainer.model).tolist()
    return {
        "rows": len(rows), "questions": len(questions), "removed": size.removed, "epochs": size.epochs,
        "tokens": TOKENS, "rate": RATE, "d": size.d,
        "loss_before_training": statistics.fmean(untrained), "loss": statistics.fmean(before),
        "loss_without_random_rows": statistics.fmean(random), "spread_of_random": statistics.stdev(spread),
        "methods": {
            name: {"rise": statistics.fmean(values), "interval": selection.interval(values), "rises": values,
                   "gain_over_bm25": selection.interval([a - b for a, b in zip(values, rises["BM25"], strict=True)])}
            for name, values in rises.items()
        },
        "shared_with_bm25": {
            name: statistics.fmean(len(set(a) & set(b)) for a, b in zip(groups, chosen["BM25"], strict=True))
            for name, groups in chosen.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="16 mails, two questions")
    parser.add_argument("--kept", type=Path, help="folder in which finished trainings are kept")
    options = parser.parse_args()
    if options.kept:
        options.kept.mkdir(parents=True, exist_ok=True)
    results = measured(TINY if options.tiny else Size(), options.kept)
    print(json.dumps(results, indent=1) if options.tiny else write("removal_smollm2", results))


if __name__ == "__main__":
    main()
