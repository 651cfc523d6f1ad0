"""The example in every public docstring runs, and prints what it says it prints."""

import doctest

import pytest
import torch

import gradsketch as gs

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Made by the library, never by its user: errors, results, and what is only subclassed. Rouge is used as ExactMatch.
_WITHOUT = {"LinearMap", "Rouge", "SketchedGradients", "Sketch", "Task"}
_MADE_BY_THE_LIBRARY = (Exception, gs.Result)


def has_example(name):
    public = getattr(gs, name)
    made = isinstance(public, type) and issubclass(public, _MADE_BY_THE_LIBRARY)
    return name not in _WITHOUT and not made


@pytest.mark.parametrize("name", [*filter(has_example, gs.__all__)])
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # What a reader has imported, and nothing else.
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(gs, name), name, globs={"torch": torch, "gs": gs})
    assert found.examples, f"gs.{name} has no example"
    for package in ("transformers", "rouge_score"):
        if any(f"import {package}" in e.source or f"from {package}" in e.source for e in found.examples):
            pytest.importorskip(package)
    printed = []
    doctest.DocTestRunner(optionflags=_FLAGS).run(found, out=printed.append)
    assert not printed, "".join(printed)
