"""Many architectures, each in a process of its own: a crash or an endless loop costs one row of the table."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from architectures.measure import Measured, measure, unmeasured
from architectures.zoo import Architecture

__all__ = ["survey"]

# Forked processes inherit the imports, which take ten times as long as measuring a tiny model.
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class _Running:
    architecture: Architecture
    process: multiprocessing.process.BaseProcess
    answer: Connection
    deadline: float

    def ended(self) -> Measured:
        """Return the answer; without one, how the process ended."""
        try:
            found: Measured = self.answer.recv()
        except EOFError:
            self.process.join()
            found = unmeasured(self.architecture, "crashed", f"the process ended with code {self.process.exitcode}")
        self.process.join()
        return found

    def stopped(self) -> Measured:
        """End the process, which has used up its time."""
        self.process.kill()
        self.process.join()
        return unmeasured(self.architecture, "crashed", "the time limit")


def survey(architectures: Iterable[Architecture], *, jobs: int = 1, limit: float = 120.0) -> Iterator[Measured]:
    """Measure architectures, ``jobs`` at a time and each for at most ``limit`` seconds, in the order they end."""
    _preload()
    waiting, running = list(architectures), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(0), limit))
        ready = wait([one.answer for one in running], timeout=1)
        for one in list(running):
            late = time.monotonic() > one.deadline
            if one.answer in ready or late:
                running.remove(one)
                yield one.ended() if one.answer in ready else one.stopped()


def _start(architecture: Architecture, limit: float) -> _Running:
    answer, sent = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_answer, args=(architecture, sent), daemon=True)
    process.start()
    sent.close()  # so that reading ends where the process does
    return _Running(architecture, process, answer, time.monotonic() + limit)


def _answer(architecture: Architecture, sent: Connection) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    sent.send(measure(architecture))


def _preload() -> None:
    """Import what most models import, once."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)
    import transformers.integrations.moe
    import transformers.loss.loss_utils
    import transformers.modeling_utils  # noqa: F401
    from transformers import BertForMaskedLM, CLIPModel, LlamaForCausalLM, MixtralForCausalLM  # noqa: F401
