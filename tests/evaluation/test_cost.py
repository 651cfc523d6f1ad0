"""Measures of time and memory."""

import time

import pytest
import torch

from gradsketch.evaluation.cost import interleaved_seconds, peak_bytes


def test_seconds_are_per_job_and_rounds_are_interleaved():
    order = []

    def job(name, seconds):
        order.append(name)
        time.sleep(seconds)

    seconds = interleaved_seconds({"a": lambda: job("a", 0.0), "b": lambda: job("b", 0.02)}, repeats=3)
    assert order == ["a", "b"] * 4
    assert seconds["b"]["best"] >= 0.02
    assert seconds["a"]["best"] <= seconds["a"]["median"]


def test_peak_memory_counts_what_is_freed_again():
    def job():
        torch.ones(16 << 20).add_(1)  # 64 MiB

    peak = peak_bytes(job)
    if peak is None:
        pytest.skip("memory cannot be measured on this system")
    assert 60 << 20 < peak < 90 << 20
