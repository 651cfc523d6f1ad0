"""Does the metric help on a language model, and how few bytes a row are enough? By retraining on random halves.

    python benchmarks/lm_attribution.py --kept FOLDER                # 60 halves of facts_lm.py: an hour on one core
    python benchmarks/lm_attribution.py --prose --kept FOLDER        # the same for prose_lm.py: another hour
    python benchmarks/lm_attribution.py --small                      # 30 halves, no ladder: a quarter of an hour
    python benchmarks/lm_attribution.py --small --retrained FILE     # keeps the halves there, and takes them up again

Every score is what ``Index.query`` says, for the model of facts_lm.py. What is finished is kept, and taken up again.

* lm_attribution.json, the ladder: the linear datamodeling score (LDS) of plain and K-FAC sketches by checkpoints, d and
  type of stored numbers, beside exact EK-FAC over all rows, a second look by EK-FAC at the rows that sketches found,
  BM25, MiniLM's embeddings, and an oracle that knows which rows state the same fact. The kind of score and its λ are
  chosen on one half of the retrained models and judged on the other, and the other way round. ``rank_of_fact`` is the
  mean reciprocal rank of the better of the two rows that state the question's fact. ``tail_patch`` is the rank
  correlation with what one more AdamW step on each row does to each question.
* lm_attribution_prose.json: the same ladder where nothing is learnt by heart. A question is a piece of text of its own,
  and in the place of its fact stands its topic.
* lm_attribution_small.json: the LDS of every score and λ, from indexes of the last weights, of one epoch and of four,
  with and without the metric, and the gain, whose interval is that of pairs. The builds are timed too.

Intervals are 95 %, by a bootstrap over halves and questions.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import facts_lm
import numpy as np
import selection
import torch
from jaxtyping import Float
from prose_lm import PROSE
from record import table, write
from scipy.stats import rankdata
from small_lm import TASK, SmallLM
from torch import Tensor

import gradsketch as gs
from gradsketch.attribution import metric
from gradsketch.attribution.metric import COORDINATES, FACTORS
from gradsketch.store.encoding import row_bytes

# Metric, and the bound on a side's coordinates: the index's own, or none.
VARIANTS = {
    "plain": (None, None),
    "kfac": ("kfac", COORDINATES),
    "kfac, all coordinates": ("kfac", 1 << 20),
    "kfac, 128 coordinates": ("kfac", 128),
}
SCORES = (("dot", None), *((name, damping) for name in ("influence", "ridge") for damping in (0.1, 1.0, "auto")))
WEIGHTS = {"last epoch": (15,), "epoch 8": (7,), "epochs 4, 8, 12, 16": (3, 7, 11, 15)}
DRAWS = 300
Scores = Float[Tensor, "q n"]
Weights = dict[str, tuple[int, ...]]


def scored(states: list[dict[str, Tensor]], variant: str, d: int, seed: int) -> tuple[dict[str, Scores], Any]:
    """Return every kind of score of every row, and what building the index took."""
    rows, questions, _ = facts_lm.facts()
    model = facts_lm.untrained()
    precondition, metric.COORDINATES = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        index = gs.build_index(
            folder,
            model,
            facts_lm.TASK,
            rows,
            d=d,
            checkpoints=states,
            precondition=precondition,
            seed=seed,
            progress=False,
        )
        cost: dict[str, Any] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        cost["factor_seconds"] = sum(gs.Factors.load(file).seconds for file in Path(folder).glob(f"{FACTORS}*"))
        found = {}
        for name, damping in SCORES:
            options = {} if damping is None else {"damping": damping}
            hits = index.query(model, questions, k=len(rows), score=name, **options)
            found[name if damping is None else f"{name}, λ={damping}"] = table(hits)
    return found, cost


class Bootstrap:
    """Draws of halves and questions, the same for all scores, so that differences are those of pairs."""

    def __init__(self, retrained: gs.Retrainings) -> None:
        self.kept, self.losses = retrained.kept.double().numpy(), -retrained.losses.numpy()
        generator, (m, q) = np.random.default_rng(0), self.losses.shape
        self.draws = [(generator.integers(0, m, m), generator.integers(0, q, q)) for _ in range(DRAWS)]

    def values(self, scores: Scores) -> Float[np.ndarray, " draws"]:
        predicted = self.kept @ scores.numpy().T
        return np.array([np.nanmean(_spearman(predicted[r][:, c], self.losses[r][:, c])) for r, c in self.draws])


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (rankdata(values, axis=0) for values in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0))


def interval(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, share)) for share in (0.025, 0.975)]


def about_the_task(lm: SmallLM, model: torch.nn.Module, retrained: gs.Retrainings) -> dict[str, Any]:
    rows, questions, _ = lm.data()
    return {
        "rows": len(rows),
        "questions": len(questions),
        "halves": len(retrained.kept),
        "parameters": sum(p.numel() for p in model.parameters()),
        "question_loss": float(lm.question_losses(model).mean()),
        "question_loss_of_halves": float(retrained.losses.mean()),
    }


def measured(retrained: gs.Retrainings, d: int, seeds: int) -> dict[str, Any]:
    model, states = facts_lm.trained(list(range(len(facts_lm.facts()[0]))))
    bootstrap, entries, costs = Bootstrap(retrained), [], []
    fact = [[float(row["fact"] == question["fact"]) for row in facts_lm.facts()[0]] for question in facts_lm.facts()[1]]
    oracle = torch.tensor(fact, dtype=torch.float64)
    for weights, epochs in WEIGHTS.items():
        for seed in range(seeds):
            plain: dict[str, np.ndarray] = {}
            for variant in VARIANTS:
                found, cost = scored([states[epoch] for epoch in epochs], variant, d, seed)
                costs.append({"weights": weights, "sketches": variant, "seed": seed, **cost})
                for name, scores in found.items():
                    draws = bootstrap.values(scores)
                    entry = {"weights": weights, "sketches": variant, "seed": seed, "score": name,
                             "lds": gs.linear_datamodeling_score(scores, retrained).value,
                             "interval": interval(draws)}  # fmt: skip
                    if variant == "plain":
                        plain[name] = draws
                    else:
                        entry["gain_interval"] = interval(draws - plain[name])
                    entries.append(entry)
                    print(json.dumps(entry), flush=True)
    return about_the_task(facts_lm.FACTS, model, retrained) | {
        "d": d,
        "oracle": {"lds": gs.linear_datamodeling_score(oracle, retrained).value, "is": "states the same fact"},
        "scores": entries,
        "builds": costs,
    }


# -- the ladder -------------------------------------------------------------------------------------------------------

EVERY_EPOCH: Weights = {
    "1, the last": (15,),
    "1, epoch 8": (7,),
    "2": (7, 15),
    "4": (3, 7, 11, 15),
    "8": tuple(range(1, 16, 2)),
}
OF_PROSE: Weights = {"1, the last": (7,), "2": (3, 7), "4": (1, 3, 5, 7)}
# Metric, numbers of a sketch, and the types they are stored in.
RUNGS: tuple[tuple[str | None, int, tuple[str, ...]], ...] = (
    (None, 4096, ("float16",)),
    ("kfac", 1024, ("float16", "int4")),
    ("kfac", 4096, ("float16", "int4", "sign")),
    ("kfac", 16384, ("int4", "sign")),
)
RATES = (0.01, 0.1, 1.0, 10.0)
RERANKED = 50
Found = dict[str, Scores]


class Judge:
    """The LDS of the best of several scores, each half of the retrained models choosing for the other."""

    def __init__(self, retrained: gs.Retrainings) -> None:
        self.kept, self.losses = retrained.kept.double().numpy(), -retrained.losses.numpy()
        generator, (m, q) = np.random.default_rng(0), self.losses.shape
        self.folds = [np.arange(0, m, 2), np.arange(1, m, 2)]
        draws = (([generator.choice(fold, len(fold)) for fold in self.folds], q) for _ in range(DRAWS))
        self.draws = [(rows, generator.integers(0, q, q)) for rows, q in draws]

    def __call__(self, found: Found) -> dict[str, Any]:
        return self.drawn(found)[0]

    def drawn(self, found: Found) -> tuple[dict[str, Any], np.ndarray]:
        """Return the LDS with its interval and what was chosen, and its draws, to be compared with those of others."""
        predicted = {name: self.kept @ scores.numpy().T for name, scores in found.items()}
        values = [{name: self._value(p, fold) for name, p in predicted.items()} for fold in self.folds]
        best = [max(fold, key=fold.__getitem__) for fold in values]
        chosen = best[::-1]  # for each fold, what the other chose
        drawn = np.array(
            [
                np.mean([self._value(predicted[name], rows[f], c) for f, name in enumerate(chosen)])
                for rows, c in self.draws
            ]
        )
        value = float(np.mean([values[f][name] for f, name in enumerate(chosen)]))
        return {"lds": value, "interval": interval(drawn), "chosen": chosen}, drawn

    def _value(self, predicted: np.ndarray, rows: np.ndarray, columns: Any = slice(None)) -> float:
        return float(np.nanmean(_spearman(predicted[rows][:, columns], self.losses[rows][:, columns])))


def rank_of_fact(scores: Scores, fact: Scores) -> float:
    """Return the mean reciprocal rank of the better of the rows that state a question's fact."""
    places = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return float((1 / (1 + places.where(fact > 0, places.max() + 1).min(dim=1).values.double())).mean())


