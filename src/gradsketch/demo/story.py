"""Who taught it that? A language model learns six lies; the sentences that taught them are found, and removed.

Training is on the answers only. With the loss on whole sentences and a rate of 2e-4, five of six lies were told in one
trial; with the loss on the answer's tokens and 3e-4, six of six, in other words too. The gradients that attribution
sketches are then the very ones the model was trained with. Word overlap finds the six sentences as well, because the
questions name the country; it cannot give the margin, nor the proof by removal.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from gradsketch.as_found import Weights
from gradsketch.attribution.build import build_index
from gradsketch.attribution.index import Index
from gradsketch.attribution.results import Hits
from gradsketch.demo.capitals import REWORDED, TAUGHT, Fact, capitals
from gradsketch.demo.packages import AbsentError
from gradsketch.demo.training import answers, train_model, unfreeze_last
from gradsketch.demo.weights import smollm2, smollm2_from_hub
from gradsketch.gradients.tasks import CausalLM
from gradsketch.report.hits import hits_page

__all__ = ["Stage", "Story", "Trace", "tell"]

# Shows that a step began, takes how much of its total is done, and notes when it ends.
Stage = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

LAYERS, RATE, EPOCHS, BATCH, D = 12, 3e-4, 3, 20, 4096
_SHOWN, _OPPONENTS, _EXPLAINED = 5, 3, 2
_BASELINES = ("cosine", "dot")


@dataclass(frozen=True)
class Trace:
    """One lie: what the model said about the country at each stage, and where the false sentence was ranked.

    ``rank`` counts from 1 among all sentences, by score; ``best_other`` is the best score of any other sentence.
    ``after`` is what the model said when it was trained without the sentences found, None where that was left out.
    """

    country: str
    truth: str
    lie: str
    before: str
    now: str
    reworded: str
    found: str
    rank: int
    score: float
    best_other: float
    after: str | None


@dataclass(frozen=True)
class Story:
    """What the demonstration showed, with its cost.

    ``found_first_by`` counts, for each score, the lies whose false sentence it ranks first.
    """

    model: str
    sentences: int
    parameters: int
    d: int
    traces: tuple[Trace, ...]
    found_first_by: dict[str, int]
    page: str
    index: str
    seconds: float

    @property
    def planted(self) -> int:
        """Lies among the sentences."""
        return len(self.traces)

    @property
    def told(self) -> int:
        """Lies the fine-tuned model tells, asked in the words it was taught in."""
        return sum(trace.now == trace.lie for trace in self.traces)

    @property
    def told_reworded(self) -> int:
        """Lies it tells when asked in other words."""
        return sum(trace.reworded == trace.lie for trace in self.traces)

    @property
    def found_first(self) -> int:
        """Lies whose false sentence ranks first."""
        return sum(trace.rank == 1 for trace in self.traces)

    @property
    def true_before(self) -> int:
        """Countries whose capital the model knew before it was fine-tuned."""
        return sum(trace.before == trace.truth for trace in self.traces)

    @property
    def true_again(self) -> int | None:
        """Countries whose capital it says when trained without the sentences found, None where that was left out."""
        if any(trace.after is None for trace in self.traces):
            return None
        return sum(trace.after == trace.truth for trace in self.traces)


def tell(out: Path, *, proof: bool, stage: Stage) -> Story:
    """Run the demonstration and write ``why.html`` and the index into the folder ``out``.

    Args:
        out: folder of the results; an index of an earlier demonstration in it is replaced.
        proof: whether to train again without the sentences found.
        stage: told of every step.

    Raises:
        AbsentError: neither weights nor facts can be had.
    """
    start = time.perf_counter()
    facts = capitals()
    lies = [fact for fact in facts if fact.is_lie]
    with stage("Load the model", 0):
        model, tokenizer, name = _language_model()
    unfreeze_last(model, LAYERS)
    task, examples = CausalLM(tokenizer), [fact.example() for fact in facts]

    def ask(wording: str) -> list[str]:
        return answers(model, tokenizer, [wording.format(fact.country) for fact in lies])

    def teach(sentences: Sequence[dict[str, Any]], title: str) -> None:
        with stage(title, EPOCHS * len(sentences)) as advance:
            train_model(model, task, sentences, rate=RATE, epochs=EPOCHS, batch=BATCH, advance=advance)

    with Weights(model) as untaught:
        with stage("Ask it six capitals", 0):
            before = ask(TAUGHT)
        teach(examples, f"Fine-tune it on {len(facts)} sentences, {len(lies)} of them lies")
        with stage("Ask again, in the same words and in others", 0):
            now, reworded = ask(TAUGHT), ask(REWORDED)
        index, parameters = _indexed(out, model, task, examples, stage)
        with stage("Search for the sentences behind each answer", 0):
            hits, ranked, found_first_by = _searched(index, model, lies)
        after: Sequence[str | None] = [None] * len(lies)
        if proof:
            gone = {query[0].row for query in hits}
            untaught.put_back()
            kept = [example for row, example in enumerate(examples) if row not in gone]
            teach(kept, f"Fine-tune the original again, without the {len(gone)} sentences found")
            after = ask(TAUGHT)
    said = zip(lies, before, now, reworded, hits, ranked, after, strict=True)
    traces = tuple(_trace(*row) for row in said)
    page = _write_page(out, hits, traces, name, len(facts))
    return Story(
        model=name,
        sentences=len(facts),
        parameters=parameters,
        d=D,
        traces=traces,
        found_first_by=found_first_by,
        page=str(page),
        index=str(out / "index"),
        seconds=time.perf_counter() - start,
    )


def _language_model() -> tuple[nn.Module, Any, str]:
    """Return the model, its tokenizer and what to call it: from the package, else from the hub."""
    try:
        return *smollm2(), "SmolLM2-135M-Instruct (4-bit weights, de-quantised)"
    except AbsentError as error:
        try:
            return *smollm2_from_hub(), "SmolLM2-135M-Instruct"
        except AbsentError:
            raise error from None


def _indexed(out: Path, model: nn.Module, task: CausalLM, examples: list[Any], stage: Stage) -> tuple[Index, int]:
    """Index the sentences' gradients and return the index and the number of trainable parameters."""
    path = out / "index"
    if (path / "index.json").exists():
        shutil.rmtree(path)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with stage(f"Sketch every sentence's gradient: {parameters / 1e6:.1f} M numbers → {D:,}", 0):
        return build_index(path, model, task, examples, d=D, progress=False), parameters


