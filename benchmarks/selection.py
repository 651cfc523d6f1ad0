"""Does a chosen tenth train a better model than a random one, and are planted harmful rows found? By training on both.

    python benchmarks/selection.py            # a quarter of an hour on one core
    python benchmarks/selection.py --tiny     # a minute: everything once

Writes benchmarks/results/selection.json. Two parts:

* **keep**: the last two layers of MiniLM learn to tell spam from ham, from a tenth of 800 mails of SpamAssassin. 60
  mails are the target: newsletters that pass for spam (the group hard-ham) and spam. 200 more of the same kind are held
  out. The pool holds some such newsletters, or none, or a third of its labels are wrong. ``Index.select`` chooses by
  ridge, its default, from an index of a model that has seen a twentieth of the pool. Beside it a random tenth, BM25 of
  the words, and BM25 where a target of the other label counts against a row.
* **drop**: a small network learns 600 digits; wrong labels are planted at random, or all of one kind (most nines are
  called fours). As many rows as were planted are dropped, and the network is trained again.

Every gain is that over another choice on the same seed; its interval is Student's, 95 %, over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from record import write
from scipy.stats import t as student
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.demo.digits import digits_net, flipped_digits
from gradsketch.demo.mails import spam_assassin
from gradsketch.demo.training import train_model
from gradsketch.demo.weights import minilm
from gradsketch.random import Stream

Row = dict[str, Any]
SETTINGS = ("newsletters in the pool", "none in the pool", "a third of the labels wrong")
CHARACTERS, TOKENS, LOWER = 400, 32, 4
NINE, FOUR = 9, 4


@dataclass(frozen=True)
class Size:
    """How much is measured: seeds of each part, mails and numbers of a sketch, digits and their epochs."""

    seeds: int = 5
    drop_seeds: int = 10
    mails: int = 3000
    pool: int = 800
    targets: int = 60
    held_out: int = 200
    epochs: int = 4
    d: int = 4096
    digits: int = 600
    digit_epochs: int = 15
    digit_d: int = 1024


TINY = Size(2, 2, 60, 30, 6, 6, 1, 128, 120, 2, 64)


# -- keep -------------------------------------------------------------------------------------------------------------


class Upper(nn.Module):
    """The last layers of MiniLM and a fresh head, above hidden states that are computed once."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        model: Any = minilm(seed=seed)[0]
        self.layers = model.bert.encoder.layer[LOWER:]
        self.pooler, self.classifier = model.bert.pooler, model.classifier

    def forward(self, hidden: Float[Tensor, "b t w"], mask: Float[Tensor, "b t"]) -> Float[Tensor, "b 2"]:
        bias = (1 - mask[:, None, None, :]) * -1e4
        for layer in self.layers:
            hidden = layer(hidden, bias)
        logits: Tensor = self.classifier(self.pooler(hidden))
        return logits


def _collate(rows: Sequence[Row]) -> Row:
    batch: Row = {name: torch.stack([row[name] for row in rows]) for name in ("hidden", "mask")}
    return {**batch, "label": torch.tensor([row["label"] for row in rows])}


def _losses(model: nn.Module, batch: Row) -> Float[Tensor, " b"]:
    return nn.functional.cross_entropy(model(batch["hidden"], batch["mask"]), batch["label"], reduction="none")


MAILS = gs.Function(_losses, collate=_collate)


