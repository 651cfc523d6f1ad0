"""What the proofs cost: audits in a long build, one sketch of a new model, and sketchers that are made again and again.

    python benchmarks/audit_cost.py

W1 (``gradient_workloads``) in batches of 8 sequences, d = 4096. Writes results/audit_cost.json:

* ``audited_batch``: seconds of an audited batch over those of one that is not; with the share of batches that a build
  audits this gives ``share_of_1000``, what audits add to a build of 1,000 batches, the first audit included;
* ``first_batch``: a new model's first batch over a later one. Its audit is one ordinary pass of the same rows, two
  alone and the others among at most half of the batch;
* ``first_batch_extra``: what that adds, over a plain forward and backward pass;
* ``made_again``: ``sketch_gradients`` in a loop over a kept ``GradientSketcher``.
"""

from __future__ import annotations

import copy
import random
from typing import Any

from gradient_workloads import w1
from record import interleaved_seconds, write

import gradsketch as gs
from gradsketch.gradients.per_example import capture

D = 4096
REPEATS = 9


def main() -> None:
    work = w1()
    batch, task, model = work.batches(8)[0], gs.CausalLM(), work.model
    phi = gs.BlockSum(gs.Parameters(model), D)
    kept = gs.GradientSketcher(model, task, phi)
    kept(batch)
    every = copy.copy(capture.SCHEDULE)

    def audited() -> None:
        capture.SCHEDULE = capture.Schedule(share=1.0)
        kept(batch)
        capture.SCHEDULE = capture.Schedule(share=0.0)

    def new_model() -> None:
        fresh = copy.deepcopy(model)
        gs.GradientSketcher(fresh, task, phi)(batch)

    capture.SCHEDULE = capture.Schedule(share=0.0)
    jobs = {
        "plain": lambda: work.plain([batch]),
        "kept": lambda: kept(batch),
        "audited": audited,
        "made_again": lambda: gs.sketch_gradients(model, task, batch, phi),
        "new_model": new_model,
        "copy": lambda: copy.deepcopy(model),
    }
    seconds = {name: taken["median"] for name, taken in interleaved_seconds(jobs, REPEATS).items()}
    capture.SCHEDULE = every
    path = write("audit_cost", {"seconds": seconds, **ratios(seconds, every)})
    for name, value in ratios(seconds, every).items():
        print(f"{name:>16} {value:.4f}")
    print(f"written to {path}")


def ratios(seconds: dict[str, float], schedule: Any) -> dict[str, float]:
    """Return the figures that the module's text names."""
    draws = random.Random(0)
    audits = 1 + sum(draws.random() < schedule.share for _ in range(999))
    extra = seconds["audited"] - seconds["kept"]
    return {
        "audited_batch": seconds["audited"] / seconds["kept"],
        "audits_in_1000": audits,
        "share_of_1000": audits * extra / (1000 * seconds["kept"]),
        "first_batch": (seconds["new_model"] - seconds["copy"]) / seconds["kept"],
        "first_batch_extra": (seconds["new_model"] - seconds["copy"] - seconds["kept"]) / seconds["plain"],
        "made_again": seconds["made_again"] / seconds["kept"],
        "throughput": seconds["plain"] / seconds["kept"],
    }


if __name__ == "__main__":
    main()