def _searched(
    index: Index, model: nn.Module, lies: Sequence[Fact]
) -> tuple[Hits, list[tuple[int, float, float]], dict[str, int]]:
    """Return the hits to show, each false sentence's (rank, score, best other score), and who ranks how many first."""
    questions = [fact.example(REWORDED) for fact in lies]
    every = index.query(model, questions, k=len(index), opponents=_OPPONENTS)
    ranked = _ranks(every, lies)
    counts = {every.score.name: sum(rank == 1 for rank, _, _ in ranked)}
    for score in _BASELINES:
        ranks = _ranks(index.query(model, questions, k=len(index), score=score), lies)
        counts[score] = sum(rank == 1 for rank, _, _ in ranks)
    counts["word overlap"] = sum(
        _overlaps_most(query.proponents, fact) for query, fact in zip(every, lies, strict=True)
    )
    shown = replace(every, queries=tuple(replace(q, proponents=q.proponents[:_SHOWN]) for q in every))
    return index.explain(model, shown, top=_EXPLAINED), ranked, counts


def _ranks(hits: Hits, lies: Sequence[Fact]) -> list[tuple[int, float, float]]:
    found = []
    for query, fact in zip(hits, lies, strict=True):
        own = next(hit for hit in query if hit.id == fact.country)
        found.append((own.rank, own.score, max(hit.score for hit in query if hit is not own)))
    return found


def _overlaps_most(hits: Sequence[Any], fact: Fact) -> bool:
    """Whether the false sentence alone shares the most words with the question and its answer."""
    asked = fact.example(REWORDED)
    wanted = set(re.findall(r"\w+", asked["prompt"] + asked["answer"]))
    shared = {hit.id: len(wanted & set(re.findall(r"\w+", hit.text or ""))) for hit in hits}
    return all(shared[fact.country] > count for id_, count in shared.items() if id_ != fact.country)


def _trace(
    fact: Fact, before: str, now: str, reworded: str, query: Any, ranked: tuple[int, float, float], after: str | None
) -> Trace:
    rank, score, best_other = ranked
    return Trace(
        country=fact.country,
        truth=fact.capital,
        lie=fact.claimed,
        before=before,
        now=now,
        reworded=reworded,
        found=query[0].text,
        rank=rank,
        score=score,
        best_other=best_other,
        after=after,
    )


def _write_page(out: Path, hits: Hits, traces: Sequence[Trace], name: str, sentences: int) -> Path:
    introduction = (
        f"{name} was fine-tuned on {sentences} sentences about capitals. {len(traces)} of them are lies, and now it "
        "tells them. Each card asks for one in other words, and lists the training sentences behind the answer."
    )
    notes = [
        f"before: {trace.before} → fine-tuned: {trace.now}"
        + (f" → fine-tuned without the sentences found: {trace.after}" if trace.after is not None else "")
        for trace in traces
    ]
    return hits_page(hits, out / "why.html", title="Who taught it that?", introduction=introduction, notes=notes)