@torch.no_grad()
def read_mails(count: int) -> list[Row]:
    """Return mails with the hidden states of the lower layers: all of hard-ham where there is room, and others."""
    found = [{**mail, "text": mail["text"][:CHARACTERS]} for mail in spam_assassin() if mail["text"]]
    found = list({mail["text"]: mail for mail in found}.values())  # no held-out mail is in the pool under another name
    order = [found[i] for i in Stream(0, "mails").permutation(len(found)).tolist()]
    hard = [mail for mail in order if mail["group"] == "hard-ham-1"][: count // 3]
    rows = hard + [mail for mail in order if mail["group"] != "hard-ham-1"][: count - len(hard)]
    model, tokenizer = minilm()
    for start in range(0, count, 50):
        part = rows[start : start + 50]
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        encoded = tokenizer([mail["text"] for mail in part], **options)
        hidden = model(**encoded, output_hidden_states=True).hidden_states[LOWER]
        for mail, states, mask in zip(part, hidden, encoded["attention_mask"].float(), strict=True):
            mail.update(hidden=states, mask=mask)
    return rows


def split(mails: list[Row], setting: str, seed: int, size: Size) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the pool, the targets and what is held out; half of the last two are newsletters, half spam."""
    order = [mails[i] for i in Stream(seed, "split").permutation(len(mails)).tolist()]
    kinds = [[m for m in order if m["group"] == "hard-ham-1"], [m for m in order if m["label"] == 1]]
    ends = (size.targets // 2, (size.targets + size.held_out) // 2)
    targets, held = ([mail for kind in kinds for mail in kind[a:b]] for a, b in ((0, ends[0]), ends))
    used = {id(mail) for mail in targets + held}
    left = [m for m in order if id(m) not in used and (setting != SETTINGS[1] or m["group"] != "hard-ham-1")]
    stream = Stream(seed, "pool")
    pool = [left[i] for i in stream.permutation(len(left))[: size.pool].tolist()]
    if setting == SETTINGS[2]:
        for i in stream.child("wrong").permutation(len(pool))[: len(pool) // 3].tolist():
            pool[i] = {**pool[i], "label": 1 - pool[i]["label"]}
    return pool, targets, held


def learned(rows: list[Row], seed: int, size: Size) -> nn.Module:
    model = Upper(seed).eval()
    train_model(model, MAILS, rows, rate=2e-4, epochs=size.epochs, batch=15, seed=seed)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, rows: list[Row]) -> float:
    right = [model(batch["hidden"], batch["mask"]).argmax(1) == batch["label"] for batch in map(_collate, _parts(rows))]
    return float(torch.cat(right).double().mean())


def _parts(rows: list[Row]) -> list[list[Row]]:
    return [rows[start : start + 50] for start in range(0, len(rows), 50)]


def bm25(rows: list[Row], targets: list[Row]) -> Float[Tensor, "rows targets"]:
    """Return how well each row's words match each target's: Okapi's BM25 with k = 1.2 and b = 0.75."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer()
    counts = torch.from_numpy(counter.fit_transform([row["text"] for row in rows]).toarray()).double()
    asked = torch.from_numpy(counter.transform([row["text"] for row in targets]).toarray() > 0).double()
    holding, lengths = (counts > 0).sum(0), counts.sum(1, keepdim=True)
    rarity = torch.log((len(rows) - holding + 0.5) / (holding + 0.5) + 1)
    return rarity * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * lengths / lengths.mean())) @ asked.T


