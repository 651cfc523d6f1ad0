"""A language model that learns 600 sentences about countries by heart, in seconds: a small truth for attribution.

75 countries × 4 relations, each fact in two of four wordings (package countryinfo); 30 questions put a fact in a third
wording, and only the answer counts. A model trained on half of the sentences answers far worse, so which rows matter is
measured by retraining: the two of the same fact first of all.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.demo.packages import package_folder
from gradsketch.random import Stream

__all__ = [
    "EPOCHS",
    "TASK",
    "Trained",
    "facts",
    "question_losses",
    "retrained",
    "trained",
    "trained_with_optimizer",
    "untrained",
]

WORDINGS = {
    "capital": (
        "the capital of {} is",
        "people in {} call their capital city",
        "if you fly to the government of {} you land in",
        "the president of {} lives in",
    ),
    "demonym": (
        "someone born in {} is called",
        "the people of {} are known as",
        "a citizen of {} is",
        "the passport of {} makes its holder",
    ),
    "currency": (
        "the money of {} is",
        "shops in {} take",
        "a bank in {} counts in",
        "prices in {} are given in",
    ),
    "subregion": (
        "the land of {} lies in",
        "on the map look for {} in",
        "{} belongs to the region of",
        "travellers find {} in",
    ),
}
COUNTRIES, QUESTIONS, EPOCHS, BATCH, RATE = 75, 30, 16, 16, 2e-3
WIDTH, LAYERS, HEADS = 144, 4, 4
TASK = gs.CausalLM()
Row = dict[str, Any]
Trained = tuple[nn.Module, list[dict[str, Tensor]]]


@cache
def facts() -> tuple[list[Row], list[Row], int]:
    """Return training rows and questions, tokenised by words, and the size of the vocabulary."""
    taught, asked = _sentences()
    words = sorted({word for row in taught + asked for word in f"{row['prompt']} {row['answer']}".split()})
    places = {word: i + 1 for i, word in enumerate(words)}

    def encoded(row: Row, only_answer: bool) -> Row:
        prompt, answer = ([places[word] for word in row[part].split()] for part in ("prompt", "answer"))
        labels = [-100] * len(prompt) + answer if only_answer else prompt + answer
        return {**row, "input_ids": prompt + answer, "labels": labels}

    return [encoded(row, False) for row in taught], [encoded(row, True) for row in asked], len(words) + 1


def _sentences() -> tuple[list[Row], list[Row]]:
    countries = [known for known in map(_known, _records()) if known is not None]
    taught, asked = [], []
    for number in Stream(0, "countries").permutation(len(countries))[:COUNTRIES].tolist():
        country, answers = countries[number]
        for relation, answer in answers.items():
            order = Stream(0, "wordings", country, relation).permutation(4).tolist()
            rows = [
                {"prompt": WORDINGS[relation][i].format(country), "answer": answer, "fact": f"{country}, {relation}"}
                for i in order
            ]
            taught += rows[:2]
            asked.append(rows[2])
    chosen = Stream(0, "questions").permutation(len(asked))[:QUESTIONS].tolist()
    return [taught[i] for i in Stream(0, "rows").permutation(len(taught)).tolist()], [asked[i] for i in chosen]


def _records() -> list[Row]:
    files = sorted((package_folder("countryinfo") / "data").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _known(record: Row) -> tuple[str, dict[str, str]] | None:
    """Return a country and its facts, in few words each."""
    names = {"capital": "capital", "demonym": "demonym", "currency": "currencies", "subregion": "subregion"}
    found = {relation: record.get(key) for relation, key in names.items()}
    if not record.get("name") or not all(found.values()):
        return None
    found["currency"] = found["currency"][0]
    short = len(record["name"].split()) <= 2 and len(found["capital"].split()) <= 2
    return (record["name"], found) if short and len(found["demonym"].split()) == 1 else None


def untrained(seed: int = 0) -> nn.Module:
    """A GPT-2 of a million parameters, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rows, questions, words = facts()
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, n_positions=max(len(r["input_ids"]) for r in rows + questions),
        vocab_size=words, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def trained(rows: list[int], seed: int = 0) -> Trained:
    """Return a model trained on these rows, and its weights at the end of each epoch."""
    model, states, _ = trained_with_optimizer(rows, seed)
    return model, states


def trained_with_optimizer(
    rows: list[int], seed: int = 0
) -> tuple[nn.Module, list[dict[str, Tensor]], torch.optim.Optimizer]:
    """Return what ``trained`` does, and the optimiser after its last step."""
    data, model = facts()[0], untrained(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    steps, step, states = EPOCHS * -(-len(rows) // BATCH), 0, []
    for epoch in range(EPOCHS):
        order = Stream(seed, "order", str(epoch)).permutation(len(rows)).tolist()
        for start in range(0, len(rows), BATCH):
            warm, cold = min(1.0, (step + 1) / (0.05 * steps)), 1 - 0.9 * step / steps
            for group in optimizer.param_groups:
                group["lr"] = RATE * warm * cold
            batch = TASK.collate([data[rows[i]] for i in order[start : start + BATCH]])
            TASK.losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return model.eval(), states, optimizer


@torch.no_grad()
def question_losses(model: nn.Module) -> Tensor:
    """Return the loss of each question."""
    return TASK.losses(model, TASK.collate(facts()[1]))


def retrained(halves: int, path: Path | None) -> gs.Retrainings:
    """Return the questions' losses after training on random halves; finished halves are kept in a file."""
    rows = len(facts()[0])
    return gs.retrain_on_subsets(lambda chosen: trained(chosen)[0], question_losses, rows, subsets=halves, path=path)
