"""Where the time of a build goes, outside the model too: per row, with so small a model that everything else shows.

    python benchmarks/gradient_profile.py --build before     (on the code to compare with)
    python benchmarks/gradient_profile.py --build after

An index of 2,000 short rows with a GPT-2 of one layer of width 16. A stack of clocks counts every second once, as that
of the innermost part that runs. Seconds are those of the process, so that other work on the machine counts for nothing.
Writes results/build_overhead.json, which keeps the other label's figures.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from record import RESULTS, environment, write

import gradsketch as gs
from gradsketch.attribution import build, examples
from gradsketch.gradients.tasks import CausalLM
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Store

NAME = "build_overhead"
ROWS, D, REPEATS = 2000, 256, 5
# Which calls count as which part of a build: (owner, method, part). A name the code no longer has is left out.
PARTS = (
    (build, "survey", "reading and survey"),
    (examples, "fields", "reading and survey"),
    (build, "fields", "reading and survey"),
    (CausalLM, "_encode", "encoding"),
    (CausalLM, "encode", "encoding"),
    (CausalLM, "collate", "collating"),
    (CausalLM, "losses", "forward and backward"),
    (torch.autograd, "grad", "forward and backward"),
    (gs.GradientSketcher, "__call__", "capture around them"),
    (BlockSum, "add_outer", "sketch"),
    (BlockSum, "add_rows", "sketch"),
    (BlockSum, "add_gradient", "sketch"),
    (Store, "write", "writing"),
)
OUTSIDE = ("reading and survey", "encoding", "collating", "writing", "other")


class Clocks:
    """Seconds by part; what runs inside another part is not counted there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running, self._since = ["other"], time.process_time()

    def timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        return run

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as patches:
            for owner, name, part in PARTS:
                if hasattr(owner, name):
                    patches.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), part)))
            self._since = time.process_time()
            yield
            self._turn()


def profile_build(label: str) -> None:
    """Measure a build's parts and write them under this label."""
    runs = [one_build() for _ in range(REPEATS + 1)][1:]
    parts = {part: statistics.median(run[part] for run in runs) for part in sorted(runs[0])}
    outside = statistics.median(sum(run[part] for part in OUTSIDE) for run in runs)
    path = RESULTS / f"{NAME}.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else {}
    figures = {"commit": environment()["commit"], "seconds_per_row": parts, "outside_the_model": outside}
    path = write(NAME, kept | {"rows": ROWS, "d": D, label: figures})
    for part, value in {**parts, "outside the model": outside}.items():
        print(f"{part:>22} {value * 1e6:8.1f} µs a row")
    print(f"written to {path}")


def one_build() -> dict[str, float]:
    """Return the seconds a row that each part of a build takes."""
    model, tokenizer, rows = workload()
    clocks = Clocks()
    with tempfile.TemporaryDirectory() as path, clocks.watching():
        gs.build_index(path, model, CausalLM(tokenizer), rows, d=D, progress=False)
    return {part: seconds / ROWS for part, seconds in clocks.seconds.items()}


def workload() -> tuple[Any, Any, list[dict[str, str]]]:
    """Return a tiny GPT-2, a byte-level tokenizer and short texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    rows = [{"text": f"The square of {i} is {i * i}, and its cube is {i**3}."} for i in range(ROWS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        (row["text"] for row in rows),
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=400, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer), rows
