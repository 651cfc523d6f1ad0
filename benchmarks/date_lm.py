"""A small stand-in for DATE-LM's three tasks: facts, filtering and selection, scored through examples/date_lm.py.

    python benchmarks/date_lm.py --kept FOLDER        # half an hour on two cores

The metrics are those of the benchmark (Jiao et al., NeurIPS 2025); the models and the data are small ones.

* facts: 600 sentences that the model of facts_lm.py has learned, 30 questions in another wording. Recall@50 of the two
  rows that state the fact, and the mean reciprocal rank of the better one.
* filtering: SmolLM2-135M as published, 180 mails of mailing lists and 20 of spam (SpamAssassin, 48 tokens each), 10
  other spam mails as references. Area under the precision-recall curve (AUPRC) of the spam.
* selection: a tenth of the 600 sentences, chosen for the 30 questions by the mean score at a model of one epoch, trains
  a fresh model; the questions' loss afterwards, and that of a random tenth, over seeds.

Beside sketches: BM25, and cosines of the model's own hidden states and of MiniLM's embeddings. Writes
benchmarks/results/date_lm.json.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import facts_lm
import lm_attribution
import selection
import torch
from record import RESULTS, write
from sklearn.metrics import auc, precision_recall_curve
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.demo.mails import spam_assassin
from gradsketch.demo.weights import smollm2
from gradsketch.random import Stream

ADAPTER = runpy.run_path(str(RESULTS.parents[1] / "examples/date_lm.py"))
TOKENS, HAM, SPAM, REFERENCES, SEEDS = 48, 180, 20, 10, 3
SKETCHES = {"sketches in K-FAC's metric": "kfac", "plain sketches": None}
Row = dict[str, Any]
Methods = dict[str, Tensor]


def methods(model: nn.Module, train: Sequence[Row], reference: Sequence[Row], kept: Path) -> Methods:
    """Return the scores of every method, [references, rows]; rows are tokenised, and have their text."""
    task, found = gs.CausalLM(), {}
    for name, metric in SKETCHES.items():
        found[name] = lm_attribution.once(
            kept / f"{metric}.pt",
            lambda m=metric: ADAPTER["scored"](model, task, train, reference, metric=m),
        )
    found["BM25"] = selection.bm25(list(train), list(reference)).T
    found["hidden states"] = hidden(model, reference) @ hidden(model, train).T
    found["embeddings of MiniLM"] = lm_attribution.cosines([r["text"] for r in reference], [r["text"] for r in train])
    return found


@torch.no_grad()
def hidden(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Return the last token's last hidden state, of unit length."""
    states = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1])
    return nn.functional.normalize(torch.stack(states))


def sentences() -> tuple[list[Row], list[Row]]:
    """Return the rows and the questions of facts_lm.py, with their texts."""
    train, reference = ([{**row, "text": lm_attribution.text_of(row)} for row in part] for part in facts_lm.facts()[:2])
    return train, reference


def facts(kept: Path) -> dict[str, Any]:
    train, reference = sentences()
    model, _ = facts_lm.trained(list(range(len(train))))
    wanted = torch.tensor([[row["fact"] == question["fact"] for row in train] for question in reference])
    results = {}
    for name, scores in methods(model, train, reference, kept).items():
        ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
        recall = [float((ranks[i][own] < 50).double().mean()) for i, own in enumerate(wanted)]
        best = [1 / (1 + int(ranks[i][own].min())) for i, own in enumerate(wanted)]
        results[name] = {"recall_at_50": statistics.fmean(recall), "mean_reciprocal_rank": statistics.fmean(best)}
    return {"rows": len(train), "references": len(reference), "methods": results}


def filtering(kept: Path) -> dict[str, Any]:
    model, tokenizer = smollm2()
    train, reference = mails(tokenizer)
    unsafe = [row["label"] for row in train]
    results = {}
    for name, scores in methods(model, train, reference, kept).items():
        precision, recall, _ = precision_recall_curve(unsafe, scores.mean(0).numpy())
        results[name] = {"auprc": float(auc(recall, precision))}
    return {"rows": len(train), "harmful": sum(unsafe), "references": len(reference), "methods": results}


def mails(tokenizer: Callable[..., Any]) -> tuple[list[Row], list[Row]]:
    """Return ham with some spam, in a random order, and other spam."""
    every = spam_assassin()
    found: dict[int, list[Row]] = {0: [], 1: []}
    for i in Stream(0, "filtering").permutation(len(every)).tolist():
        mail = every[i]
        ids = tokenizer(mail["text"][:600]).input_ids[:TOKENS]
        if len(ids) == TOKENS and (mail["label"] or mail["group"].startswith("easy-ham")):
            text = tokenizer.decode(ids)  # type: ignore[attr-defined]
            found[mail["label"]].append({"input_ids": ids, "labels": ids, "text": text, "label": mail["label"]})
        if len(found[0]) >= HAM and len(found[1]) >= SPAM + REFERENCES:
            break
    rows = found[0][:HAM] + found[1][:SPAM]
    return [rows[i] for i in Stream(0, "order").permutation(len(rows)).tolist()], found[1][SPAM:][:REFERENCES]


def chosen(kept: Path) -> dict[str, Any]:
    train, reference = sentences()
    count, scoring = len(train) // 10, facts_lm.untrained()
    scoring.load_state_dict(facts_lm.trained(list(range(len(train))))[1][0])
    choices = {name: [scores.mean(0).topk(count).indices.tolist()] * SEEDS
               for name, scores in methods(scoring.eval(), train, reference, kept).items()}  # fmt: skip
    choices["random"] = [Stream(s, "tenth").permutation(len(train))[:count].tolist() for s in range(SEEDS)]
    losses = {
        name: [float(facts_lm.question_losses(facts_lm.trained(rows, seed)[0]).mean()) for seed, rows in enumerate(of)]
        for name, of in choices.items()
    }
    return {"chosen": count, "of": len(train), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, required=True, help="folder in which finished scores are kept")
    options = parser.parse_args()
    results = {}
    for name, task in {"facts": facts, "selection": chosen, "filtering": filtering}.items():
        (options.kept / name).mkdir(parents=True, exist_ok=True)
        results[name] = task(options.kept / name)
        print(json.dumps({name: results[name]}), flush=True)
    print(write("date_lm", results))


if __name__ == "__main__":
    main()
