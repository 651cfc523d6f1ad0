"""Kernels are tested without a GPU; what Triton compiles is kept for one session and not in the user's home."""

import os
import tempfile

import pytest

from gradsketch.kernels import blocks, trust

if "TRITON_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="gradsketch-triton-")
    os.environ["TRITON_CACHE_DIR"] = _compiled.name


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Let CPU tensors take the way of a GPU's; returns how to say what launches do."""
    monkeypatch.setattr(trust, "_DEVICES", ("cpu",))
    monkeypatch.setattr(trust, "_triton_is_there", lambda: True)
    monkeypatch.setattr(trust, "_verdicts", {})
    return lambda start: monkeypatch.setattr(blocks, "start", start)


@pytest.fixture
def believed(monkeypatch):
    """Skip trials: the test itself compares."""
    monkeypatch.setattr(trust, "_passes", lambda *_: True)