def rank_correlation(scores: Scores, wanted: Scores) -> float:
    """Return Spearman's correlation over rows, averaged over questions."""
    return float(np.nanmean(_spearman(scores.numpy().T, wanted.numpy().T)))


def ladder(lm: SmallLM, weights_of: Weights, retrained: gs.Retrainings, kept: Path) -> dict[str, Any]:
    rows, questions, _ = lm.data()
    fact = torch.tensor([[float(row["fact"] == question["fact"]) for row in rows] for question in questions]).double()
    model, states = lm.trained(list(range(len(rows))))
    judge, patched = Judge(retrained), once(kept / "tail_patch.pt", lambda: tail_patch(lm))

    def entry(found: Found, about: dict[str, Any]) -> dict[str, Any]:
        judged = judge(found)
        best = found[judged["chosen"][0]]
        judged |= {"rank_of_fact": rank_of_fact(best, fact), "tail_patch": rank_correlation(best, patched)}
        print(json.dumps(about | judged), flush=True)
        return about | judged

    entries = [entry({"states the same fact": fact}, {"scores": "oracle"})]
    entries += [
        entry(once(kept / f"{name}.pt", lambda m=make: m(lm)), {"scores": name}) for name, make in TEXTS.items()
    ]
    for weights, epochs in weights_of.items():
        checkpoints, exact = [states[epoch] for epoch in epochs], None
        if len(epochs) < 8:
            exact = once(kept / f"exact-{len(epochs)}-{epochs[0]}.pt", lambda c=checkpoints: every_exact(lm, model, c))
            entries.append(entry(exact, {"scores": "exact EK-FAC over all rows", "weights": weights}))
        for metric_, d, stores in RUNGS:
            for store in stores:
                about: dict[str, Any] = {"weights": weights, "metric": metric_, "d": d, "store": store}
                name = "-".join(map(str, (*about.values(),))).replace(" ", "_").replace(",", "")
                got = once(kept / f"{name}.pt", lambda a=(checkpoints, metric_, d, store): sketched(lm, model, *a))
                about |= {key: got[key] for key in ("bytes_a_row", "build_seconds")}
                entries.append(entry(got["sketches"], {"scores": "sketches", **about}))
                if exact and (metric_, d, store) == ("kfac", 4096, "float16"):
                    again = {name: looked_at_again(scores, got["sketches"]) for name, scores in exact.items()}
                    entries.append(entry(again, {"scores": f"EK-FAC over {RERANKED} rows found", **about}))
    return about_the_task(lm, model, retrained) | {"table": entries}


