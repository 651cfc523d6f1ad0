"""Scores for DATE-LM's evaluation: from a checkpoint, a reference set and a training set to a score of every row.

    pip install 'gradsketch[hf]'
    python examples/date_lm.py --model CHECKPOINT --train train.jsonl --reference ref.jsonl --task facts scores.json

Rows have a prompt and an answer, or a text. The file holds what the benchmark's ``evaluate_application`` reads (Jiao et
al., "DATE-LM", NeurIPS 2025): for "facts" a list of scores for each reference, for "selection" and "filtering" one
score for each training row, the mean over the references. A large score says that the row lowers the references' loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsketch as gs

TASKS = ("selection", "filtering", "facts")
Row = dict[str, Any]


def scored(
    model: nn.Module,
    task: gs.Task,
    train: Sequence[Any],
    reference: Sequence[Any],
    *,
    metric: str | None = "kfac",
    d: int = 16384,
    damping: float = 1.0,
    score: str = "ridge",
) -> Tensor:
    """Return the score of every training row for every reference, [references, rows]; NaN becomes the least."""
    with tempfile.TemporaryDirectory() as folder:
        index = gs.build_index(folder, model, task, train, d=d, dtype="int4", precondition=metric, skip_bad=True)
        scores = index.scores(model, reference, score=score, damping=damping)
    return scores.where(torch.isfinite(scores), scores.nan_to_num(torch.inf).min())


def as_read(scores: Tensor, task: str) -> list[Any]:
    """Return scores in the form that the benchmark reads for one of its tasks."""
    found: list[Any] = (scores if task == "facts" else scores.mean(0)).tolist()
    return found


def rows_of(path: Path, prompt: str, answer: str) -> list[Row]:
    """Return the rows of a JSON-lines file as a prompt and an answer, or as a text where there is no prompt."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"prompt": row[prompt], "answer": row[answer]} if prompt in row else {"text": row["text"]} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the files, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--answer-column", default="response")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("scores", type=Path)
    chosen = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model).eval()
    task = gs.CausalLM(tokenizer, max_length=chosen.max_length)
    train, reference = (
        rows_of(path, chosen.prompt_column, chosen.answer_column) for path in (chosen.train, chosen.reference)
    )
    chosen.scores.write_text(json.dumps(as_read(scored(model, task, train, reference), chosen.task)))


if __name__ == "__main__":
    main()