def choices(pool: list[Row], targets: list[Row], seed: int, size: Size) -> dict[str, list[int]]:
    """Return a tenth of the pool by every choice."""
    count = len(pool) // 10
    shuffled = Stream(seed, "random").permutation(len(pool)).tolist()
    words = bm25(pool, targets)
    agree = torch.tensor([[1.0 if row["label"] == target["label"] else -1.0 for target in targets] for row in pool])
    seen = Stream(seed, "seen").permutation(len(pool))[: len(pool) // 20].tolist()
    model = learned([pool[i] for i in seen], seed, size)
    with tempfile.TemporaryDirectory() as folder:
        index = gs.build_index(folder, model, MAILS, pool, d=size.d, progress=False)
        chosen = index.select(model, targets, rows=count)
    return {
        "ridge": list(chosen.rows),
        "random": shuffled[:count],
        "BM25": words.mean(1).topk(count).indices.tolist(),
        "BM25 by label": (words * agree).mean(1).topk(count).indices.tolist(),
    }


def keep(size: Size) -> dict[str, Any]:
    mails, found = read_mails(size.mails), {}
    for setting in SETTINGS:
        accuracies: dict[str, list[float]] = {}
        for seed in range(size.seeds):
            pool, targets, held = split(mails, setting, seed, size)
            for name, rows in choices(pool, targets, seed, size).items():
                accuracies.setdefault(name, []).append(accuracy(learned([pool[i] for i in rows], seed, size), held))
            print(setting, seed, {name: round(values[-1], 3) for name, values in accuracies.items()}, flush=True)
        found[setting] = compared(accuracies, "ridge")
    return found


# -- drop -------------------------------------------------------------------------------------------------------------


def planted(kind: str, seed: int, size: Size) -> tuple[list[Row], set[int], list[Row], list[Row]]:
    """Return training digits, the places of wrong labels, clean targets, and what is held out."""
    rows, clean = flipped_digits(0.2 if kind == "at random" else 0.0, seed=seed)
    rows = rows[: size.digits]
    wrong = {place for place, row in enumerate(rows) if row["flipped"]}
    if kind != "at random":
        nines = [place for place, row in enumerate(rows) if row["label"] == NINE]
        wrong = set(nines[: round(0.6 * len(nines))])
        rows = [{**row, "label": FOUR} if place in wrong else row for place, row in enumerate(rows)]
    return rows, wrong, clean[:100], clean[100:]


def drop(size: Size) -> dict[str, Any]:
    found = {}
    for kind in ("at random", "nines called fours"):
        accuracies: dict[str, list[float]] = {}
        shares: dict[str, list[float]] = {}
        for seed in range(size.drop_seeds):
            rows, wrong, targets, held = planted(kind, seed, size)
            accuracies.setdefault("nothing", []).append(_digits_right(trained(rows, seed, size), held))
            for name, gone in suspects(rows, wrong, targets, seed, size).items():
                left = [row for place, row in enumerate(rows) if place not in gone]
                accuracies.setdefault(name, []).append(_digits_right(trained(left, seed, size), held))
                shares.setdefault(name, []).append(len(gone & wrong) / len(wrong))
        means = {name: statistics.mean(values) for name, values in shares.items()}
        found[kind] = {"share_found": means, **compared(accuracies, "influence")}
        print(kind, means, {name: round(statistics.mean(v), 3) for name, v in accuracies.items()}, flush=True)
    return found


def trained(rows: list[Row], seed: int, size: Size) -> nn.Module:
    model = digits_net(seed)
    train_model(model, gs.Classification(), rows, rate=3e-3, epochs=size.digit_epochs, batch=50, seed=seed)
    return model.eval()


def suspects(rows: list[Row], wrong: set[int], targets: list[Row], seed: int, size: Size) -> dict[str, set[int]]:
    """Return as many rows as were planted by every way of finding them."""
    model, task, count = trained(rows, seed, size), gs.Classification(), len(wrong)
    with torch.no_grad():
        losses = task.losses(model, task.collate(rows))
    with tempfile.TemporaryDirectory() as folder:
        index = gs.build_index(folder, model, task, rows, d=size.digit_d, progress=False)
        by_score = {
            score: set(index.select(model, targets, rows=count, harmful=True, score=score).rows)
            for score in ("influence", "ridge")
        }
    random = Stream(seed, "random").permutation(len(rows))[:count].tolist()
    return {**by_score, "loss": set(losses.topk(count).indices.tolist()), "random": set(random), "the planted": wrong}


@torch.no_grad()
def _digits_right(model: nn.Module, rows: list[Row]) -> float:
    said = model(torch.stack([row["pixels"] for row in rows])).argmax(1)
    return float((said == torch.tensor([row["true_label"] for row in rows])).double().mean())


# -- both -------------------------------------------------------------------------------------------------------------


def compared(accuracies: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Return each choice's mean accuracy, and what ours gains over it, with intervals over seeds."""
    own = accuracies[ours]
    gains = {
        name: _interval([a - b for a, b in zip(own, values, strict=True)])
        for name, values in accuracies.items()
        if name != ours
    }
    return {"accuracy": {name: _interval(values) for name, values in accuracies.items()}, "gain_over": gains}


def interval(values: list[float]) -> list[float]:
    """Return Student's 95 % interval of a mean."""
    mean = statistics.mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [mean - half, mean + half]


def _interval(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "interval": interval(values), "seeds": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a minute instead of a quarter of an hour, and no file")
    size = TINY if parser.parse_args().tiny else Size()
    torch.set_num_threads(1)
    results = {"drop": drop(size), "keep": keep(size)}
    print(results if size is TINY else write("selection", results, pool=size.pool, targets=size.targets))


if __name__ == "__main__":
    main()