def once(file: Path, make: Any) -> Any:
    """Return what was kept in a file, or make and keep it."""
    if not file.exists():
        made = make()
        torch.save(made, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return torch.load(file, weights_only=False)


def sketched(
    lm: SmallLM, model: torch.nn.Module, checkpoints: list[dict[str, Tensor]], metric_: str | None, d: int, store: str
) -> dict[str, Any]:
    """Return the scores of an index, its bytes a row, and seconds."""
    rows, questions, _ = lm.data()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        options: dict[str, Any] = {"d": d, "dtype": store, "precondition": metric_, "progress": False}
        index = gs.build_index(folder, model, TASK, rows, checkpoints=checkpoints, **options)
        seconds = time.perf_counter() - began

        def asked(**choice: Any) -> Scores:
            return table(index.query(model, questions, k=len(rows), **choice))

        found = {"dot": asked(score="dot")}
        for score in ("influence", "ridge"):
            found |= {f"{score}, λ={rate:g}": asked(score=score, damping=rate) for rate in RATES}
        return {"sketches": found, "build_seconds": seconds, "bytes_a_row": len(checkpoints) * row_bytes(d, store)}


def looked_at_again(exact: Scores, found: Found) -> Scores:
    """Return exact scores of the rows at both ends of what sketches found, and zero for all others."""
    order = found["ridge, λ=1"].argsort(dim=1, descending=True)
    places = torch.cat([order[:, : RERANKED // 2], order[:, -RERANKED // 2 :]], dim=1)
    return torch.zeros_like(exact).scatter(1, places, exact.gather(1, places))


def every_exact(lm: SmallLM, model: torch.nn.Module, checkpoints: list[dict[str, Tensor]]) -> Found:
    """Return the scores of all rows by EK-FAC with whole gradients."""
    rows, questions, _ = lm.data()
    every, found = len(rows), {}
    with tempfile.TemporaryDirectory() as folder:
        index = gs.build_index(folder, model, TASK, rows, d=256, checkpoints=checkpoints, progress=False)
        for rate in (1e-3, 1e-2, 1e-1):
            hits = index.query(model, questions, k=every, rerank=every, score="dot", damping=rate, data=rows)
            found[f"EK-FAC, λ={rate:g}"] = table(hits)
    return found


def tail_patch(lm: SmallLM) -> Scores:
    """Return how much one more AdamW step on each row lowers each question's loss, beyond what momentum alone does."""
    rows, questions, _ = lm.data()
    model, _, optimizer = lm.trained_with_optimizer(list(range(len(rows))))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    asked = TASK.collate(questions)

    def after(row: dict[str, Any] | None) -> Tensor:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        optimizer.zero_grad(set_to_none=False)
        if row is not None:
            TASK.losses(model, TASK.collate([row])).mean().backward()
        optimizer.step()
        with torch.no_grad():
            return TASK.losses(model, asked).double()

    before = after(None)
    return torch.stack([before - after(row) for row in rows], dim=1)


def words(lm: SmallLM) -> Found:
    """Return Okapi's BM25 of the words of question and row."""
    rows, questions, _ = lm.data()
    return {"BM25": selection.bm25(*([{"text": text_of(row)} for row in part] for part in (rows, questions))).T}


def embeddings(lm: SmallLM) -> Found:
    """Return cosines of MiniLM's sentence embeddings of question and row."""
    rows, questions, _ = lm.data()
    return {"cosine": cosines([text_of(row) for row in questions], [text_of(row) for row in rows])}


@torch.no_grad()
def cosines(asked: list[str], texts: list[str]) -> Scores:
    """Return cosines of MiniLM's sentence embeddings, [asked, texts]."""
    from gradsketch.demo.weights import minilm

    model, tokenizer = minilm()

    def of(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).double()

    return of(asked) @ of(texts).T


def text_of(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else f"{row['prompt']} {row['answer']}"


TEXTS = {"BM25": words, "embeddings of MiniLM": embeddings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", action="store_true", help="the second task, of prose_lm.py")
    parser.add_argument("--small", action="store_true", help="30 halves, without the ladder")
    parser.add_argument("--halves", type=int)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=1, help="of the sketch, in the small form")
    parser.add_argument("--retrained", type=Path, help="JSON file in which finished halves are kept")
    parser.add_argument("--kept", type=Path, help="folder in which finished halves and scores are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.small:
        retrained = facts_lm.retrained(options.halves or 30, options.retrained)
        print(write("lm_attribution_small", measured(retrained, options.d, options.seeds)))
        return
    kept = options.kept or Path(tempfile.mkdtemp())
    kept.mkdir(parents=True, exist_ok=True)
    name, lm, weights = (
        ("lm_attribution_prose", PROSE, OF_PROSE) if options.prose else ("lm_attribution", facts_lm.FACTS, EVERY_EPOCH)
    )
    retrained = lm.retrained(options.halves or 60, options.retrained or kept / "halves.json")
    print(write(name, ladder(lm, weights, retrained, kept)))


if __name__ == "__main__":
    main()
