"""A language model that learns 600 sentences about countries by heart, in seconds: a small truth for attribution.

75 countries × 4 relations, each fact in two of four wordings (package countryinfo); 30 questions put a fact in a third
wording, and only the answer counts. A model trained on half of the sentences answers far worse, so which rows matter is
measured by retraining: the two of the same fact first of all.
"""

from __future__ import annotations

import json
from functools import cache

from small_lm import TASK, Row, SmallLM

from gradsketch.demo.packages import package_folder
from gradsketch.random import Stream

__all__ = [
    "EPOCHS",
    "FACTS",
    "TASK",
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
COUNTRIES, QUESTIONS, EPOCHS = 75, 30, 16


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


FACTS = SmallLM(facts, EPOCHS)
untrained, trained, trained_with_optimizer = FACTS.untrained, FACTS.trained, FACTS.trained_with_optimizer
question_losses, retrained = FACTS.question_losses, FACTS.retrained
